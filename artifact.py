"""The contract between compile time and run time: what a plan says, and what its folder holds.

The planner makes a `Plan`, codegen turns it into a folder, the runtime reads it back; none of the
three imports another. Everything here is frozen data, plus writing and verifying the folder.

    manifest.json     format version, model, cluster, workload, plan, sha256 of every other file,
                      and a digest of itself
    ir/  kernels/  schedule/  cost.py  report.html  launch/

`schedule/<role>.py` is called once per micro-batch as `step(w, kv, batch, comm)`; `microbatch` has what it
receives.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .codec import from_json, to_json
from .errors import BadInput

FORMAT = 6
MANIFEST = "manifest.json"


# ---------------------------------------------------------------------------------------- the plan


FFN_MODES = ("repeated", "helix")
CONTIGUOUS = "contiguous"
"""In place of a stripe's tokens: a request's KV cache is cut once, into one run of tokens per group."""

NEVER_HALVED = "off"
"""In place of the rows from which chunks go through layers in two halves."""

NCCL = "nccl"
"""In place of what pays: every sum over tensor-parallel ranks is NCCL's."""

LENT = 32
"""What computes beside messages leaves one of so many multiprocessors to them. (NCCL's kernels need places of
their own at once: behind a grid that holds all places until it ends, nothing would travel meanwhile.)"""


@dataclass(frozen=True)
class Layout:
    """Degrees of the three axes. World = spp × kvp × tp ranks, tp innermost, spp outermost.

    ffn: what becomes of the output projection and the FFN, one of FFN_MODES: "repeated" in each KVP group, or
    cut over all tp × kvp ranks of a stage ("helix"), for which every group computes every row.
    """

    tp: int
    spp: int
    kvp: int
    ffn: str = "repeated"

    @property
    def gpus(self) -> int:
        return self.tp * self.spp * self.kvp

    def rank(self, stage: int, group: int, tp_rank: int) -> int:
        return (stage * self.kvp + group) * self.tp + tp_rank

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """rank → (stage, group, tp_rank)."""
        return rank // (self.kvp * self.tp), rank // self.tp % self.kvp, rank % self.tp

    @property
    def helix(self) -> bool:
        return self.ffn == "helix"

    def along(self, axis: str, rank: int) -> tuple[int, int]:
        """The degree of an axis of the IR, "tp" or "tp_kvp", and the rank's number along it."""
        _, group, tp_rank = self.coordinates(rank)
        if axis == "tp":
            return self.tp, tp_rank
        return self.tp * self.kvp, tp_rank * self.kvp + group

    def __str__(self) -> str:
        ffn = f" ffn={self.ffn}" if self.helix else ""
        return f"tp={self.tp} spp={self.spp} kvp={self.kvp}{ffn}"


FP8 = "fp8"
PRECISIONS = ("auto", FP8)


@dataclass(frozen=True)
class Precision:
    """What is kept in fewer bits than the model's own: each of PRECISIONS, "auto" being the plan's dtype.

    weights:  "fp8": the products of the layers are of e4m3 by e4m3 (W8A8), weights with a scale per output
              channel, rows with one per token; embedding, norms and head stay as they are
    kv_cache: "fp8": keys and values are kept as e4m3, without scales; attention computes as ever
    """

    weights: str = "auto"
    kv_cache: str = "auto"

    @property
    def fp8(self) -> bool:
        """Whether anything is."""
        return FP8 in (self.weights, self.kv_cache)


AUTO = Precision()


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: a slice of the program; `role` names its file in schedule/."""

    role: str
    first_layer: int
    num_layers: int


@dataclass(frozen=True)
class ChunkRule:
    """For `start <= n < end` cached tokens: prefill in chunks of `chunk` tokens, on `groups` groups.

    iteration_s: predicted time from one chunk to the next at the bucket's end, in a full pipeline.
    """

    start: int
    end: int
    chunk: int
    groups: int
    iteration_s: float


@dataclass(frozen=True)
class Prediction:
    """Predicted figures; `*_parts_s` add up to the whole (linear, attention, communication, …)."""

    ttft_s: float
    tbt_s: float
    throughput_tokens_per_s: float
    ttft_parts_s: Mapping[str, float]
    tbt_parts_s: Mapping[str, float]


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank: what the promise needs, for the micro-batch that needs most, and then room.

    activation: rows as they go through the program; workspace: of kernels, page tables and token ids;
    communication: what is sent and received, and the library's own buffers; reserve: left to the device's
    context and the allocator; capacity: the device's, reserve and all
    step: that micro-batch, in words
    room: what is left serves more than was promised: KV pages beyond the promise's, and beyond its step what
    `max_rows` rows need, with the ids and page tables of further requests
    """

    weights_bytes: int
    kv_bytes: int
    activation_bytes: int
    workspace_bytes: int
    communication_bytes: int
    reserve_bytes: int
    capacity_bytes: int
    step: str
    room_kv_bytes: int = 0
    room_step_bytes: int = 0

    @property
    def parts(self) -> Mapping[str, int]:
        """What the promise needs, by name."""
        return {
            "weights": self.weights_bytes,
            "kv": self.kv_bytes,
            "activation": self.activation_bytes,
            "workspace": self.workspace_bytes,
            "communication": self.communication_bytes,
            "reserve": self.reserve_bytes,
        }

    @property
    def promised_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def room_bytes(self) -> int:
        return self.room_kv_bytes + self.room_step_bytes

    @property
    def used_bytes(self) -> int:
        return self.promised_bytes + self.room_bytes

    @property
    def fits(self) -> bool:
        return self.used_bytes <= self.capacity_bytes


