"""KV pages that go to the host and come back: the right bytes, in the right order; and a request goes on."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.runtime.protocol.messages import Admission, Change, Copies, Done, Step
from mnemoc.runtime.rank import cores
from mnemoc.runtime.rank.host_pages import AT_ONCE, HostPages
from mnemoc.runtime.rank.settings import Settings
from mnemoc.runtime.rank.stage import Stage
from mnemoc.runtime.request import Sampling

LAYERS, HEADS, PAGES, SLOTS, PAGE, DIM = 2, 3, 24, 30, 4, 8


def random_kv(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Any bytes at all: what is copied is not looked at."""
    size = (LAYERS, 2, HEADS, PAGES, PAGE, DIM * dtype.itemsize)
    made = torch.randint(256, size, generator=torch.Generator().manual_seed(0)).byte().view(dtype)
    return [(made[layer, 0].clone(), made[layer, 1].clone()) for layer in range(LAYERS)]


def page_bytes(cache: torch.Tensor, page: int) -> bytes:
    return cache[:, page].contiguous().view(torch.uint8).numpy().tobytes()


orders = st.lists(
    st.tuples(
        st.booleans(),
        st.permutations(range(PAGES)),
        st.permutations(range(SLOTS)),
        st.sampled_from([1, 2, AT_ONCE, AT_ONCE + 3]),
    ),
    max_size=5,
)


@given(orders, st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn]))
def test_copies_move_exactly_the_pages_that_they_name(
    orders: list[tuple[bool, list[int], list[int], int]], dtype: torch.dtype
) -> None:
    kv = random_kv(dtype)
    pages = {
        (layer, i, page): page_bytes(cache, page)
        for layer, pair in enumerate(kv)
        for i, cache in enumerate(pair)
        for page in range(PAGES)
    }
    slots: dict[tuple[int, int, int], bytes] = {}
    host = HostPages(kv, SLOTS)
    filled: list[int] = []
    for out, some_pages, some_slots, count in orders:
        from_or_to = some_slots if out else [slot for slot in some_slots if slot in filled]
        pairs = list(zip(some_pages[:count], from_or_to, strict=False))
        host.carry_out(Copies(0, out, pairs))
        for page, slot in pairs:
            for layer in range(LAYERS):
                for i in (0, 1):
                    if out:
                        slots[layer, i, slot] = pages[layer, i, page]
                    else:
                        pages[layer, i, page] = slots[layer, i, slot]
            filled.append(slot)
    for (layer, i, page), expected in pages.items():
        assert page_bytes(kv[layer][i], page) == expected


@dataclass
class Served:
    """A stage, and requests on it, served by hand as an engine would: one token after the other."""

    stage: Stage
    sampling: Sampling
    told: list[Done] = field(default_factory=list)

    def run(self, *changes: Change, decode: int | None = None, chunk: int | None = None) -> int:
        """One step for the request that came last; its token, −1 if there is none."""
        come = [change.id for change in changes if isinstance(change, Admission)]
        self.id = come[-1] if come else self.id
        decodes = [] if decode is None else [(self.id, decode)]
        chunks = [] if chunk is None else [(self.id, chunk)]
        prepared = self.stage.prepare(Step(len(self.told), changes, decodes, chunks))
        launched = self.stage.launch(prepared) if prepared is not None else None
        if launched is None:
            return -1
        self.told.append(self.stage.finish(launched))
        return self.told[-1].tokens[0][1] if self.told[-1].tokens else -1

    def admit(
        self, id: int, tokens: list[int], generated: int, cached: int, first: int
    ) -> Admission:
        """On six pages in a row, enough for 96 tokens."""
        ids, pages = array("i", tokens), (((first, 6),),)
        return Admission(id, 0, 96, self.sampling, "none", ids, generated, cached, pages)


SAMPLINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(
        temperature=1.2,
        top_p=0.95,
        seed=11,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        repetition_penalty=1.3,
        min_tokens=30,
        logprobs=2,
    ),
}


@pytest.mark.parametrize("how", SAMPLINGS)
def test_a_preempted_request_goes_on_as_if_nothing_had_been(
    how: str,
    models: Callable[..., Path],
    plans: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its pages went to the host, others wrote on them, and it comes back on other pages."""
    monkeypatch.setattr(cores, "settle", lambda *_: None)
    model, prompt = models("llama"), [37 * i % 256 for i in range(3, 53)]
    directory = plans(model, host_pages=8)
    with torch.inference_mode():
        stage = Stage(Settings(0, 0, 1, "", "", directory, model, 1))
        served = Served(stage, SAMPLINGS[how])
        token = served.run(served.admit(0, prompt, 0, 0, first=0), chunk=50)
        expected = [token]
        while len(expected) < 12:
            expected.append(served.run(decode=expected[-1]))
        calm, served.told = served.told, []

        found = [served.run(0, served.admit(1, prompt, 0, 0, first=6), chunk=50)]
        while len(found) < 5:
            found.append(served.run(decode=found[-1]))
        evicted = Copies(0, True, [(6, 3), (7, 0), (8, 5)])
        assert served.run(1, evicted) == -1
        served.run(served.admit(2, prompt[::-1], 0, 0, first=6), chunk=50)
        # 48 tokens are cached on the three pages, as good as on any others
        back = Copies(0, False, [(20, 3), (21, 0), (22, 5)])
        again = served.admit(3, prompt + found, len(found), 48, first=20)
        served.told = served.told[:5]
        found.append(served.run(2, back, again, chunk=len(prompt) + len(found) - 48))
        while len(found) < len(expected):
            found.append(served.run(decode=found[-1]))
    assert found == expected
    for ours, theirs in zip(served.told, calm, strict=True):
        for (_, own, top), (_, own_then, top_then) in zip(
            ours.logprobs, theirs.logprobs, strict=True
        ):
            assert own == pytest.approx(own_then, abs=1e-5)
            assert [id for id, _ in top] == [id for id, _ in top_then]


def test_copies_wait_for_their_turn_and_need_no_rows(
    models: Callable[..., Path],
    plans: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cores, "settle", lambda *_: None)
    model = models("llama")
    directory = plans(model, host_pages=2)
    with torch.inference_mode():
        stage = Stage(Settings(0, 0, 1, "", "", directory, model, 1))
        for i, cache in enumerate(cache for pair in stage.kv for cache in pair):
            cache[:, 0], cache[:, 1] = i, -1
        there = stage.prepare(Step(0, [Copies(0, True, [(0, 1)])]))
        back = stage.prepare(Step(1, [Copies(0, False, [(1, 1)])]))
        assert stage.prepare(Step(2, [Copies(1, False, [(1, 1)])])) is None, "another group's"
        assert there is not None
        assert back is not None
        assert all(bool((cache[:, 1] == -1).all()) for pair in stage.kv for cache in pair)
        assert stage.launch(there) is None
        assert stage.launch(back) is None
        for i, cache in enumerate(cache for pair in stage.kv for cache in pair):
            assert bool((cache[:, 1] == i).all())
