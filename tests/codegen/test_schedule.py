"""The emitted programs: golden text, the same from the same inputs, and right."""

import ast
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mnemoc.artifact import Batch, Layout, Memory, Optimality, Plan, Prediction, Segments, Stage
from mnemoc.codegen.emit import kernel_spec
from mnemoc.codegen.kernels import render_kernels
from mnemoc.codegen.schedule import render_schedule
from mnemoc.ir.build import build
from mnemoc.ir.interpret import Chunk, Interpreter
from mnemoc.ir.model import load_model
from mnemoc.ir.passes import fuse, lower, shard, split_stages
from mnemoc.runtime.loader import ArtifactModules

QWEN = dataclasses.replace(
    load_model("qwen3-8b"),
    num_layers=3,
    hidden=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn=96,
    vocab=128,
)


def make_plan(layout, layers, dtype="float32", target="cpu"):
    ends = np.cumsum([0, *layers])
    stages = tuple(Stage(f"stage_{i}", int(ends[i]), count) for i, count in enumerate(layers))
    return Plan(
        target=target,
        dtype=dtype,
        layout=layout,
        stages=stages,
        chunks=(),
        page_size=16,
        num_pages=64,
        stripe_tokens=1024,
        max_batch=4,
        predicted=Prediction(1.0, 1.0, 1.0, {}, {}),
        memory=Memory(1, 1, 1, 1, 1, 1, 1, ""),
        optimality=Optimality("gpus", 1.0, 1.0, 0.0),
        binding="",
        alternatives=(),
    )


def schedule(spec, layout, layers, **plan):
    plan = make_plan(layout, layers, **plan)
    sharded = shard(build(spec, plan.dtype), tp=layout.tp, kvp=layout.kvp, ffn=layout.ffn)
    names = [stage.role for stage in plan.stages]
    return plan, render_schedule(
        lower(split_stages(fuse(sharded), layers, names), plan.target), plan
    )


def test_golden_text_of_both_stages_of_a_3d_layout(golden):
    _, files = schedule(QWEN, Layout(2, 2, 2), [2, 1], dtype="bfloat16", target="cuda:sm_90")
    for path in ("schedule/stage_0.py", "schedule/stage_1.py", "schedule/collectives.py"):
        golden(Path(path).name, files[path])


def test_golden_text_of_a_layer_with_helix(golden):
    _, files = schedule(QWEN, Layout(2, 1, 2, "helix"), [3])
    program = files["schedule/stage_0.py"]
    golden("helix.py", program[program.index("# What a rank loads") : program.index("\ndef head")])
    golden("helix_collectives.py", files["schedule/collectives.py"])


def test_golden_text_of_a_single_rank(golden):
    _, files = schedule(load_model("tiny-llama"), Layout(1, 1, 1), [4])
    assert set(files) == {"schedule/__init__.py", "schedule/stage_0.py"}
    golden("single.py", files["schedule/stage_0.py"])


def test_the_same_plan_gives_the_same_text():
    assert schedule(QWEN, Layout(2, 2, 2), [2, 1]) == schedule(QWEN, Layout(2, 2, 2), [2, 1])


@pytest.mark.parametrize("layout", [Layout(1, 1, 1), Layout(2, 2, 2), Layout(2, 2, 2, "helix")])
def test_programs_import_torch_and_their_own_kernels_and_nothing_else(layout):
    layers = [3] if layout.spp == 1 else [2, 1]
    _, files = schedule(QWEN, layout, layers)
    for source in files.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] == "torch" for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                assert node.level > 0


@pytest.mark.parametrize(
    "spec",
    [QWEN, dataclasses.replace(QWEN, qk_norm=False, qkv_bias=True, tied_embeddings=True)],
    ids=["qk_norm", "qkv_bias_tied"],
)
def test_the_emitted_program_computes_what_the_interpreter_does(spec):
    torch = pytest.importorskip("torch")
    plan, files = schedule(spec, Layout(1, 1, 1), [3])
    files |= render_kernels(kernel_spec(spec, plan))
    contents = {path: text.encode() for path, text in files.items()}
    program = ArtifactModules(Path("plan"), contents, ("",)).load("schedule.stage_0")
    rng = np.random.default_rng(0)
    weights = {
        name: (rng.normal(size=shape) * 0.1 + (len(shape) == 1)).astype(np.float32)
        for name, shape in spec.tensors().items()
    }

    def tensor(parameter, layer=None):
        pieces = [weights[source.format(layer=layer)] for source in parameter["sources"]]
        return torch.from_numpy(np.concatenate(pieces))

    w = SimpleNamespace(layers=[SimpleNamespace() for _ in range(3)])
    for parameter in program.PARAMETERS:
        if not parameter["per_layer"]:
            setattr(w, parameter["name"], tensor(parameter))
            continue
        for layer in range(3):
            setattr(w.layers[layer], parameter["name"], tensor(parameter, layer))
    kv = [(torch.empty(program.KV_SHAPE), torch.empty(program.KV_SHAPE)) for _ in range(3)]
    ids = rng.integers(0, spec.vocab, 60)

    def table(*values):
        return torch.tensor(values, dtype=torch.int32)

    def step(start, rows, decode=False):
        pos = torch.arange(start, start + rows)
        pages = torch.arange(4, dtype=torch.int32)[None] + 3
        segments = Segments(table(0, rows), table(start + rows), table(start), pages, rows, 60)
        batch = Batch(
            ids=torch.from_numpy(ids[start : start + rows]),
            pos=pos,
            slots=pos + 3 * plan.page_size,
            last=torch.arange(rows),
            num_decode=rows if decode else 0,
            decode=segments if decode else None,
            prefill=None if decode else segments,
            exchange=(),
        )
        return program.step(w, kv, batch, SimpleNamespace(tp=None, tp_rank=0))

    with torch.inference_mode():
        steps = [step(0, 17), step(17, 38), *(step(n, 1, decode=True) for n in range(55, 60))]
    chunk = Chunk(0, 0, tuple(map(int, ids)))
    expected = Interpreter(build(spec, "float32"), weights).run([chunk], range(60))
    np.testing.assert_allclose(torch.cat(steps).numpy(), expected, rtol=0, atol=1e-4)