@dataclass(frozen=True)
class Optimality:
    """What the solver proved. objective and bound are in the unit that `minimised` names."""

    minimised: str
    objective: float
    bound: float
    gap: float


@dataclass(frozen=True)
class Alternative:
    """Another layout, with what it would give; `reason` says why it was not chosen."""

    layout: Layout
    gpus: int
    ttft_s: float
    tbt_s: float
    reason: str


@dataclass(frozen=True)
class Point:
    """A plan in few figures. tbt_s: the least TBT promise that it keeps, beside a prefill too."""

    layout: Layout
    gpus: int
    ttft_s: float
    tbt_s: float


@dataclass(frozen=True)
class Marginal:
    """The question solved again with one figure moved: what the objective becomes.

    change: the figure that moved: "node", "device" (of a single machine), "ttft" or "tbt"
    gpus, ttft_s, tbt_s: what was asked; ttft_s is None where TTFT is what more devices are to buy
    minimised: what `before` (in the plan) and `objective` (now) are figures of, as in `Optimality`
    point: the plan that reaches it; both are None if no plan keeps what was asked
    """

    change: str
    gpus: int
    ttft_s: float | None
    tbt_s: float
    minimised: str
    before: float
    objective: float | None
    point: Point | None


@dataclass(frozen=True)
class Frontier:
    """GPUs × TTFT × TBT: for each TBT promise asked, the least TTFT of every number of GPUs.

    points: by GPUs, then TTFT; none is as good as another in all three. Each is the exact optimum for its
    GPUs and some promise of `tbt_s`; one that is less than `step` faster than one on fewer GPUs is left out.
    """

    tbt_s: tuple[float, ...]
    step: float
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Relaxation:
    """A promise near the one asked that some plan keeps. relaxed: of "ttft", "tbt", "nodes"."""

    relaxed: tuple[str, ...]
    layout: Layout
    nodes: int
    gpus: int
    ttft_s: float
    tbt_s: float


@dataclass(frozen=True)
class Workload:
    """The promise: what is to be served and how quickly. Counts in tokens, times in seconds."""

    context: int
    ttft_s: float
    tbt_s: float
    output_tokens: int = 256
    concurrency: int = 1
    objective: str = "gpus"


@dataclass(frozen=True)
class Plan:
    """What the planner decided.

    page_size: tokens per KV page; num_pages: pages per rank and layer: all that memory has room for.
    host_pages: KV pages that a rank's share of host memory keeps; 0: none
    stripe_tokens: KVP growth: a request's tokens are dealt to its groups in stripes of so many, so it takes
        on its next group after each, until all have joined.
    max_batch: sequences that may decode together: at least those promised.
    max_rows: the most rows of a micro-batch for which memory was counted, those of a KVP group; of them
        max_batch + 1 may want logits.
    overlap_rows: chunks of at least so many rows that are on several KVP groups go through layers in two
        halves, so that one's partial results travel while the other is computed; 0: none do
    one_shot_rows: sums over tp of at most so many rows are made by the kernel that reads them next, an add or
        an add and norm, from the peers' memory; NCCL makes all others
    precision: what is not kept as dtype; eager: kernels are launched one by one, not by CUDA graphs.
    binding: the constraint without which the objective would be better: a name of the program, or "none".
    marginals, frontier: what else could be had and at what price; the frontier only where asked for.
    """

    target: str
    dtype: str
    layout: Layout
    stages: tuple[Stage, ...]
    chunks: tuple[ChunkRule, ...]
    page_size: int
    num_pages: int
    stripe_tokens: int
    max_batch: int
    max_rows: int
    predicted: Prediction
    memory: Memory
    optimality: Optimality
    binding: str
    alternatives: tuple[Alternative, ...]
    marginals: tuple[Marginal, ...] = ()
    frontier: Frontier | None = None
    notes: tuple[str, ...] = ()
    precision: Precision = AUTO
    eager: bool = False
    host_pages: int = 0
    overlap_rows: int = 0
    one_shot_rows: int = 0

    @property
    def gpus(self) -> int:
        return self.layout.gpus

    @property
    def promised_pages(self) -> int:
        """Of num_pages, those that the promised requests fill."""
        held = self.memory
        return self.num_pages * held.kv_bytes // max(1, held.kv_bytes + held.room_kv_bytes)

    def chunk_at(self, cached: int) -> int:
        """Planned chunk size for a prompt of which `cached` tokens are done."""
        for rule in self.chunks:
            if cached < rule.end:
                return rule.chunk
        return self.chunks[-1].chunk


