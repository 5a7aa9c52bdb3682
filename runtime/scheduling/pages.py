"""KV pages of every group: who holds which, and which can be found again (`blocks`). Pure integers.

A page that is given back may be given away at once, though micro-batches that read or write it are still on
their way: it is one group's, whose ranks alone touch it, and they carry out steps in the order in which they
were sent, copies and those without rows of theirs included. That other groups are ahead or behind changes
nothing.

Tokens lie in shards (`growth`), so a block is one of its request's home group: another request finds it only
at the same home. The engine alone decides; workers are told of pages, once.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..protocol.messages import Copies, MorePages, Run
from .blocks import Block, Group
from .growth import Growth
from .job import Admitted, Change
from .pool import runs_of

TIDIED = 1024
"""Blocks of requests that have left, looked at in one go: about a millisecond's work."""


@dataclass(eq=False)
class _Held:
    """What an admission holds. pages: by shard, in order; blocks: what the request's first pages are.

    Arrays, for a list of a long request's pages takes the garbage collector milliseconds to look through.
    """

    home: int
    pages: list[array[int]]
    blocks: list[Block] = field(default_factory=list)


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
        self._host_pages, self._swap_from = host_pages, swap_from
        self._groups = self._empty()
        self._held: dict[int, _Held] = {}
        self._leaving: deque[tuple[_Held, bool]] = deque()  # with no pages but their blocks'

    # ---------------------------------------------------------------------------------- what fits

    def needs(self, tokens: int) -> list[int]:
        """Pages of each shard of a request that holds `tokens` tokens."""
        if self.growth.kvp == 1:
            return [-(-tokens // self.page_size)]
        shards = range(self.growth.shards(tokens))
        return [-(-self.growth.held(shard, tokens) // self.page_size) for shard in shards]

    def found(self, home: int, hashes: Sequence[bytes], most: int) -> int:
        """How many of a prefix's first `most` pages are there, on device or host, for a request at this
        home."""
        most = min(most, len(hashes)) if self.shares else 0
        for group, _, first, end in self._stretches(home, 0, most):
            blocks, host = group.blocks[home], group.host
            for index, digest in enumerate(hashes[first:end], first):
                if digest not in blocks and (home, digest) not in host:
                    return index
        return most

    def fits(
        self, home: int, tokens: int, hashes: Sequence[bytes] = (), found: int = 0, spare: int = 0
    ) -> bool:
        """Whether a request that finds the first so many blocks could have room for `tokens` tokens now.

        spare: pages that are to be left on each of its groups
        """
        lacking = [0] * len(self._groups)
        for shard, count in enumerate(self.needs(tokens)):
            number = self.growth.group(home, shard)
            lacking[number] = count + spare - self.available(number)
        if max(lacking) <= 0:
            return True
        for group, _, first, end in self._stretches(home, 0, found):
            for block in map(group.blocks[home].get, hashes[first:end]):
                if block is not None and block.readers:  # an idle one must be had like any page
                    lacking[group.number] -= 1
        return max(lacking) <= 0

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
        held = _Held(home, [array("i") for _ in range(self.growth.kvp)])
        away: list[tuple[Group, Block, int]] = []  # group and slot of what is on the host
        for group, _, first, end in self._stretches(home, 0, len(hashes)):
            blocks = group.blocks[home]
            for index, digest in enumerate(hashes[first:end], first):
                if (block := blocks.get(digest)) is None:
                    key = home, digest
                    block = blocks[digest] = Block(key, -1, index * self.page_size, readers=0)
                    away.append((group, block, group.host.pop(key)))
                elif not block.readers:
                    del group.idle[block]
                block.readers += 1
                block.wanted = True
                held.blocks.append(block)
        self._read_back(away)
        for _, shard, first, end in self._stretches(home, 0, len(hashes)):
            held.pages[shard].extend([block.page for block in held.blocks[first:end]])
        runs: list[tuple[Run, ...]] = [()] * self.growth.kvp
        for shard, count in enumerate(self.needs(tokens)):
            shared = tuple(runs_of(held.pages[shard]))
            own = self._add(held, shard, count - len(held.pages[shard]))
            runs[self.growth.group(home, shard)] = (*shared, *own)
        self._held[sid] = held
        return tuple(runs)

    def holds(self, sid: int, group: int) -> bool:
        """Whether the admission has pages on the group."""
        held = self._held[sid]
        return bool(held.pages[self.growth.shard(held.home, group)])

    def extend(self, sid: int, tokens: int) -> int | None:
        """Room for `tokens` tokens: None if there is, and workers are told; else a group that has none."""
        held = self._held[sid]
        more: list[tuple[int, int, int]] = []
        for shard, needed in enumerate(self.needs(tokens)):
            count = needed - len(held.pages[shard])
            if count > 0:
                group = self.growth.group(held.home, shard)
                if self.available(group) < count:
                    return group
                more.append((shard, group, count))
        for shard, group, count in more:
            self.changes.append(MorePages(sid, group, self._add(held, shard, count)))
        return None

    def fill(self, sid: int, hashes: Sequence[bytes], tokens: int) -> None:
        """The admission's first `tokens` tokens are, or are being, stored: whole pages of them are blocks.

        A page that is there already under the same name, filled by another at the same time, stays private.
        """
        held = self._held[sid]
        home, pages, page_size = held.home, held.pages, self.page_size
        whole = min(len(hashes), tokens // page_size) if self.shares else 0
        for group, shard, first, end in self._stretches(home, len(held.blocks), whole):
            blocks, host = group.blocks[home], group.host
            start = self.growth.held(shard, first * page_size) // page_size
            for index, page in enumerate(pages[shard][start : start + end - first], first):
                digest = hashes[index]
                if digest in blocks:
                    return  # nor can what comes behind be found by way of it
                block = blocks[digest] = Block((home, digest), page, index * page_size)
                if block.key in host:
                    group.slots.append(host.pop(block.key))
                held.blocks.append(block)

    def release(self, sid: int, *, returns: bool = False) -> None:
        """The admission is over: its own pages are free, its blocks may become idle: of a very long one's
        the last, and the others as `tidy` is called, for they are too many to look at in one step.

        returns: the request was preempted, and will want its blocks again
        """
        held = self._held.pop(sid)
        self._tell_over(sid)
        blocks = len(held.blocks) * self.page_size
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
            last = len(held.blocks)
            going = list(self._stretches(held.home, max(0, last - left), last))
            for group, _, first, end in reversed(going):
                for block in reversed(held.blocks[first:end]):
                    block.readers -= 1
                    block.wanted |= returns
                    if not block.readers:
                        group.idle[block] = None
            del held.blocks[max(0, last - left) :]
            left -= last - len(held.blocks)
            if not held.blocks:
                self._leaving.popleft()
        return any_left

    def forget(self) -> None:
        """Nobody holds anything, and nothing can be found: as at the start."""
        self._groups = self._empty()
        self._held.clear()
        self._leaving.clear()
        self.changes = []

    def audit(self) -> None:
        """Assert that each page is free, a block's, or one admission's own, and that readers are counted."""
        readers = [Counter[Block]() for _ in self._groups]
        private: list[list[int]] = [[] for _ in self._groups]
        for held in [*self._held.values(), *(held for held, _ in self._leaving)]:
            for group, _, first, end in self._stretches(held.home, 0, len(held.blocks)):
                readers[group.number].update(held.blocks[first:end])
        for held in self._held.values():
            blocks = len(held.blocks) * self.page_size
            for shard, pages in enumerate(held.pages):
                own = pages[self.growth.held(shard, blocks) // self.page_size :]
                private[self.growth.group(held.home, shard)] += own
        for group in self._groups:
            group.audit(readers[group.number], private[group.number])

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

    def _empty(self) -> list[Group]:
        kvp, pages = self.growth.kvp, (self.num_pages, self._host_pages, self._swap_from)
        return [Group(number, kvp, *pages) for number in range(kvp)]

    def _read_back(self, away: list[tuple[Group, Block, int]]) -> None:
        """Blocks from the host to pages. Their slots are free once the copies are ordered, not before."""
        copied: dict[Group, list[tuple[int, int]]] = {}
        for group, block, slot in away:
            block.page = self._take(group, 1)[0][0]
            copied.setdefault(group, []).append((block.page, slot))
        for group, pairs in copied.items():
            group.slots.extend(slot for _, slot in pairs)
            self.changes.append(Copies(group.number, False, pairs))
        self.swapped_in += len(away)

    def _stretches(self, home: int, first: int, end: int) -> Iterator[tuple[Group, int, int, int]]:
        """Those of a request's pages from `first` to `end` that lie one behind the other in a shard: the
        group, the shard, the first page and the end."""
        growth = self.growth
        while first < end:
            shard, stop = growth.owner(first * self.page_size), end
            if growth.kvp > 1:
                each = growth.stripe_tokens // self.page_size
                stop = min(end, (first // each + 1) * each)
            yield self._groups[growth.group(home, shard)], shard, first, stop
            first = stop

    def _add(self, held: _Held, shard: int, count: int) -> tuple[Run, ...]:
        runs = self._take(self._groups[self.growth.group(held.home, shard)], count)
        for start, size in runs:
            held.pages[shard].extend(range(start, start + size))
        return runs

    def _take(self, group: Group, count: int) -> tuple[Run, ...]:
        """Pages of a group, of idle blocks where none are free."""
        runs, leaving = group.take(count)
        if leaving:
            self.swapped_out += len(leaving)
            self.changes.append(Copies(group.number, True, leaving))
        return runs
