"""Weights from a Hugging Face directory: safetensors only, each rank reading only its slices.

A role's PARAMETERS say which tensors it wants and how they are cut; `Checkpoint` knows, from the
files' headers alone and without torch, what is there.

A weight that is wanted as e4m3 (NAME, and NAME_scale with a scale for each of its rows) is read as such
where the checkpoint has it so, and is otherwise quantised: by the largest value of its whole row, however it
is cut.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from ...errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
FLOATS = ("F64", "F32", "F16", "BF16")
E4M3 = "F8_E4M3"
LARGEST = 448.0  # of e4m3
SCALE = "_scale"  # what a weight's name is followed by in that of its scales


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its bytes begin at `start` of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model directory, by name, read from the headers."""

    directory: Path
    tensors: Mapping[str, Stored]

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read index and headers. Missing, damaged or other than safetensors: BadInput."""
        if not directory.is_dir():
            raise BadInput(
                "no such directory of weights", where=directory, do="give a Hugging Face directory"
            )
        tensors: dict[str, Stored] = {}
        for file in _files(directory):
            tensors |= dict(_header(file))
        return cls(directory, tensors)

    def find(self, name: str, dtypes: Sequence[str] = FLOATS) -> Stored:
        """The tensor of that name; missing, or of another type than these: BadInput."""
        stored = self.tensors.get(name)
        if stored is None:
            raise BadInput(f"the tensor {name} is missing", where=self.directory, do=_OTHER)
        if stored.dtype not in dtypes:
            raise BadInput(
                f"the tensor {name} is {stored.dtype}",
                where=stored.file,
                do="plan with --quantization fp8 for such weights"
                if stored.dtype == E4M3
                else f"mnemoc reads {', '.join(dtypes)}",
            )
        return stored

    def quantises(self, name: str) -> bool:
        """Whether the scales of that name are those of a weight that is not stored as e4m3."""
        weight = self.tensors.get(name.removesuffix(SCALE))
        return name.endswith(SCALE) and weight is not None and weight.dtype in FLOATS


_OTHER = "these are not the weights of the planned model"


def load_weights(
    checkpoint: Checkpoint,
    parameters: Sequence[Mapping[str, Any]],
    first_layer: int,
    num_layers: int,
    along: Mapping[str, tuple[int, int]],
    device: torch.device,
) -> SimpleNamespace:
    """w.<name> for globals, w.layers[i].<name> for what each layer has (i from 0 in the stage).

    along: by axis, its degree and this rank's number along it
    """
    weights = SimpleNamespace(layers=[SimpleNamespace() for _ in range(num_layers)])
    with ExitStack() as stack:
        reader = _Reader(checkpoint, stack, along, device)
        for parameter in parameters:
            if parameter["per_layer"]:
                for i, layer in enumerate(weights.layers):
                    setattr(layer, parameter["name"], reader.read(parameter, first_layer + i))
            else:
                setattr(weights, parameter["name"], reader.read(parameter, None))
    return weights


def numpy_weights(directory: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Every tensor of a model directory, whole, in float32, without torch: for references."""
    import numpy as np

    checkpoint = Checkpoint.open(directory)
    weights = {}
    for name in checkpoint.tensors:
        stored = checkpoint.find(name, (*FLOATS, E4M3))
        dtypes = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", E4M3: "u1"}
        count = math.prod(stored.shape)
        raw = np.fromfile(stored.file, dtypes[stored.dtype], count, offset=stored.start)
        if stored.dtype == "BF16":  # the upper half of a float32
            raw = (raw.astype("<u4") << 16).view("<f4")
        if (
            stored.dtype == E4M3
        ):  # the upper byte of a float16, but for the sign's place and the exponent's bias
            bits = (raw.astype("<u2") & 0x80) << 8 | (raw.astype("<u2") & 0x7F) << 7
            raw = bits.view("<f2").astype("<f4") * 256
        weights[name] = raw.astype(np.float32).reshape(stored.shape)
    return weights