@dataclass(frozen=True)
class Manifest:
    """manifest.json. `files` maps each other file, by relative path, to its sha256."""

    model: Mapping[str, Any]
    cluster: Mapping[str, Any]
    workload: Workload
    plan: Plan
    files: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT
    mnemoc: str = "0.1.0"


# -------------------------------------------------------------------- the folder: write and verify


def write(directory: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
    """Write an artifact folder: aside first, then renamed, so that nothing half-written is left.

    An existing artifact is replaced; any other existing non-empty folder is refused.
    Returns the manifest with the hashes of `files` filled in.
    """
    refuse_if_taken(directory)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    manifest = dataclasses.replace(manifest, files=hashes)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise BadInput(f"cannot write: {error.strerror}", where=directory) from error
    try:
        for name, data in {**files, MANIFEST: _seal(manifest)}.items():
            path = aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(0o755 if name.endswith(".sh") else 0o644)
        aside.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(aside, directory)
    except OSError as error:
        raise BadInput(f"cannot write: {error.strerror}", where=directory) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def refuse_if_taken(directory: Path) -> None:
    """BadInput if something lies there that is neither a plan nor an empty folder."""
    if not directory.exists():
        return
    if not directory.is_dir() or (not (directory / MANIFEST).exists() and any(directory.iterdir())):
        raise BadInput(
            "the output folder exists and is not a plan", where=directory, do="choose another -o"
        )


def load(directory: Path) -> tuple[Manifest, dict[str, bytes]]:
    """Read an artifact and check every byte of it against its manifest. Executes nothing.

    Returns the manifest and the verified contents of each file, by relative path: run these bytes,
    not the files, which may change after the check.
    """
    path = directory / MANIFEST
    try:
        sealed = path.read_bytes()
    except OSError as error:
        raise BadInput(
            "not a plan: no readable manifest.json",
            where=directory,
            do="make one with `mnemoc plan MODEL ... -o DIR`",
        ) from error
    manifest = _unseal(sealed, path)
    present = {str(p.relative_to(directory)) for p in directory.rglob("*") if not p.is_dir()}
    if extra := sorted(present - manifest.files.keys() - {MANIFEST}):
        raise BadInput(
            "a file that the manifest does not list", where=directory / extra[0], do=_REPLAN
        )
    contents = {}
    for name, digest in manifest.files.items():
        if name not in present:
            raise BadInput("the file is missing from the plan", where=directory / name, do=_REPLAN)
        contents[name] = (directory / name).read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise BadInput("changed since it was planned", where=directory / name, do=_REPLAN)
    return manifest, contents


_REPLAN = "the plan cannot be trusted: make it again with `mnemoc plan`"


def _seal(manifest: Manifest) -> bytes:
    body = to_json(manifest)
    digest = hashlib.sha256(_dump(body)).hexdigest()
    return _dump({**body, "digest": digest})


def _unseal(sealed: bytes, path: Path) -> Manifest:
    try:
        body = json.loads(sealed)
    except ValueError as error:
        raise BadInput("not valid JSON", where=path, do=_REPLAN) from error
    if not isinstance(body, dict) or "format" not in body:
        raise BadInput("not a mnemoc manifest", where=path, do=_REPLAN)
    if body["format"] != FORMAT:
        raise BadInput(
            f"format {body['format']!r} of the plan is not format {FORMAT}, which this mnemoc reads",
            where=path,
            do="plan again with this version of mnemoc",
        )
    digest = body.pop("digest", None)
    dumped = _dump(body)
    if digest != hashlib.sha256(dumped).hexdigest() or _dump({**body, "digest": digest}) != sealed:
        raise BadInput("changed since it was planned", where=path, do=_REPLAN)
    return from_json(Manifest, body, str(path))


def _dump(body: Any) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
