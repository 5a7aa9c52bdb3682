"""The emitted programs: golden text, the same from the same inputs, and right."""

import ast
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mnemoc.artifact import AUTO, Memory, Optimality, Plan, Precision, Prediction, Stage
from mnemoc.codegen.emit import kernel_spec
from mnemoc.codegen.kernels import render_kernels
from mnemoc.codegen.schedule import render_schedule
from mnemoc.codegen.tiles import TILES
from mnemoc.errors import BadInput
from mnemoc.ir.build import build
from mnemoc.ir.interpret import Chunk, Interpreter
from mnemoc.ir.model import load_model
from mnemoc.ir.ops.e4m3 import scaled
from mnemoc.ir.passes import (
    carry,
    fuse,
    lower,
    one_shot,
    overlap,
    quantize,
    shard,
    split_stages,
)
from mnemoc.layout import Layout
from mnemoc.microbatch import Batch, Segments
from mnemoc.runtime.loader import ArtifactModules
from mnemoc.runtime.rank.shared import Shared
from mnemoc.runtime.rank.weights import Checkpoint, load_weights
from safetensors.torch import save_file

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


ALONE = SimpleNamespace(tp=None, tp_rank=0)


def make_plan(layout, layers, dtype="float32", target="cpu", precision=AUTO, **rows):
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
        max_rows=1024,
        predicted=Prediction(1.0, 1.0, 1.0, {}, {}),
        memory=Memory(1, 1, 1, 1, 1, 1, 1, ""),
        optimality=Optimality("gpus", 1.0, 1.0, 0.0),
        binding="",
        alternatives=(),
        precision=precision,
        **rows,
    )


def schedule(spec, layout, layers, **plan):
    plan = make_plan(layout, layers, **plan)
    source = build(spec, plan.dtype, plan.precision.kv_cache)
    module = fuse(shard(source, tp=layout.tp, kvp=layout.kvp, ffn=layout.ffn))
    if plan.precision.weights == "fp8":
        module = quantize(module)
    if plan.overlap_rows:
        module = overlap(module)
    names = [stage.role for stage in plan.stages]
    module = carry(split_stages(module, layers, names))
    if plan.one_shot_rows:
        module = one_shot(module)
    return plan, render_schedule(lower(module, plan.target), plan)


def test_golden_text_of_both_stages_of_a_3d_layout(golden):
    _, files = schedule(QWEN, Layout(2, 2, 2), [2, 1], dtype="bfloat16", target="cuda:sm_90")
    for path in ("schedule/stage_0.py", "schedule/stage_1.py", "schedule/collectives.py"):
        golden(Path(path).name, files[path])


def test_golden_text_of_a_layer_with_helix(golden):
    _, files = schedule(QWEN, Layout(2, 1, 2, "helix"), [3])
    program = files["schedule/stage_0.py"]
    golden("helix.py", program[program.index("# What a rank loads") : program.index("\ndef head")])
    golden("helix_collectives.py", files["schedule/collectives.py"])


def test_golden_text_of_a_layer_in_two_halves(golden):
    """And the step, which chooses between it and the whole layer."""
    given = {"dtype": "bfloat16", "target": "cuda:sm_90", "overlap_rows": 256}
    _, files = schedule(QWEN, Layout(2, 1, 2), [3], **given)
    program = files["schedule/stage_0.py"]
    text = program[program.index("def layer_halves") : program.index("\ndef head")]
    golden("halves.py", text + program[program.index("\ndef step") :])


def test_golden_text_of_a_layer_with_fp8(golden):
    given = {"target": "cuda:sm_90", "precision": Precision("fp8", "fp8")}
    biased = dataclasses.replace(QWEN, qkv_bias=True)
    _, files = schedule(biased, Layout(2, 1, 1), [3], dtype="bfloat16", **given)
    program = files["schedule/stage_0.py"]
    golden("fp8.py", program[program.index("DTYPE = ") : program.index("\ndef head")])


