"""Degrees of the three axes, and which rank is where."""

from __future__ import annotations

from dataclasses import dataclass

FFN_MODES = ("repeated", "helix")


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
