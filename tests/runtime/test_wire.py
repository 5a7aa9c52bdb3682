"""What engine and workers say to each other arrives as it was said."""

from __future__ import annotations

import time
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.runtime.protocol.messages import (
    Admission,
    Copies,
    Done,
    Failed,
    MorePages,
    Ready,
    Reply,
    Step,
)
from mnemoc.runtime.protocol.wire import decode_reply, decode_step, encode_reply, encode_step
from mnemoc.runtime.request import Sampling

small, ids = st.integers(0, 2**31 - 1), st.integers(0, 2**63 - 1)
runs = st.lists(st.tuples(small, small), max_size=3).map(tuple)
scores = st.floats(-1e4, 0)
samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 2),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop_ids=st.frozensets(small, max_size=3),
    ignore_eos=st.booleans(),
    logit_bias=st.lists(st.tuples(small, st.floats(-100, 100)), max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
)
admissions = st.builds(
    Admission,
    id=ids,
    home=small,
    kv_tokens=ids,
    sampling=samplings,
    logits=st.sampled_from(["none", "last", "all"]) | st.lists(ids, max_size=3).map(tuple),
    tokens=st.lists(small, min_size=1, max_size=9).map(lambda tokens: array("i", tokens)),
    generated=small,
    cached=small,
    pages=st.lists(runs, min_size=1, max_size=3).map(tuple),
)
pairs = st.lists(st.tuples(small, small), max_size=4)
changes = (
    ids
    | admissions
    | st.builds(MorePages, ids, small, runs)
    | st.builds(Copies, small, st.booleans(), pairs)
)
counts = st.lists(st.tuples(ids, ids), max_size=4)


@given(st.builds(Step, ids, st.lists(changes, max_size=5), counts, counts))
def test_a_step_survives_the_journey(step: Step) -> None:
    assert decode_step(encode_step(step)) == step


likely = st.lists(st.tuples(small, scores), max_size=3).map(tuple)


@given(
    st.builds(
        Done,
        number=ids,
        group=small,
        tokens=counts,
        logits=st.lists(st.tuples(ids, ids, st.binary(max_size=9)), max_size=3),
        busy_s=st.floats(0, 1e9),
        logprobs=st.lists(st.tuples(ids, scores, likely), max_size=3),
    )
)
def test_an_answer_survives_the_journey(done: Done) -> None:
    assert decode_reply(encode_reply(done)) == done


@pytest.mark.parametrize("reply", [Ready(3), Failed(1, "no such file", 4, "trace")])
def test_other_replies_survive_it_too(reply: Reply) -> None:
    assert decode_reply(encode_reply(reply)) == reply


def test_what_may_be_long_is_not_text() -> None:
    """So a thousand decodes, or a prompt on scattered pages, cost little more than their bytes."""
    decodes = [(10**6 + i, i) for i in range(1000)]
    scattered = tuple((2 * page, 1) for page in range(500))
    prompt = array("i", range(10_000))
    come = Admission(1, 0, 10_000, Sampling(), "none", prompt, 0, 0, (scattered,))
    step = Step(0, [come, MorePages(1, 0, scattered), Copies(0, True, scattered)], decodes)
    frames = encode_step(step)
    assert [len(frame) for frame in frames[1:]] == [16_000, 4 * 10_000 + 3 * 8 * 500]
    assert len(frames[0]) < 600
    times = []
    for _ in range(20):
        started = time.thread_time()
        encode_step(Step(0, (), decodes))
        times.append(time.thread_time() - started)
    assert min(times) < 300e-6  # 50 µs on a quiet machine, and five times as long as JSON
