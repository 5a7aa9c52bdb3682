"""KV pages of every group: who holds which, and which can be found again (`blocks`). Pure integers.

A page that is given back may be given away at once, though micro-batches that read or write it are still on
their way: it is one group's, whose ranks alone touch it, and they carry out steps in the order in which they
were sent, copies and those without rows of theirs included. That other groups are ahead or behind changes
nothing.

Tokens lie in shards (`growth`), so a block is one of its request's home group: another request finds it only
at the same home. The engine alone decides; workers are told of pages, once.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from ..protocol.messages import Copies, MorePages, Run
from .blocks import Block, Group, Key
from .growth import Growth
from .job import Admitted, Change
from .pool import runs_of

TIDIED = 1024
"""Blocks of requests that have left, looked at in one go: about a millisecond's work."""


@dataclass(eq=False)
class _Held:
    """What an admission holds. pages: by shard, in order; hashes: of the first ones, that are blocks."""

    home: int
    pages: list[list[int]]
    hashes: list[bytes] = field(default_factory=list)


class PageBook:
    """All groups' pages.

    swap_from: tokens before a block from which on it is quicker to read back from the host than to compute
        again; None: never
    changes: what workers have to be told, in order; whoever sends it clears it
    """

    def __init__(
        self,
        growth: Growth,
        num_pages: int,
        page_size: int,
        host_pages: int = 0,
        swap_from: int | None = None,
    ) -> None:
        self.growth = growth
        self.num_pages = num_pages
        self.page_size = page_size
        self.shares = growth.kvp == 1 or growth.stripe_tokens % page_size == 0
        self.changes: list[Change] = []
        self.swapped_out = self.swapped_in = 0
        self._group = partial(Group, num_pages, host_pages, swap_from)
        self._groups = [self._group() for _ in range(growth.kvp)]
        self._held: dict[int, _Held] = {}
        self._leaving: deque[tuple[_Held, bool]] = deque()  # with no pages but their blocks'

    # ---------------------------------------------------------------------------------- what fits

    def needs(self, tokens: int) -> list[int]:
        """Pages of each shard of a request that holds `tokens` tokens."""
        shards = range(self.growth.shards(tokens))
        return [-(-self.growth.held(shard, tokens) // self.page_size) for shard in shards]

    def found(self, home: int, hashes: Sequence[bytes], most: int) -> int:
        """How many of a prefix's first `most` pages are there, on device or host, for a request at this
        home."""
        if not self.shares:
            return 0
        count = 0
        for number, key in self._keys(home, hashes, most):
            group = self._groups[number]
            if key not in group.blocks and key not in group.host:
                break
            count += 1
        return count

    def fits(
        self, home: int, tokens: int, hashes: Sequence[bytes] = (), found: int = 0, spare: int = 0
    ) -> bool:
        """Whether a request that finds the first so many blocks could have room for `tokens` tokens now.

        spare: pages that are to be left on each of its groups
        """
        wanted = self._wanted(home, tokens)
        for number, key in self._keys(home, hashes, found):
            block = self._groups[number].blocks.get(key)
            if block is not None and block.readers:  # an idle one's page must be had like any other
                wanted[number] -= 1
        return all(self.available(number) >= count + spare for number, count in wanted.items())

    def available(self, group: int) -> int:
        return self._groups[group].available

    @property
    def used_fraction(self) -> float:
        """Of all pages, those that running requests hold."""
        total = self.num_pages * len(self._groups)
        return 1 - sum(group.available for group in self._groups) / total if total else 0.0

    def counts(self) -> list[tuple[int, int, int, int]]:
        """Of each group: its pages, those that requests hold, idle blocks, and blocks on the host. From any
        thread."""
        return [
            (self.num_pages, self.num_pages - group.available, len(group.idle), len(group.host))
            for group in self._groups
        ]

    # ------------------------------------------------------------------------- taking and giving

    def admit(
        self, sid: int, home: int, tokens: int, hashes: Sequence[bytes] = ()
    ) -> tuple[tuple[Run, ...], ...]:
        """Reserve pages for `tokens` tokens, all or nothing: the first are the blocks named, which are there.

        Returns the runs of each group. The caller has asked `fits`.
        """
        held = _Held(home, [[] for _ in range(self.growth.kvp)], list(hashes))
        keys = list(self._keys(home, hashes))
        away: list[
            tuple[int, Key, int, int]
        ] = []  # depth, key, group and slot of what is on the host
        for index, (number, key) in enumerate(keys):
            group = self._groups[number]
            if (block := group.blocks.get(key)) is None:
                away.append((index * self.page_size, key, number, group.host.pop(key)))
            else:
                if not block.readers:
                    del group.idle[key]
                block.readers += 1
                block.wanted = True
        self._read_back(away)
        for index, (number, key) in enumerate(keys):
            shard = self.growth.owner(index * self.page_size)
            held.pages[shard].append(self._groups[number].blocks[key].page)
        for shard, count in enumerate(self.needs(tokens)):
            self._add(held, shard, count - len(held.pages[shard]))
        self._held[sid] = held
        shards = (self.growth.shard(home, group) for group in range(self.growth.kvp))
        return tuple(tuple(runs_of(held.pages[shard])) for shard in shards)

    def holds(self, sid: int, group: int) -> bool:
        """Whether the admission has pages on the group."""
        held = self._held[sid]
        return bool(held.pages[self.growth.shard(held.home, group)])

    def extend(self, sid: int, tokens: int) -> int | None:
        """Room for `tokens` tokens: None if there is, and workers are told; else a group that has none."""
        held = self._held[sid]
        more = [
            (shard, count - len(held.pages[shard]))
            for shard, count in enumerate(self.needs(tokens))
            if count > len(held.pages[shard])
        ]
        for shard, count in more:
            group = self.growth.group(held.home, shard)
            if self.available(group) < count:
                return group
        for shard, count in more:
            group = self.growth.group(held.home, shard)
            runs = self._add(held, shard, count)
            self.changes.append(MorePages(sid, group, runs))
        return None

    def fill(self, sid: int, hashes: Sequence[bytes], tokens: int) -> None:
        """The admission's first `tokens` tokens are, or are being, stored: whole pages of them are blocks.

        A page that is there already under the same name, filled by another at the same time, stays private.
        """
        held = self._held[sid]
        whole = min(len(hashes), tokens // self.page_size) if self.shares else 0
        for index in range(len(held.hashes), whole):
            position = index * self.page_size
            shard = self.growth.owner(position)
            group = self._groups[self.growth.group(held.home, shard)]
            key = (held.home, hashes[index])
            if key in group.blocks:
                break  # nor can what comes behind be found by way of it
            group.blocks[key] = Block(
                held.pages[shard][self.growth.held(shard, position) // self.page_size], position
            )
            if key in group.host:
                group.slots.append(group.host.pop(key))
            held.hashes.append(hashes[index])

    def release(self, sid: int, *, returns: bool = False) -> None:
        """The admission is over: its own pages are free, its blocks may become idle: of a very long one's
        the last, and the others as `tidy` is called, for they are too many to look at in one step.

        returns: the request was preempted, and will want its blocks again
        """
        held = self._held.pop(sid)
        self._tell_over(sid)
        blocks = len(held.hashes) * self.page_size
        for shard, pages in enumerate(held.pages):
            pool = self._groups[self.growth.group(held.home, shard)].pool
            for start, count in runs_of(pages[self.growth.held(shard, blocks) // self.page_size :]):
                pool.give(start, count)
        self._leaving.append((held, returns))
        self.tidy()

    def tidy(self) -> bool:
        """Look at some more blocks of those who have left; whether there were any."""
        left = TIDIED
        any_left = bool(self._leaving)
        while self._leaving and left:
            held, returns = self._leaving[0]
            first = max(0, len(held.hashes) - left)
            for number, key in reversed(list(self._keys(held.home, held.hashes, first=first))):
                group = self._groups[number]
                block = group.blocks[key]
                block.readers -= 1
                block.wanted |= returns
                if not block.readers:
                    group.idle[key] = None
            left -= len(held.hashes) - first
            del held.hashes[first:]
            if not held.hashes:
                self._leaving.popleft()
        return any_left

    def forget(self) -> None:
        """Nobody holds anything, and nothing can be found: as at the start."""
        self._groups = [self._group() for _ in range(self.growth.kvp)]
        self._held.clear()
        self._leaving.clear()
        self.changes = []

    def audit(self) -> None:
        """Assert that each page is free, a block's, or one admission's own, and that readers are counted."""
        readers: Counter[tuple[int, Key]] = Counter()
        private: list[list[int]] = [[] for _ in self._groups]
        for held, _ in self._leaving:
            readers.update(self._keys(held.home, held.hashes))
        for held in self._held.values():
            keys = list(self._keys(held.home, held.hashes))
            readers.update(keys)
            blocks = Counter(number for number, _ in keys)
            for shard, pages in enumerate(held.pages):
                at = self.growth.group(held.home, shard)
                private[at] += pages[blocks[at] :]
        for number, group in enumerate(self._groups):
            read = Counter({key: n for (at, key), n in readers.items() if at == number})
            group.audit(read, private[number])

    # ------------------------------------------------------------------------------------ inside

    def _tell_over(self, sid: int) -> None:
        """Workers hear that an admission is over; or nothing at all, if nobody has told them of it yet."""
        kept = list[Change]()
        told = True
        for change in self.changes:
            if isinstance(change, Admitted) and change.sid == sid:
                told = False
            elif told or not (isinstance(change, MorePages) and change.id == sid):
                kept.append(change)
        self.changes = [*kept, sid] if told else kept

    def _read_back(self, away: list[tuple[int, Key, int, int]]) -> None:
        """Blocks from the host to pages. Their slots are free once the copies are ordered, not before."""
        pairs: dict[int, list[tuple[int, int]]] = {}
        for depth, key, number, slot in away:
            page = self._take(number, 1)[0][0]
            self._groups[number].blocks[key] = Block(page, depth, wanted=True)
            pairs.setdefault(number, []).append((page, slot))
        for number, copied in pairs.items():
            self._groups[number].slots.extend(slot for _, slot in copied)
            self.changes.append(Copies(number, False, copied))
        self.swapped_in += len(away)

    def _keys(
        self, home: int, hashes: Sequence[bytes], most: int | None = None, first: int = 0
    ) -> Iterator[tuple[int, Key]]:
        """The group and the key of each block, from the first one asked for to the last."""
        for index, digest in enumerate(itertools.islice(hashes, first, most), first):
            shard = self.growth.owner(index * self.page_size)
            yield self.growth.group(home, shard), (home, digest)

    def _wanted(self, home: int, tokens: int) -> dict[int, int]:
        needs = enumerate(self.needs(tokens))
        return {self.growth.group(home, shard): count for shard, count in needs}

    def _add(self, held: _Held, shard: int, count: int) -> tuple[Run, ...]:
        runs = self._take(self.growth.group(held.home, shard), count)
        for start, size in runs:
            held.pages[shard].extend(range(start, start + size))
        return runs

    def _take(self, number: int, count: int) -> tuple[Run, ...]:
        """Pages of a group, of idle blocks where none are free."""
        runs, leaving = self._groups[number].take(count)
        if leaving:
            self.swapped_out += len(leaving)
            self.changes.append(Copies(number, True, leaving))
        return runs
