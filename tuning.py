"""Searches the tiles of kernels on a GPU: today's neighbours, timed side by side with it.

Each is timed on shapes that stand for all: long and short chunks, one long request and many, few rows and
many. What comes of it is a cluster file's [tiles], with which plans are compiled; nothing is tuned while one
serves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from triton.errors import TritonError

from .codegen.kernels import KernelSpec, render_kernels
from .codegen.tiles import Tiles
from .codegen.tuning import Candidate, best, fits, neighbours, specialised, today, with_candidate
from .runtime.loader import ArtifactModules
from .runtime.measuring.attending import Paged, Run, pages_of
from .runtime.measuring.rowing import Rows, RowShape
from .tiles import ATTENTION, MeasuredTiles

if TYPE_CHECKING:
    from .runtime.measuring.clocks import Race

AGREES = 2e-2
"""Relative difference of two 16-bit results of the same function: twice what each may err."""


@dataclass(frozen=True)
class Attended:
    """What attention is tried on: of each request, `rows` rows at the end of `lengths[i]` tokens."""

    heads: int
    kv_heads: int
    rows: int
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        of = f"{len(self.lengths)} × {self.lengths[0]}"
        return f"{self.heads} heads on {self.kv_heads}, {self.rows} of {of}"


@dataclass(frozen=True)
class Sizes:
    """What is tried. attention: by kernel; widths: by module of row-wise kernels; counts: of rows

    cold: bytes that no cache holds
    """

    attention: Mapping[str, tuple[Attended, ...]]
    widths: Mapping[str, tuple[int, ...]]
    counts: tuple[int, ...]
    cold: int


@dataclass(frozen=True)
class Trial:
    """One candidate on one shape. share: its time as one of today's; None where it does not run, and why."""

    of: str
    seconds: float | None
    share: float | None
    note: str | None = None


