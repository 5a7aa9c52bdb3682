"""The pages of one KVP group: free, read, waiting to be found again, or copied to host memory. Pure integers.

A page is free, or belongs to one admission that fills it, or is a *block*: filled to the end and known by the
hash of its tokens and of all before them (`prefix`). Blocks are counted by those who read them; once nobody
does they are idle, and serve whoever comes with the same prefix until their page is needed. Of idle blocks
the one idle for longest goes first, and of one request's the last tokens before the first ones, so that
what is left is a prefix. It goes to a host slot if somebody has come for it before, or waits to (whom it
was taken from), and where it is quicker to read back than to compute again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..protocol.messages import Run
from .pool import PagePool

Key = tuple[int, bytes]
"""A block: its request's home, and its hash."""


@dataclass(eq=False, slots=True)
class Block:
    """A filled page that can be found again, by its key. depth: tokens before it; readers: admissions that
    hold it.

    wanted: whether it was found before, or somebody waits who will want it
    """

    key: Key
    page: int
    depth: int
    readers: int = 1
    wanted: bool = False


class Group:
    """pool: its free pages; blocks: by home, then by hash; idle: those without readers, the first to go
    first; host: key → slot; slots: free ones"""

    def __init__(
        self, number: int, groups: int, num_pages: int, host_pages: int, swap_from: int | None
    ) -> None:
        """groups: how many there are, each some requests' home
        swap_from: tokens before a block from which on it is quicker to read back than to compute again;
        None: never"""
        self.number = number
        self.pool = PagePool(num_pages)
        self.blocks: list[dict[bytes, Block]] = [{} for _ in range(groups)]
        self.idle: OrderedDict[Block, None] = OrderedDict()
        self.host: OrderedDict[Key, int] = OrderedDict()
        self.slots = list(range(host_pages - 1, -1, -1))
        self._num_pages, self._host_pages, self._swap_from = num_pages, host_pages, swap_from

    @property
    def available(self) -> int:
        """Pages that can be had: free ones, and those of idle blocks."""
        return self.pool.num_free + len(self.idle)

    def take(self, count: int) -> tuple[tuple[Run, ...], list[tuple[int, int]]]:
        """Pages, of idle blocks where none are free, and what of those is to be copied: page and slot."""
        leaving: list[tuple[int, int]] = []
        while self.pool.num_free < count:
            block, _ = self.idle.popitem(last=False)
            home, digest = block.key
            del self.blocks[home][digest]
            slot = self._slot(block)
            if slot is not None:
                self.host[block.key] = slot
                leaving.append((block.page, slot))
            self.pool.give(block.page, 1)
        return self.pool.take(count), leaving

    def _slot(self, block: Block) -> int | None:
        """Where on the host an evicted block goes, if it is worth it; at need in the oldest one's place."""
        if self._swap_from is None or block.depth < self._swap_from or not block.wanted:
            return None
        if self.slots:
            return self.slots.pop()
        return self.host.popitem(last=False)[1] if self.host else None

    def audit(self, readers: Mapping[Block, int], private: Sequence[int]) -> None:
        """Assert that all fits together. readers: of each block, counted anew; private: pages of admissions
        that are no blocks"""
        known = {block: key for key, block in self._by_key()}
        assert readers.keys() <= known.keys(), "what is read is a block"
        for block, key in known.items():
            assert block.key == key, "a block is found by its key"
            assert block.readers == readers.get(block, 0), "a block counts its readers"
            assert (block in self.idle) == (not block.readers), "idle is who has no readers"
            assert key not in self.host, "a block is here or on the host"
        used = [*(block.page for block in known), *private]
        assert len(set(used)) == len(used), "a page belongs to one"
        assert len(used) + self.pool.num_free == self._num_pages, "no page is lost"
        slots = [*self.slots, *self.host.values()]
        assert sorted(slots) == list(range(self._host_pages)), "no slot is lost"

    def _by_key(self) -> Iterator[tuple[Key, Block]]:
        for home, blocks in enumerate(self.blocks):
            for digest, block in blocks.items():
                yield (home, digest), block
