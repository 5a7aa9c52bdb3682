"""Text: tokens to characters as they come, stop strings, conversations, samples, messages."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.errors import BadInput
from mnemoc.runtime.answers import StopStrings
from mnemoc.runtime.api import ChatBody, CompletionBody
from mnemoc.runtime.protocol import (
    Admission,
    Done,
    Failed,
    Ready,
    Reply,
    Step,
    decode_reply,
    decode_step,
    encode_reply,
    encode_step,
)
from mnemoc.runtime.request import Request, Sampling
from mnemoc.runtime.sampling import sample
from mnemoc.runtime.tokenizer import Detokenizer, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(models: Callable[..., Path]) -> Tokenizer:
    return Tokenizer(models("llama"))


@given(st.text(max_size=40))
def test_pieces_of_text_add_up_and_no_character_is_broken(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(id) for id in tokenizer.encode(text, special=False)]
    assert "".join(pieces) + detokenizer.rest() == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, 255), max_size=40))
def test_bytes_that_are_no_text_add_up_too(tokenizer: Tokenizer, ids: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(id) for id in ids) + detokenizer.rest()
    assert text == tokenizer.decode(ids)


def test_a_directory_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such directory"):
        Tokenizer(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"no tokenizer.json; give token ids"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="not a tokenizer"):
        Tokenizer(tmp_path)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(
    text: str, stops: list[str]
) -> None:
    found = [text.index(stop, 0) for stop in stops if stop in text]
    finder, shown, stopped = StopStrings(stops), "", False
    for character in text:
        piece, stopped = finder.push(character)
        shown += piece
        if stopped:
            break
    shown += "" if stopped else finder.rest()
    assert stopped == bool(found)
    if not stopped:
        assert shown == text
    else:  # the stop string that is complete first ends it
        ends = min(text.index(stop) + len(stop) for stop in stops if stop in text)
        assert text.startswith(shown)
        assert any(text[len(shown) : ends].startswith(stop) for stop in stops)


def test_a_conversation_becomes_one_line_a_turn() -> None:
    body = ChatBody.model_validate(
        {
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            ]
        }
    )
    with pytest.raises(BadInput, match="send token ids"):
        body.prompts(None)
    assert body.limit(99) == 99


def test_neutral_fields_pass_and_others_are_refused() -> None:
    neutral = {"prompt": "a", "presence_penalty": 0, "logprobs": None, "user": "me", "best_of": 1}
    assert CompletionBody.model_validate(neutral).n == 1
    with pytest.raises(ValueError, match="presence_penalty"):
        CompletionBody.model_validate({**neutral, "presence_penalty": 0.5})


def test_each_of_n_answers_has_its_own_seed() -> None:
    body = CompletionBody.model_validate({"prompt": [1, 2], "n": 3, "seed": 4})
    requests = body.requests(body.prompts(None), 5)
    assert [request.sampling.seed for request in requests] == [4, 5, 6]
    assert {request.prompt_ids for request in requests} == {(1, 2)}


LOGITS = torch.tensor([0.5, 3.0, 2.0, 1.0, -1.0])


def test_samples_follow_the_distribution_and_its_cuts() -> None:
    drawn = [sample(LOGITS, Sampling(temperature=1.0, seed=1), i) for i in range(3000)]
    share = torch.bincount(torch.tensor(drawn), minlength=5) / len(drawn)
    assert torch.allclose(share, LOGITS.softmax(0), atol=0.03)
    top_2 = {sample(LOGITS, Sampling(1.0, top_k=2, seed=1), i) for i in range(200)}
    assert top_2 == {1, 2}
    nucleus = {sample(LOGITS, Sampling(1.0, top_p=0.6, seed=1), i) for i in range(200)}
    assert nucleus == {1}


def test_a_sample_depends_on_seed_and_position_only() -> None:
    hot = Sampling(temperature=2.0, seed=9)
    assert [sample(LOGITS, hot, i) for i in range(50)] == [
        sample(LOGITS, hot, i) for i in range(50)
    ]
    assert len({sample(LOGITS, hot, i) for i in range(50)}) > 2


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": -1}],
)
def test_impossible_sampling_is_bad_input(sampling: dict[str, float]) -> None:
    with pytest.raises(BadInput):
        Sampling(**sampling)  # type: ignore[arg-type]


def test_an_empty_prompt_or_answer_is_bad_input() -> None:
    with pytest.raises(BadInput, match="empty"):
        Request(())
    with pytest.raises(BadInput, match="max_tokens"):
        Request((1,), 0)


def test_a_step_survives_the_journey() -> None:
    sampling = Sampling(0.5, 0.9, 40, 2**62)
    new = Admission(3, 1, 900, sampling, (0, 5), array("i", range(1000)))
    step = Step(7, [1, new, 2], [(4, 11)], [(3, 500)])
    assert decode_step(encode_step(step)) == step


@pytest.mark.parametrize(
    "reply",
    [
        Ready(3),
        Failed(1, "no such file", 4, "trace"),
        Done(9, 1, [(4, 77)], [(4, b"\0\1\2\3"), (5, b"")], 0.25),
    ],
)
def test_a_reply_survives_the_journey(reply: Reply) -> None:
    assert decode_reply(encode_reply(reply)) == reply