class Search:
    """spec: the head dim, the page size, the type and the target of all, and the heads that RoPE has."""

    def __init__(
        self, spec: KernelSpec, tiles: Tiles, sizes: Sizes, device: torch.device, race: Race
    ) -> None:
        self.spec, self.tiles, self.sizes = spec, tiles, sizes
        self.device, self.race = device, race
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self._loaders: dict[str, ArtifactModules] = {}
        self._paged: dict[tuple[int, int], Paged] = {}

    def candidates(self) -> list[Candidate]:
        """All neighbours of today's tiles, attention first."""
        head_dim, page = self.spec.head_dim, self.spec.page_size
        places = [(kernel, head_dim) for kernel in self.sizes.attention]
        places += [(module, width) for module, all_ in self.sizes.widths.items() for width in all_]
        return [
            candidate
            for module, width in places
            for candidate in neighbours(today(self.tiles, module, width, page), page)
        ]

    def trials(self, candidate: Candidate) -> list[Trial]:
        """A candidate beside today's tile, on all shapes that it is for."""
        found = []
        for of, calls in self._shapes(candidate):
            try:
                runs = {
                    "today": calls(self.tiles),
                    "candidate": calls(with_candidate(self.tiles, candidate)),
                }
                times = self.race(runs)
            except (TritonError, RuntimeError) as error:
                if "CUDA error" in str(error):
                    raise
                found.append(Trial(of, None, None, f"{type(error).__name__}: {error}"[:200]))
            else:
                spent_s = times["candidate"]
                found.append(Trial(of, spent_s, spent_s / times["today"]))
        return found

    def run_once(self, candidate: Candidate) -> None:
        """Compiles what `trials` times, and keeps it in Triton's cache."""
        for _, calls in self._shapes(candidate):
            calls(with_candidate(self.tiles, candidate))[0]()

    def fits(self, candidate: Candidate) -> bool:
        """See `codegen.tuning.fits`."""
        return fits(candidate, self.spec)

    def _shapes(
        self, candidate: Candidate
    ) -> Iterator[tuple[str, Callable[[Tiles], Sequence[Run]]]]:
        """What it is tried on, in words; a table → calls."""
        name, width = candidate.module, candidate.width
        if name in ATTENTION:
            for shape in self.sizes.attention[name]:
                yield str(shape), lambda tiles, shape=shape: self._attention(name, shape, tiles)  # type: ignore[misc]
        else:
            for rows in self.sizes.counts:
                yield (
                    f"{rows} rows of {width}",
                    lambda tiles, rows=rows: self._rows(name, width, rows, tiles),  # type: ignore[misc]
                )

    # ---------------------------------------------------------------------------------- attention

    def _attention(self, name: str, shape: Attended, tiles: Tiles) -> list[Run]:
        spec = dataclasses.replace(
            self.spec,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            merged_heads=shape.heads,
        )
        paged, page = self._cache(shape), spec.page_size
        module = self._load(spec, tiles, name)
        if tiles is not self.tiles:
            self._agree(name, spec, shape, paged, module)
        return paged.cold_calls(module, name, shape.rows, shape.lengths, page, self.sizes.cold)

    def _agree(
        self, name: str, spec: KernelSpec, shape: Attended, paged: Paged, module: ModuleType
    ) -> None:
        """RuntimeError if a candidate does not give what today's tile gives."""
        lengths = [min(shape.lengths[0], 8 * spec.page_size + shape.rows)]
        q, outs = paged.queries(shape.rows), []
        for one in (self._load(spec, self.tiles, name), module):
            run, out = paged.call(one, name, q, lengths, spec.page_size)
            run()
            outs.append(out.double())
        difference = float((outs[1] - outs[0]).norm() / outs[0].norm())
        if not difference <= AGREES:
            raise RuntimeError(f"it computes something else: a relative difference of {difference}")

    def _cache(self, shape: Attended) -> Paged:
        """Room for the longest that heads of a kind are tried on."""
        key = shape.heads, shape.kv_heads
        if key not in self._paged:
            page = self.spec.page_size
            own = [
                pages_of(one.lengths, page)
                for shapes in self.sizes.attention.values()
                for one in shapes
                if (one.heads, one.kv_heads) == key
            ]
            token = 2 * shape.kv_heads * self.spec.head_dim * self.dtype.itemsize
            tokens = page * max(*own, self.sizes.cold // (token * page))
            self._paged[key] = Paged(*key, self.spec.head_dim, tokens, self.device, self.dtype)
        return self._paged[key]

    # --------------------------------------------------------------------------------------- rows

    def _rows(self, name: str, width: int, rows: int, tiles: Tiles) -> list[Run]:
        spec = specialised(self.spec, name, width)
        shape = RowShape(
            spec.num_heads * spec.head_dim if name in ("rope_append", "merge") else width,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.page_size,
            spec.peers,
        )
        module = self._load(spec, tiles, name)
        return Rows(shape, rows, self.device, self.dtype).cold_calls(name, module, self.sizes.cold)

    def _load(self, spec: KernelSpec, tiles: Tiles, name: str) -> ModuleType:
        """A rendered module; the same text is loaded, and compiled, once."""
        contents = {path: text.encode() for path, text in render_kernels(spec, tiles).items()}
        loader = ArtifactModules(Path("tuning"), contents, ("kernels/",))
        loader = self._loaders.setdefault(loader.package, loader)
        return loader.load(f"kernels.{name}")


def refresh(
    search: Search, before: MeasuredTiles, progress: Callable[[float], None] = lambda share: None
) -> MeasuredTiles:
    """Times all candidates: what was measured before, with the best of them in place."""
    shares = {}
    candidates = search.candidates()
    with torch.inference_mode():
        for done, candidate in enumerate(candidates):
            shares[candidate] = [trial.share for trial in search.trials(candidate)]
            progress((done + 1) / len(candidates))
    return best(before, shares, search.fits)
