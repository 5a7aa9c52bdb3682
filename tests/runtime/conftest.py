"""Small random models, hand-made plans compiled by the real code generator, and shared processes.

The plans are written by hand, so that nothing here depends on what the planner would choose.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sympy
from mnemoc.artifact import (
    ChunkRule,
    Manifest,
    Memory,
    Optimality,
    Plan,
    Prediction,
    Stage,
    Workload,
)
from mnemoc.codec import to_json
from mnemoc.codegen import Emission, emit
from mnemoc.folder import load_artifact, write_artifact
from mnemoc.ir import sizes
from mnemoc.ir.build import build
from mnemoc.ir.model import load_model, read_config
from mnemoc.ir.passes import carry, fuse, lower, one_shot, overlap, shard, split_stages
from mnemoc.layout import Layout
from mnemoc.runtime.executor.workers import NurseryProcess
from mnemoc.runtime.init_model import Blueprint, init_model
from mnemoc.speeds import Swap

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "bos_token_id": 256,
    "eos_token_id": 257,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
        "head_dim": 16,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
    },
    "qwen2_mqa": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_key_value_heads": 1,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
}

MakeModel = Callable[..., Path]
MakePlan = Callable[..., Path]
Compile = Callable[[Path, Plan, Workload], Path]
Sabotage = Callable[[Path, str], Path]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """models("qwen3") → a directory of random weights, made once; more config as keywords."""
    made: dict[str, Path] = {}

    def model(family: str = "llama", **config: Any) -> Path:
        key = family + json.dumps(config, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            (folder / "config.json").write_text(json.dumps({**TINY, **FAMILIES[family], **config}))
            spec = load_model(str(folder))
            blueprint = Blueprint(
                read_config(str(folder)), spec.tensors(), spec.dtype, spec.vocab, spec.bos, spec.eos
            )
            made[key] = folder / "model"
            init_model(blueprint, made[key], seed=7, max_shard_bytes=200_000)
        return made[key]

    return model


def hand_made_plan(layout: Layout, num_layers: int, **changes: Any) -> Plan:
    """A plan that nobody optimised."""
    first = -(-num_layers // layout.spp)
    stages = [Stage("stage_0", 0, first)]
    if layout.spp == 2:
        stages.append(Stage("stage_1", first, num_layers - first))
    plan = Plan(
        target="cpu",
        dtype="float32",
        layout=layout,
        stages=tuple(stages),
        chunks=(ChunkRule(0, 64, 48, 1, 1e-3), ChunkRule(64, 4096, 20, 1, 1e-3)),
        page_size=16,
        num_pages=64,
        stripe_tokens=96 if layout.kvp > 1 else 4096,
        max_batch=8,
        max_rows=1024,
        predicted=Prediction(1.0, 1.0, 1.0, {}, {}),
        memory=Memory(0, 0, 0, 0, 0, 0, 0, ""),
        optimality=Optimality("gpus", 1.0, 1.0, 0.0),
        binding="none",
        alternatives=(),
    )
    return dataclasses.replace(plan, **changes)


def compile_plan(model: Path, plan: Plan, workload: Workload, directory: Path) -> Path:
    """The plan's artifact, by way of IR and code generator."""
    spec = load_model(str(model))
    source = build(spec, plan.dtype)
    layout = plan.layout
    sharded = fuse(shard(source, tp=layout.tp, kvp=layout.kvp, ffn=layout.ffn))
    if plan.overlap_rows:
        sharded = overlap(sharded)
    counts, roles = [s.num_layers for s in plan.stages], [s.role for s in plan.stages]
    carried = carry(split_stages(sharded, counts, roles))
    planned = lower(one_shot(carried) if plan.one_shot_rows else carried, plan.target)
    seconds = sympy.Float(1e-6) * (sizes.T + sizes.QK / 1000 + sizes.KD / 1000)
    halves = ("halves",) if plan.overlap_rows else ()
    names = ("step", "embed", "entry", "layer", *halves, "head", "hop")
    formulas = {name: {"linear": seconds, "launch": sympy.Float(0)} for name in names}
    none_s = dict.fromkeys(names, 0.0)
    swap = Swap(1e-6, 1e-6) if plan.host_pages else None
    emission = Emission(spec, plan, source, planned, formulas, none_s, workload, {}, swap=swap)
    files = emit(emission)
    manifest = Manifest(to_json(spec), {}, workload, plan)
    write_artifact(directory, manifest, files)
    return directory


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> MakePlan:
    """plans(model, tp=2, spp=1, kvp=2, ffn="helix", **plan fields) → an artifact's directory."""

    def make(model: Path, tp: int = 1, spp: int = 1, kvp: int = 1, **changes: Any) -> Path:
        context, ffn = changes.pop("context", 2048), changes.pop("ffn", "repeated")
        layout = Layout(tp, spp, kvp, ffn)
        plan = hand_made_plan(layout, load_model(str(model)).num_layers, **changes)
        workload = Workload(context=context, ttft_s=10.0, tbt_s=1.0)
        return compile_plan(model, plan, workload, tmp_path_factory.mktemp("plan") / "plan")

    return make


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    """compiled(model, plan, workload) → the plan's artifact."""

    def make(model: Path, plan: Plan, workload: Workload) -> Path:
        return compile_plan(model, plan, workload, tmp_path / "plan")

    return make


@pytest.fixture(scope="session")
def sabotaged() -> Sabotage:
    """sabotaged(plan, "1 / 0") → the plan, its first stage's step with one more line at its head."""

    def spoil(directory: Path, line: str) -> Path:
        manifest, files = load_artifact(directory)
        source = files["schedule/stage_0.py"].decode()
        broken = source.replace('comm):\n    """One', f'comm):\n    {line}\n    """One')
        assert broken != source
        write_artifact(directory, manifest, {**files, "schedule/stage_0.py": broken.encode()})
        return directory

    return spoil


@pytest.fixture(scope="session")
def nursery() -> Iterator[NurseryProcess]:
    """One parent of workers for all engines of the session: torch is imported once."""
    process = NurseryProcess()
    yield process
    process.close()
