"""Plans in the words of other engines: only flags that they have, and every loss named."""

import dataclasses
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from mnemoc import pipeline
from mnemoc.artifact import ChunkRule, Workload
from mnemoc.codegen import ENGINES, Subject, export
from mnemoc.codegen.export import VERSIONS
from mnemoc.errors import UsageError
from mnemoc.layout import Layout
from mnemoc.options import ENGINES as OFFERED

KNOWN = json.loads((Path(__file__).parent / "engine_flags.json").read_text())


@pytest.fixture(scope="module")
def long() -> Subject:
    """Four KVP groups, and stages of unequal height."""
    workload = Workload(context=10_000_000, ttft_s=1200.0, tbt_s=0.03)
    pinned = {"tp": 8, "spp": 3, "kvp": 4}
    made = pipeline.plan("llama-3-8b", "dgx-h100", workload, pinned=pinned)
    return Subject(made.spec, workload, made.plan, 8)


def laid_out(subject: Subject, **changes: object) -> Subject:
    return dataclasses.replace(subject, plan=dataclasses.replace(subject.plan, **changes))


@pytest.fixture
def short(long: Subject) -> Subject:
    """One GPU, one chunk size, within what the model was trained for."""
    plan = dataclasses.replace(
        long.plan,
        layout=Layout(1, 1, 1),
        stages=(dataclasses.replace(long.plan.stages[0], num_layers=32),),
        chunks=(ChunkRule(0, 4096, 1000, 1, 0.01),),
    )
    return Subject(long.spec, Workload(4096, 1.0, 0.1), plan, 8)


def options(text: str) -> dict[str, str]:
    """Flags of a script with their values."""
    return dict(re.findall(r"^ +(--[\w-]+)(?: (\S+))? \\$", text, re.MULTILINE))


def names(engine: str, text: str) -> set[str]:
    """Every flag, key and environment variable that a text uses."""
    if engine != "trtllm":
        body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        return set(re.findall(r"--\w[\w-]*", body)) | set(re.findall(r"export (\w+)=", body))
    tree = yaml.safe_load(text)
    return tree.keys() | {f"kv_cache_config.{key}" for key in tree["kv_cache_config"]}


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_written_is_golden(engine, long, golden):
    suffix = "yaml" if engine == "trtllm" else "sh"
    golden(f"{engine}.{suffix}", export(engine, long).text)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_flag_is_one_that_the_engine_was_checked_to_have(engine, long, short):
    known = KNOWN[engine]
    assert VERSIONS[engine] == known["version"]
    used = set[str]()
    for subject in (long, short):
        made = export(engine, subject)
        assert made.version == known["version"]
        used |= names(engine, made.text)
    assert used == set(known["names"])


@pytest.mark.parametrize("engine", ENGINES)
def test_gaps_stand_at_the_head_of_the_text(engine, long):
    made = export(engine, long)
    head = re.sub(r"\n# *", " ", made.text)
    for gap in made.gaps:
        assert f"{gap.what}: {gap.why}." in head
    whats = " ".join(gap.what for gap in made.gaps)
    for loss in ("Chunk sizes", "KVP over 4 groups", "growth", "10,000,256 positions", "promise"):
        assert loss in whats


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_scripts_parse(engine, long, short):
    for subject in (long, short):
        text = export(engine, subject).text
        subprocess.run(["sh", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize(
    ("kvp", "tp", "dcp"), [(4, "32", "4"), (2, "16", "2"), (3, "8", None), (8, "32", "4")]
)
def test_vllm_shards_kv_only_as_far_as_a_group_would_hold_copies(kvp, tp, dcp, long):
    made = export("vllm", laid_out(long, layout=Layout(8, 3, kvp)))
    flags = options(made.text)
    assert flags["--tensor-parallel-size"] == tp
    assert flags.get("--decode-context-parallel-size") == dcp
    assert int(tp) >= int(dcp or 1) * long.spec.num_kv_heads


def test_vllm_with_few_heads_on_a_rank_has_nothing_to_shard(long):
    made = export("vllm", laid_out(long, layout=Layout(2, 3, 4)))
    assert options(made.text)["--tensor-parallel-size"] == "8"
    assert "--decode" not in made.text
    assert any("nothing to shard" in gap.why for gap in made.gaps)


def test_vllm_is_given_the_kv_memory_that_its_sharding_needs(long):
    planned = long.plan.memory.kv_bytes
    given = int(options(export("vllm", long).text)["--kv-cache-memory-bytes"])
    assert given == pytest.approx(planned, rel=1e-3)
    halved = export("vllm", laid_out(long, layout=Layout(8, 3, 2)))
    assert int(options(halved.text)["--kv-cache-memory-bytes"]) == pytest.approx(
        2 * planned, rel=1e-3
    )


@pytest.mark.parametrize("engine", ["sglang", "trtllm"])
def test_without_kvp_memory_that_does_not_suffice_is_said(engine, long):
    assert not any(gap.what == "Memory" for gap in export(engine, long).gaps)
    small = dataclasses.replace(long.plan.memory, capacity_bytes=2 * long.plan.memory.kv_bytes)
    made = export(engine, laid_out(long, memory=small))
    assert any(gap.what == "Memory" for gap in made.gaps)
    assert "24 of 96 GPUs" in made.text.replace("\n# ", " ").replace("    ", "")


def test_memory_that_helix_alone_would_save_is_said():
    workload = Workload(context=100_000, ttft_s=1e4, tbt_s=10.0)
    pinned = {"tp": 2, "spp": 1, "kvp": 4, "ffn": "helix"}
    made = pipeline.plan("llama-3-70b", "dgx-h100", workload, pinned=pinned)
    memory = made.plan.memory
    assert memory.weights_bytes + memory.kv_bytes < memory.capacity_bytes / 2
    exported = export("sglang", Subject(made.spec, workload, made.plan, 8))
    gaps = {gap.what: gap.why for gap in exported.gaps}
    assert "needed on a rank" in gaps["Memory"]
    assert "KVP over 4 groups of 2, with the FFN over all of them, and its growth" in gaps


def test_budgets_are_whole_pages_where_the_engine_asks_for_them(short):
    chunk = int(options(export("sglang", short).text)["--chunked-prefill-size"])
    budget = yaml.safe_load(export("trtllm", short).text)["max_num_tokens"]
    assert chunk % short.plan.page_size == 0 == budget % short.plan.page_size
    assert 900 < chunk <= 1000
    assert 900 < budget <= 1001


def test_a_rest_at_the_end_does_not_become_the_budget(short):
    rules = (ChunkRule(0, 4000, 1000, 1, 0.01), ChunkRule(4000, 4096, 96, 1, 0.01))
    five = dataclasses.replace(short.workload, concurrency=5)
    made = export("vllm", dataclasses.replace(laid_out(short, chunks=rules), workload=five))
    assert options(made.text)["--max-num-batched-tokens"] == "1005"


def test_unequal_stages_are_told_to_each_engine(long):
    split = [stage.num_layers for stage in long.plan.stages]
    assert len(set(split)) > 1
    joined = ",".join(map(str, split))
    assert f"VLLM_PP_LAYER_PARTITION={joined}" in export("vllm", long).text
    assert f"SGLANG_PP_LAYER_PARTITION={joined}" in export("sglang", long).text
    assert yaml.safe_load(export("trtllm", long).text)["pp_partition"] == split


def test_the_shell_offers_exactly_the_engines_that_there_are(short):
    assert tuple(ENGINES) == OFFERED
    with pytest.raises(UsageError, match="vllm, sglang, trtllm"):
        export("tgi", short)
