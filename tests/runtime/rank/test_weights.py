"""Weights: each rank its slices, from one file or many, in the plan's dtype; or one sentence."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mnemoc.errors import BadInput
from mnemoc.ir.ops.e4m3 import scaled
from mnemoc.layout import Layout
from mnemoc.runtime.rank.weights import Checkpoint, load_weights, numpy_weights
from safetensors.torch import save_file

TENSORS = {
    "embed": torch.arange(48.0).reshape(8, 6),
    "layers.0.q": torch.arange(24.0).reshape(4, 6),
    "layers.0.k": torch.arange(12.0).reshape(2, 6) + 100,
    "layers.1.q": torch.arange(24.0).reshape(4, 6) + 200,
    "layers.1.k": torch.arange(12.0).reshape(2, 6) + 300,
    "layers.0.o": torch.arange(24.0).reshape(6, 4),
    "layers.1.o": torch.arange(24.0).reshape(6, 4) + 50,
    "norm": torch.arange(6.0),
}


def parameter(
    name: str,
    shape: tuple[int, ...],
    *sources: str,
    dim: int | None,
    axis: str = "tp",
    copies: Sequence[int] = (),
) -> dict[str, Any]:
    return {
        "axis": None if dim is None else axis,
        "copies": copies or (1,) * len(sources),
        "name": name,
        "per_layer": "{layer}" in sources[0],
        "shape": shape,
        "dtype": "float32",
        "sources": sources,
        "dim": dim,
    }


PARAMETERS = (
    parameter("embedding", (4, 6), "embed", dim=0),
    parameter("qk", (3, 6), "layers.{layer}.q", "layers.{layer}.k", dim=0),
    parameter("o", (6, 2), "layers.{layer}.o", dim=1),
    parameter("norm", (6,), "norm", dim=None),
)


def write_single(directory: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    return directory


def write_shards(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items()):
        file = f"model-{number}.safetensors"
        save_file({name: tensor}, directory / file)
        weight_map[name] = file
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def load(directory: Path, tp_rank: int = 1, first: int = 0, num: int = 2) -> Any:
    checkpoint = Checkpoint.open(directory)
    along = {"tp": (2, tp_rank)}
    return load_weights(checkpoint, PARAMETERS, first, num, along, torch.device("cpu"))


@pytest.mark.parametrize("write", [write_single, write_shards])
def test_a_rank_gets_its_piece_of_each_source_joined(tmp_path: Path, write: Any) -> None:
    w = load(write(tmp_path), tp_rank=1)
    assert torch.equal(w.embedding, TENSORS["embed"][4:])
    for i, layer in enumerate(w.layers):
        q, k = TENSORS[f"layers.{i}.q"], TENSORS[f"layers.{i}.k"]
        assert torch.equal(layer.qk, torch.cat([q[2:], k[1:]]))
        assert torch.equal(layer.o, TENSORS[f"layers.{i}.o"][:, 2:])
    assert torch.equal(w.norm, TENSORS["norm"])


def test_neighbouring_ranks_get_the_same_piece_of_what_is_copied(tmp_path: Path) -> None:
    """Two KV heads on four ranks, beside four query heads."""
    checkpoint = Checkpoint.open(write_single(tmp_path))
    sources = ("layers.{layer}.q", "layers.{layer}.k")
    qk = parameter("qk", (2, 6), *sources, dim=0, copies=(1, 2))
    for rank in range(4):
        w = load_weights(checkpoint, (qk,), 0, 1, {"tp": (4, rank)}, torch.device("cpu"))
        q, k = TENSORS["layers.0.q"], TENSORS["layers.0.k"]
        assert torch.equal(w.layers[0].qk, torch.cat([q[rank : rank + 1], k[rank // 2][None]]))


def test_what_helix_cuts_is_cut_over_both_axes(tmp_path: Path) -> None:
    layout = Layout(tp=2, spp=1, kvp=2, ffn="helix")
    checkpoint = Checkpoint.open(write_single(tmp_path))
    o = parameter("o", (6, 1), "layers.{layer}.o", dim=1, axis="tp_kvp")
    k = parameter("k", (1, 6), "layers.{layer}.k", dim=0)
    column = {}
    for rank in range(4):
        along = {axis: layout.along(axis, rank) for axis in ("tp", "tp_kvp")}
        w = load_weights(checkpoint, (o, k), 0, 1, along, torch.device("cpu"))
        _, group, tp_rank = layout.coordinates(rank)
        column[group, tp_rank] = TENSORS["layers.0.o"].T.tolist().index(w.layers[0].o.T[0].tolist())
        assert torch.equal(w.layers[0].k[0], TENSORS["layers.0.k"][tp_rank])
    assert column == {(0, 0): 0, (1, 0): 1, (0, 1): 2, (1, 1): 3}


def test_a_stage_gets_its_own_layers(tmp_path: Path) -> None:
    w = load(write_single(tmp_path), tp_rank=0, first=1, num=1)
    assert len(w.layers) == 1
    assert torch.equal(w.layers[0].o, TENSORS["layers.1.o"][:, :2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_converted_to_the_plans_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    write_single(tmp_path, {name: tensor.to(dtype) for name, tensor in TENSORS.items()})
    w = load(tmp_path)
    assert w.norm.dtype == torch.float32
    assert torch.equal(w.layers[1].o, TENSORS["layers.1.o"][:, 2:].to(dtype).float())
    whole = numpy_weights(tmp_path)
    for name, tensor in TENSORS.items():
        assert np.array_equal(whole[name], tensor.to(dtype).float().numpy())


def bad_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 20) + b"{not json}" + b" " * 10)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def no_safetensors(file: Path) -> None:
    file.rename(file.with_name("pytorch_model.bin"))


def endless_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 2**63) + b"{}")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (bad_header, "not a whole safetensors file"),
        (cut_short, "not a whole safetensors file"),
        (endless_header, "not a whole safetensors file"),
        (no_safetensors, "no safetensors weights, only pytorch_model.bin"),
        (Path.unlink, "no safetensors weights"),
    ],
)
def test_a_damaged_or_missing_file_is_bad_input(tmp_path: Path, damage: Any, says: str) -> None:
    damage(write_single(tmp_path) / "model.safetensors")
    with pytest.raises(BadInput, match=says):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("{", "not an index"),
        ("{}", "not an index"),
        ('{"weight_map": {"embed": "../x.safetensors"}}', "outside the directory"),
        (
            '{"weight_map": {"embed": "model-9.safetensors"}}',
            "shard model-9.safetensors is missing",
        ),
    ],
)
def test_a_bad_index_is_bad_input(tmp_path: Path, index: str, says: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BadInput, match=says):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("norm", None, "the tensor norm is missing"),
        ("norm", torch.zeros(7), r"norm has shape \[7\], the plan wants \[6\]"),
        ("embed", torch.zeros(9, 6), r"embed has shape \[9, 6\], the plan wants \[8, 6\]"),
        ("layers.0.q", torch.zeros(4, 5), r"layers.0.q has shape \[4, 5\].*\[…, 6\]"),
        ("layers.0.k", torch.zeros(4, 6), r"layers.0.q \+ layers.0.k have 4 rows.*wants 3"),
        ("layers.0.o", torch.zeros(6, 2), r"layers.0.o has shape \[6, 2\].*\[6, 4\]"),
        ("norm", torch.zeros(6, dtype=torch.int64), "the tensor norm is I64"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, says: str
) -> None:
    tensors = {key: value for key, value in TENSORS.items() if key != name}
    write_single(tmp_path, tensors | ({} if tensor is None else {name: tensor}))
    with pytest.raises(BadInput, match=says):
        load(tmp_path)


FP8 = (  # a weight cut by rows, of two sources; and one cut by columns, whose scales are of whole rows
    {**parameter("qk", (3, 6), "layers.0.q", "layers.0.k", dim=0), "dtype": "float8_e4m3fn"},
    parameter("qk_scale", (3, 1), "layers.0.q_scale", "layers.0.k_scale", dim=0),
    {**parameter("o", (6, 2), "layers.0.o", dim=1), "dtype": "float8_e4m3fn"},
    parameter("o_scale", (6, 1), "layers.0.o_scale", dim=None),
)


@pytest.mark.parametrize("tp_rank", [0, 1])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_weights_in_fp8_are_read_or_made_alike_on_all_ranks(
    tmp_path: Path, tp_rank: int, stored: torch.dtype
) -> None:
    torch.manual_seed(0)
    tensors, given, scales = {}, {}, {}
    for name in ("layers.0.q", "layers.0.k", "layers.0.o"):
        tensors[name] = torch.randn(TENSORS[name].shape).bfloat16().float()
        tensors[name][-1] = 0
        values, scale = (torch.from_numpy(x) for x in scaled(tensors[name].numpy()))
        given[name], scales[name] = values.to(torch.float8_e4m3fn), scale.float()
    kept = {name: tensor.to(stored) for name, tensor in tensors.items()}
    if stored == torch.float8_e4m3fn:
        kept = given | {f"{name}_scale": scale for name, scale in scales.items()}
    checkpoint = Checkpoint.open(write_single(tmp_path, kept))
    w = load_weights(checkpoint, FP8, 0, 1, {"tp": (2, tp_rank)}, torch.device("cpu"))
    q, k = (slice(tp_rank * n, (tp_rank + 1) * n) for n in (2, 1))
    column = slice(tp_rank * 2, (tp_rank + 1) * 2)
    for found, parts, cuts in ((w.qk, given, True), (w.qk_scale, scales, False)):
        expected = torch.cat([parts["layers.0.q"][q], parts["layers.0.k"][k]])
        assert found.dtype == (torch.float8_e4m3fn if cuts else torch.float32)
        assert torch.equal(found.float(), expected.float())
    assert torch.equal(w.o.float(), given["layers.0.o"][:, column].float())
    assert torch.equal(w.o_scale, scales["layers.0.o"])
    whole = numpy_weights(tmp_path)
    assert np.array_equal(whole["layers.0.q"], kept["layers.0.q"].float().numpy())


def test_weights_in_fp8_without_scales_or_for_another_plan_are_refused(tmp_path: Path) -> None:
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in TENSORS.items()}
    checkpoint = Checkpoint.open(write_single(tmp_path, tensors))
    with pytest.raises(BadInput, match=r"layers\.0\.q_scale is missing"):
        load_weights(checkpoint, FP8, 0, 1, {"tp": (2, 0)}, torch.device("cpu"))
    with pytest.raises(BadInput, match=r"is F8_E4M3.*--quantization fp8"):
        load(tmp_path)
