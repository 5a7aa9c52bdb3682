"""What is generated: its text, its form, and what rendering needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mnemoc.codegen.kernels import _triton, render_kernels
from mnemoc.codegen.tiles import TILES, Tile
from mnemoc.errors import BadInput
from mnemoc.ir.ops.attention import SPLIT_ROWS

ROOT = Path(__file__).parents[2]
FP8 = {"fp8": True, "kv_dtype": "float8_e4m3fn"}


def specs(spec: Any) -> list[Any]:
    return [
        spec("cpu"),
        spec("cpu", heads=(2, 2), head_dim=32, qk_norm=True, attention_factor=1.5),
        spec("cuda:sm_90", heads=(32, 8), head_dim=128, page_size=64, dtype="bfloat16"),
        spec("cuda:sm_80", heads=(7, 1), qk_norm=True, sum_ranks=2),
        spec("cuda:sm_90", dtype="bfloat16", sizes=(3584, 18944), peers=3, sum_ranks=8, **FP8),
        spec("cuda:sm_100", dtype="bfloat16", qk_norm=True, **FP8),
        spec("cuda:sm_90", dtype="float16", kv_dtype="float8_e4m3fn", page_size=16),
    ]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_generated_text_is_as_it_was(
    name: str, spec: Any, golden: Callable[[str, str], None]
) -> None:
    a_spec = {
        "cpu": spec("cpu", head_dim=32, qk_norm=True),
        "cuda": spec("cuda:sm_90", heads=(32, 8), head_dim=128, page_size=64, dtype="bfloat16"),
    }[name]
    files = render_kernels(a_spec)
    golden(f"{name}.txt", "\n".join(f"==== {path}\n{text}" for path, text in files.items()))


def test_generated_files_are_clean_and_formatted(spec: Any, tmp_path: Path) -> None:
    for number, a_spec in enumerate(specs(spec)):
        for path, text in render_kernels(a_spec).items():
            file = tmp_path / str(number) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    config = ROOT / "pyproject.toml"
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(config), str(tmp_path)]
        done = subprocess.run(ruff, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_both_targets_have_the_same_doors(spec: Any) -> None:
    doors = {"attention_prefill", "attention_decode", "prepare", "pack", "merge", "rope_append"}
    doors |= {"rms_norm", "add_rms_norm", "rotary", "swiglu"}
    for qk_norm in (False, True):
        cpu, cuda = (
            _functions(render_kernels(spec(target, qk_norm=qk_norm)), doors)
            for target in ("cpu", "cuda:sm_90")
        )
        assert cpu.keys() == cuda.keys()
        assert {name for _, name in cpu} == doors
        for door, arguments in cpu.items():
            if not door[0].startswith("kernels/attention"):
                assert arguments == cuda[door], door
            assert len(arguments) == len(cuda[door])


def _functions(files: dict[str, str], names: set[str]) -> dict[tuple[str, str], list[str]]:
    return {
        (path, node.name): [argument.arg for argument in node.args.args]
        for path, text in files.items()
        if path.endswith(".py")
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name in names
    }


def test_rendering_loads_neither_torch_nor_triton() -> None:
    code = (
        "import sys\n"
        "from mnemoc.codegen.kernels import KernelSpec, render_kernels\n"
        "for target, dtype in ('cpu', 'float32'), ('cuda:sm_90', 'bfloat16'):\n"
        "    sizes = dict(hidden=64, num_heads=2, num_kv_heads=1, merged_heads=2, head_dim=32, ffn=64)\n"
        "    render_kernels(KernelSpec(target, dtype, **sizes, page_size=16, norm_eps=1e-5, qk_norm=False,\n"
        "                              inv_freq=(1.0,) * 16, attention_factor=1.0))\n"
        "sys.exit(bool({'torch', 'triton'} & sys.modules.keys()))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("arch", TILES)
def test_some_tile_serves_every_page_size_and_head_dim(arch: str, spec: Any) -> None:
    for choices in (TILES[arch].prefill, TILES[arch].decode):
        assert all(tiles[-1].serves(page_size=1) for tiles in choices.values())
    for head_dim in (16, 32, 64, 128):
        for page_size in (16, 48, 64, 128):
            for dtype in ("bfloat16", "float32"):
                a_spec = spec(f"cuda:{arch}", head_dim=head_dim, page_size=page_size, dtype=dtype)
                assert _triton(a_spec, None)["decode"]


@pytest.mark.parametrize("arch", TILES)
@pytest.mark.parametrize("heads", [(1, 1), (32, 8), (7, 1), (128, 8), (16, 1)])
def test_partial_results_stay_within_what_the_planner_counts(
    arch: str, heads: tuple[int, int], spec: Any
) -> None:
    values = _triton(spec(f"cuda:{arch}", heads=heads, head_dim=128, dtype="bfloat16"), None)
    prefill, decode = values["prefill"], values["decode"]
    lanes = prefill["slots"] * prefill["block_m"] + 2 * decode["grid"] * heads[0] // heads[1]
    assert lanes <= SPLIT_ROWS
    assert prefill["slots"] >= 3 * prefill["grid"]  # so that splits can fill three waves


def test_another_table_of_tiles_replaces_the_architectures_own(spec: Any) -> None:
    a_spec = spec("cuda:sm_90", heads=(32, 8), head_dim=128, page_size=64, dtype="bfloat16")
    tile = Tile(64, 32, 4, 5, programs=3)
    tiles = replace(TILES["sm_90"], sms=7, prefill={128: (tile,)})
    text = render_kernels(a_spec, tiles)["kernels/attention_prefill.py"]
    assert "BLOCK_M, BLOCK_N = tl.constexpr(64), tl.constexpr(32)" in text
    assert 'OPTIONS = {"num_warps": 4, "num_stages": 5}' in text
    assert "PROGRAMS = 21 " in text
    assert text != render_kernels(a_spec)["kernels/attention_prefill.py"]


def test_eight_bit_floats_are_refused_where_there_are_none(spec: Any) -> None:
    with pytest.raises(BadInput, match="no 8-bit floats"):
        render_kernels(spec("cuda:sm_80", dtype="bfloat16", kv_dtype="float8_e4m3fn"))


@pytest.mark.parametrize("head_dim", [96, 256])
def test_a_head_dim_without_a_cuda_kernel_is_refused(head_dim: int, spec: Any) -> None:
    with pytest.raises(BadInput, match=f"power of two up to 128.*got {head_dim}"):
        render_kernels(spec("cuda:sm_90", head_dim=head_dim))
    assert render_kernels(spec("cpu", head_dim=head_dim))


def test_an_architecture_without_kernels_is_refused(spec: Any) -> None:
    with pytest.raises(BadInput, match="cuda:sm_80, cuda:sm_90, cuda:sm_100 or cpu"):
        render_kernels(spec("cuda:sm_75"))