class _Reader:
    """Keeps the files open while a rank's parameters are read."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        stack: ExitStack,
        along: Mapping[str, tuple[int, int]],
        device: torch.device,
    ) -> None:
        self.checkpoint = checkpoint
        self.stack = stack
        self.along = along
        self.device = device
        self._open: dict[Path, Any] = {}
        self._scales: dict[tuple[str, int], torch.Tensor] = {}

    def read(self, parameter: Mapping[str, Any], layer: int | None) -> torch.Tensor:
        """One parameter of this rank: its piece of each source, one below the other."""
        import torch

        shape, dim, axis = tuple(parameter["shape"]), parameter["dim"], parameter["axis"]
        ranks, rank = self.along[axis] if axis else (1, 0)
        names = [source.format(layer=layer) for source in parameter["sources"]]
        dtype = getattr(torch, parameter["dtype"])
        sources = [
            _Source(name, self._stored(name, dtype), ranks // copies, rank // copies)
            for name, copies in zip(names, parameter["copies"], strict=True)
        ]
        _check(shape, dim, sources)
        out = torch.empty(shape, dtype=dtype, device=self.device)
        row = 0
        for source in sources:
            piece = self._piece(source, dim, dtype)
            out[row : row + piece.shape[0]].copy_(piece)
            row += piece.shape[0]
        return out

    def _stored(self, name: str, dtype: torch.dtype) -> Stored:
        """Where a source lies; of scales that are made here, as they would."""
        import torch

        if self.checkpoint.quantises(name):
            weight = self.checkpoint.find(name.removesuffix(SCALE))
            return dataclasses.replace(weight, shape=(*weight.shape[:1], 1))
        return self.checkpoint.find(
            name, (*FLOATS, E4M3) if dtype == torch.float8_e4m3fn else FLOATS
        )

    def _piece(self, source: _Source, dim: int | None, dtype: torch.dtype) -> torch.Tensor:
        import torch

        if self.checkpoint.quantises(source.name):
            return self._row_scales(source.name.removesuffix(SCALE), source.cut(dim, 0))
        tensor = self._file(source.stored.file).get_slice(source.name)
        cut = tuple(source.cut(dim, axis) for axis in range(len(source.stored.shape)))
        piece = cast("torch.Tensor", tensor[cut])
        if dtype == torch.float8_e4m3fn and source.stored.dtype != E4M3:
            return piece.to(self.device, torch.float32) / self._row_scales(source.name, cut[0])
        return piece

    def _row_scales(self, name: str, rows: slice) -> torch.Tensor:
        """Of a weight's rows, each by the largest of its values in all columns: float32 [rows, 1]."""
        import torch

        if (name, rows.start) not in self._scales:
            tensor = self._file(self.checkpoint.tensors[name].file).get_slice(name)
            most = tensor[rows].to(self.device, torch.float32).abs().amax(1, keepdim=True)
            self._scales[name, rows.start] = torch.where(most > 0, most, 1) / LARGEST
        return self._scales[name, rows.start]

    def _file(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._open:
            try:
                opened = safe_open(str(file), framework="pt")
            except (OSError, SafetensorError) as error:
                raise BadInput(f"cannot be read: {error}", where=file) from error
            self._open[file] = self.stack.enter_context(opened)
        return self._open[file]


@dataclass(frozen=True)
class _Source:
    """A tensor that a parameter is made from, the pieces that it is cut into, and which one is wanted."""

    name: str
    stored: Stored
    pieces: int
    piece: int

    def cut(self, dim: int | None, axis: int) -> slice:
        """What is wanted along an axis, where the source is cut along `dim`."""
        size = self.stored.shape[axis]
        if axis != dim:
            return slice(0, size)
        size //= self.pieces
        return slice(self.piece * size, (self.piece + 1) * size)


def _check(shape: tuple[int, ...], dim: int | None, sources: Sequence[_Source]) -> None:
    """A piece of each source along `dim`, put one below the other, must give `shape`."""
    rows = 0
    for source in sources:
        stored, pieces = source.stored, source.pieces
        cut = [pieces if axis == dim else 1 for axis in range(len(shape))]
        whole = [size * times for size, times in zip(shape, cut, strict=True)]
        alone = len(sources) == 1
        alike = len(stored.shape) == len(shape) and stored.shape[1:] == tuple(whole[1:])
        if not alike or stored.shape[0] % cut[0] or (alone and stored.shape[0] != whole[0]):
            want = ", ".join(map(str, whole if alone else ["…", *whole[1:]]))
            raise BadInput(
                f"{source.name} has shape {list(stored.shape)}, the plan wants [{want}]",
                where=stored.file,
                do=_OTHER,
            )
        rows += stored.shape[0] // cut[0]
    if rows != shape[0]:
        names = " + ".join(source.name for source in sources)
        raise BadInput(
            f"a rank's pieces of {names} have {rows} rows, the plan wants {shape[0]}",
            where=sources[0].stored.file,
            do=_OTHER,
        )


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.exists():
        if (directory / SINGLE).is_file():
            return [directory / SINGLE]
        found = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        raise BadInput(
            "no safetensors weights" + (f", only {found[0]}" if found else ""),
            where=directory,
            do=f"mnemoc reads {SINGLE} or {INDEX} with its shards",
        )
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput("not an index of safetensors shards", where=index) from error
    for shard in sorted(shards, key=str):
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise BadInput("a shard lies outside the directory", where=index, got=shard)
        if not (directory / shard).is_file():
            raise BadInput(f"the shard {shard} is missing", where=directory)
    return [directory / shard for shard in sorted(shards)]


def _header(file: Path) -> Iterator[tuple[str, Stored]]:
    """The tensors that a safetensors file says it holds; its length must agree."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError("header too long")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        end = 0
        for name, entry in header.items():
            shape = tuple(int(size) for size in entry["shape"])
            first, last = entry["data_offsets"]
            if math.prod(shape) and last <= first:
                raise ValueError("empty tensor")
            end = max(end, last)
            yield name, Stored(file, shape, str(entry["dtype"]), 8 + length + first)
        if file.stat().st_size != 8 + length + end:
            raise ValueError("cut short")
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", where=file) from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(
            "not a whole safetensors file", where=file, do="download it again"
        ) from error
