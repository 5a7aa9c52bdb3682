"""The block manager: which KV pages of a group belong to whom. Pure integers.

Every page that a request will ever need is reserved when it is admitted, over all its groups, all
or nothing: growing piecemeal could deadlock several long requests that each hold half.

The same code runs in the engine (to know what fits) and in each worker (to know the pages): both
apply the same reservations and releases in the same order, so page tables never travel.
"""

from __future__ import annotations

import bisect

from .growth import Growth

Run = tuple[int, int]
"""Consecutive pages: (first page, number of pages)."""


class PagePool:
    """The pages of one KVP group. Prefers runs: contiguous pages are quicker to read."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._free: list[Run] = [(0, num_pages)] if num_pages else []
        self._held: dict[int, tuple[Run, ...]] = {}

    def reserve(self, request: int, count: int) -> tuple[Run, ...]:
        """Take `count` pages for the request, in as few runs as possible.

        The caller has checked that they are there (`num_free`).
        """
        assert request not in self._held, f"request {request} already holds pages"
        assert 0 <= count <= self.num_free, f"{count} pages wanted, {self.num_free} free"
        runs: list[Run] = []
        while count:
            run = self._take(count)
            runs.append(run)
            count -= run[1]
        self._held[request] = tuple(runs)
        return self._held[request]

    def release(self, request: int) -> None:
        """Give back all pages of the request."""
        for start, count in self._held.pop(request):
            self._give(start, count)

    def runs(self, request: int) -> tuple[Run, ...]:
        """The request's pages, in order."""
        return self._held[request]

    def _take(self, count: int) -> Run:
        """The smallest free run that holds `count` pages, else the largest one; at most `count`."""
        sizes = [size for _, size in self._free]
        enough = [size for size in sizes if size >= count]
        index = sizes.index(min(enough) if enough else max(sizes))
        start, size = self._free[index]
        taken = min(size, count)
        if taken == size:
            del self._free[index]
        else:
            self._free[index] = (start + taken, size - taken)
        self.num_free -= taken
        return start, taken

    def _give(self, start: int, count: int) -> None:
        self.num_free += count
        index = bisect.bisect_left(self._free, (start, 0))
        if index < len(self._free) and self._free[index][0] == start + count:
            count += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            index -= 1
            start, before = self._free.pop(index)
            count += before
        self._free.insert(index, (start, count))


class PageBook:
    """The pools of all groups, and how many pages a request takes from each."""

    def __init__(self, growth: Growth, num_pages: int, page_size: int) -> None:
        self.growth = growth
        self.page_size = page_size
        self.pools = [PagePool(num_pages) for _ in range(growth.kvp)]

    def needs(self, tokens: int) -> list[int]:
        """Pages of each shard of a request that will hold `tokens` tokens."""
        shards = range(self.growth.shards(tokens))
        return [-(-self.growth.held(shard, tokens) // self.page_size) for shard in shards]

    def fits(self, home: int, tokens: int) -> bool:
        """Whether every group has the pages that the request needs there."""
        return all(pool.num_free >= count for pool, count in self._wanted(home, tokens))

    def fits_ever(self, tokens: int) -> bool:
        """Whether the request would fit on groups that serve nobody else."""
        return max(self.needs(tokens)) <= self.pools[0].num_pages

    def reserve(self, request: int, home: int, tokens: int) -> None:
        for pool, count in self._wanted(home, tokens):
            pool.reserve(request, count)

    def release(self, request: int, home: int, tokens: int) -> None:
        for pool, _ in self._wanted(home, tokens):
            pool.release(request)

    def free(self, group: int) -> int:
        return self.pools[group].num_free

    @property
    def used_fraction(self) -> float:
        total = sum(pool.num_pages for pool in self.pools)
        return 1 - sum(pool.num_free for pool in self.pools) / total if total else 0.0

    def _wanted(self, home: int, tokens: int) -> list[tuple[PagePool, int]]:
        needs = enumerate(self.needs(tokens))
        return [(self.pools[self.growth.group(home, shard)], count) for shard, count in needs]