@pytest.mark.parametrize(
    ("name", "quantization", "kvp"), [("one_shot", "auto", 2), ("one_shot_fp8", "fp8", 1)]
)
def test_golden_text_of_sums_that_are_read_from_the_peers_memory(name, quantization, kvp, golden):
    given = {"target": "cuda:sm_90", "dtype": "bfloat16", "precision": Precision(quantization)}
    _, files = schedule(QWEN, Layout(2, 1, kvp), [3], one_shot_rows=41, **given)
    program, collectives = files["schedule/stage_0.py"], files["schedule/collectives.py"]
    start, end = (program.index(text) for text in ("KV_DTYPE", "# What a rank loads"))
    layer = program[program.index("\n\ndef layer") : program.index("\n\ndef head")]
    golden(f"{name}.py", program[start:end] + layer)
    golden(f"{name}_collectives.py", collectives.partition("\n\n\nclass Swaps")[0])


@pytest.mark.parametrize(
    ("spec", "dtype", "says"),
    [
        (QWEN, "float16", "bf16 alone .*f16"),
        (dataclasses.replace(QWEN, ffn=80), "bfloat16", "64 × 40"),
    ],
)
def test_products_of_fp8_that_no_library_has_are_refused(spec, dtype, says):
    given = {"target": "cuda:sm_90", "precision": Precision(weights="fp8")}
    with pytest.raises(BadInput, match=says):
        schedule(spec, Layout(2, 1, 1), [3], dtype=dtype, **given)


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
def test_the_emitted_program_computes_what_the_interpreter_does(spec, tmp_path):
    plan, files = schedule(spec, Layout(1, 1, 1), [3])
    weights = random_weights(spec)
    ids = np.random.default_rng(1).integers(0, spec.vocab, 60)
    program = load(spec, plan, files)
    got = steps(program, loaded(program, weights, tmp_path), plan, ids)
    chunk = Chunk(0, 0, tuple(map(int, ids)))
    expected = Interpreter(build(spec, "float32"), weights).run([chunk], range(60))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_the_emitted_fp8_program_is_as_near_as_the_interpreter(tmp_path, as_on_gpu):
    """GPU kernels under Triton's interpreter, weights quantised as they are loaded from bfloat16.

    What bfloat16 rounds otherwise may be a step of e4m3 otherwise: so the two are not the same, but both as
    far from what is not quantised, and nearer to one another than if they erred independently (√2 as far).
    """
    spec = dataclasses.replace(QWEN, num_layers=2)
    given = {"dtype": "bfloat16", "target": "cuda:sm_90", "precision": Precision("fp8")}
    plan, files = schedule(spec, Layout(1, 1, 1), [2], **given)
    weights = {
        name: torch.from_numpy(array).bfloat16().float().numpy()
        for name, array in random_weights(spec).items()
    }
    program = load(spec, plan, files)
    ids = np.random.default_rng(1).integers(0, spec.vocab, 60)
    got = steps(program, loaded(program, weights, tmp_path), plan, ids)
    kept = dict(weights)
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        kept[name], kept[f"{name}_scale"] = scaled(weights[name])
    chunk, source = Chunk(0, 0, tuple(map(int, ids))), build(spec, "float32")
    plain = Interpreter(source, weights).run([chunk], range(60))
    quantised = quantize(fuse(shard(source, tp=1, kvp=1)))
    expected = Interpreter(quantised, kept).run([chunk], range(60))
    off = np.linalg.norm(expected - plain)
    assert np.linalg.norm(got - plain) == pytest.approx(off, rel=0.1)
    assert np.linalg.norm(got - expected) < 0.7 * off


