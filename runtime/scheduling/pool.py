"""The free pages of one KVP group, in runs: contiguous pages are quicker to read, and quicker to tell of."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

from ..protocol.messages import Run


class PagePool:
    """Free pages. num_free: how many there are now."""

    def __init__(self, num_pages: int) -> None:
        self.num_free = num_pages
        self._free: list[Run] = [(0, num_pages)] if num_pages else []

    def take(self, count: int) -> tuple[Run, ...]:
        """`count` pages, in as few runs as possible. The caller knows that they are there (`num_free`)."""
        assert 0 <= count <= self.num_free, f"{count} pages wanted, {self.num_free} free"
        runs: list[Run] = []
        while count:
            run = self._take(count)
            runs.append(run)
            count -= run[1]
        return tuple(runs)

    def _take(self, count: int) -> Run:
        """The first free run that holds `count` pages, else the largest one; at most `count`."""
        for index, (start, size) in enumerate(self._free):  # noqa: B007
            if size >= count:
                break
        else:
            index = max(range(len(self._free)), key=lambda i: self._free[i][1])
            start, size = self._free[index]
        taken = min(size, count)
        if taken == size:
            del self._free[index]
        else:
            self._free[index] = (start + taken, size - taken)
        self.num_free -= taken
        return start, taken

    def give(self, start: int, count: int) -> None:
        """A run of pages is free again."""
        self.num_free += count
        index = bisect.bisect_left(self._free, (start, 0))
        if index < len(self._free) and self._free[index][0] == start + count:
            count += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            index -= 1
            start, before = self._free.pop(index)
            count += before
        self._free.insert(index, (start, count))


def runs_of(pages: Sequence[int]) -> Iterator[Run]:
    """Pages in order, as runs."""
    start = end = -1
    for page in pages:
        if page != end:
            if end > start:
                yield start, end - start
            start = page
        end = page + 1
    if end > start:
        yield start, end - start