class Ranks:
    """Two ranks of tp in this process, one running at a time, each as far as it gets without the other."""

    def __init__(self, buffers):
        self.turn, self.barrier = threading.Lock(), threading.Barrier(2)
        memory = torch.full((2, buffers, 20, QWEN.hidden), torch.nan)
        self.memory, self.given = memory.expand(2, 2, 20, QWEN.hidden), {}

    def run(self, programs, work):
        """What each rank's work gives."""
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(self._run, rank, program, work) for rank, program in programs]
            return [rank.result(60) for rank in running]

    def _run(self, rank, program, work):
        threading.current_thread().name = f"rank {rank}"
        ends = torch.tensor([[part.data_ptr() for part in own] for own in self.memory])
        shared = Shared(self.memory[rank], tuple(ends.t().contiguous()), self.meet, self.memory)
        with self.turn:
            return work(rank, program, SimpleNamespace(tp="tp", tp_rank=rank, shared=shared))

    def meet(self):
        self.turn.release()
        self.barrier.wait(60)
        self.turn.acquire()

    def all_reduce(self, x, group):
        """Of what is not read in place."""
        x.copy_(sum(self._everyone(x)))

    def all_gather(self, pieces, x, group):
        for piece, given in zip(pieces, self._everyone(x), strict=True):
            piece.copy_(given)

    def get_world_size(self, group):
        return 2

    def _everyone(self, x):
        """What each rank gives, in their order."""
        self.given[threading.current_thread().name] = x.clone()
        self.meet()
        given = [self.given[name] for name in sorted(self.given)]
        self.meet()
        return given


@pytest.mark.parametrize("buffers", [2, 1])
def test_ranks_that_read_one_anothers_sums_compute_what_the_interpreter_does(
    buffers, tmp_path, monkeypatch
):
    """GPU kernels in Triton's interpreter. With one buffer, who is ahead spoils what others still read."""
    spec, few = dataclasses.replace(QWEN, num_layers=1), dataclasses.replace(TILES["sm_90"], sms=1)
    plan, files = schedule(spec, Layout(2, 1, 1), [1], target="cuda:sm_90", one_shot_rows=20)
    weights, ids = random_weights(spec), np.random.default_rng(1).integers(0, spec.vocab, 60)
    ranks, programs = Ranks(buffers), [load(spec, plan, files, few) for _ in range(2)]
    for program in programs:
        for module in (program, program.collectives):
            monkeypatch.setattr(module, "dist", ranks)

    def work(rank, program, comm):
        w = loaded(program, weights, tmp_path, rank, 2)
        return steps(program, w, plan, ids, comm)

    first, second = ranks.run(list(enumerate(programs)), work)
    chunk = Chunk(0, 0, tuple(map(int, ids)))
    expected = Interpreter(build(spec, "float32"), weights).run([chunk], range(60))
    if buffers == 1:
        assert np.abs(first - expected).max() > 1e-2 or np.abs(second - expected).max() > 1e-2
        return
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-4)


def random_weights(spec):
    rng = np.random.default_rng(0)
    return {
        name: (rng.normal(size=shape) * 0.1 + (len(shape) == 1)).astype(np.float32)
        for name, shape in spec.tensors().items()
    }


def load(spec, plan, files, tiles=None):
    """The program of a plan of one stage, with its kernels."""
    files = files | render_kernels(kernel_spec(spec, plan), tiles)
    contents = {path: text.encode() for path, text in files.items()}
    return ArtifactModules(Path("plan"), contents, ("",)).load("schedule.stage_0")


def loaded(program, weights, folder, rank=0, tp=1):
    """The weights as the runtime loads them, from a file in the type of the program."""
    dtype = getattr(torch, program.DTYPE)
    tensors = {name: torch.from_numpy(array).to(dtype) for name, array in weights.items()}
    save_file(tensors, folder / "model.safetensors")
    checkpoint, along = Checkpoint.open(folder), {"tp": (tp, rank), "tp_kvp": (tp, rank)}
    given = program.PARAMETERS, program.FIRST_LAYER, program.NUM_LAYERS
    return load_weights(checkpoint, *given, along, torch.device("cpu"))


@torch.inference_mode()
def steps(program, w, plan, ids, comm=ALONE):
    """The logits of 60 tokens: two chunks, and then decodes."""
    dtype = getattr(torch, program.KV_DTYPE)
    kv = [
        tuple(torch.zeros(program.KV_SHAPE, dtype=dtype) for _ in "kv")
        for _ in range(program.NUM_LAYERS)
    ]

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
        return program.step(w, kv, batch, comm)

    logits = [step(0, 17), step(17, 38), *(step(n, 1, decode=True) for n in range(55, 60))]
    return torch.cat(logits).float().numpy()
