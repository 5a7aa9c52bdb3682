"""Text: tokens to characters as they come, stop strings, conversations, a request's body."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.errors import BadInput
from mnemoc.runtime.request import Request, Sampling, Token
from mnemoc.runtime.server.answers import MOST_SCORED, Piece, StopStrings, _Answer
from mnemoc.runtime.server.api import Body, ChatBody, CompletionBody
from mnemoc.runtime.server.logprobs import chat_logprobs, completion_logprobs
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
    neutral = {"prompt": "a", "tools": [], "logprobs": None, "user": "me", "best_of": 1}
    assert CompletionBody.model_validate(neutral).n == 1
    with pytest.raises(ValueError, match="best_of"):
        CompletionBody.model_validate({**neutral, "best_of": 2})


SHARED = {
    "temperature": 0.5,
    "min_p": 0.1,
    "presence_penalty": 1,
    "frequency_penalty": -2.0,
    "repetition_penalty": 1.5,
    "logit_bias": {"7": -100, "3": 5},
    "priority": -3,
}


def test_what_a_body_says_of_sampling_reaches_the_engine() -> None:
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], **SHARED}
    bodies: list[tuple[Body, int | None]] = [
        (CompletionBody.model_validate({"prompt": [1], **SHARED}), None),
        (CompletionBody.model_validate({"prompt": [1], **SHARED, "logprobs": 0}), 0),
        (ChatBody.model_validate({**chat, "logprobs": False}), None),
        (ChatBody.model_validate({**chat, "logprobs": True}), 0),
        (ChatBody.model_validate({**chat, "logprobs": True, "top_logprobs": 20}), 20),
    ]
    for body, logprobs in bodies:
        (request,) = body.requests([(1, 2)], 5)
        assert request.promise.priority == -3
        assert request.sampling == Sampling(
            temperature=0.5,
            min_p=0.1,
            presence_penalty=1,
            frequency_penalty=-2,
            repetition_penalty=1.5,
            logit_bias=((7, -100), (3, 5)),
            logprobs=logprobs,
        )
    with pytest.raises(ValueError, match="only allowed when logprobs is true"):
        ChatBody.model_validate({**chat, "top_logprobs": 2})
    for bad in ({"logit_bias": {"a": 1}}, {"logit_bias": {1: 101}}, {"logprobs": 21}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            CompletionBody.model_validate({"prompt": [1], **bad})


def test_stop_strings_do_not_end_an_answer_too_early(tokenizer: Tokenizer) -> None:
    answer = _Answer(0, tokenizer, ["ab"], min_tokens=3)
    tokens = tokenizer.encode("abcabd", special=False)
    pieces = [read(answer, Token(id, i, 0.0)) for i, id in enumerate(tokens[:5])]
    assert "".join(piece.text for piece in pieces if piece) == "abc"
    assert [piece and piece.finish for piece in pieces] == [None] * 4 + ["stop"]


def test_what_nobody_reads_is_put_together(tokenizer: Tokenizer) -> None:
    answer = _Answer(0, tokenizer, [], min_tokens=0)
    tokens = tokenizer.encode("a slow reader", special=False)
    *tokens, last = [Token(id, i, 0.0, None, -0.5) for i, id in enumerate(tokens)]
    assert [answer.push(token) for token in tokens] == [True] + [False] * (len(tokens) - 1)
    piece = read(answer, replace(last, finish="length"))
    assert piece is not None
    assert (piece.text, piece.finish) == ("a slow reader", "length")
    assert [one.offset for one in piece.scored] == list(range(13))
    assert not answer.open


def read(answer: _Answer, token: Token) -> Piece | None:
    """What there is to read once the token has come."""
    answer.push(token)
    pieces = answer.take()
    assert len(pieces) <= 1
    return pieces[0] if pieces else None


def test_unread_logprobs_come_in_pieces_so_that_none_takes_long_to_send(
    tokenizer: Tokenizer,
) -> None:
    answer, count = _Answer(0, tokenizer, [], min_tokens=0), 2 * MOST_SCORED + 1
    ids = tokenizer.encode("ab" * count, special=False)[:count]
    for i, id in enumerate(ids):
        answer.push(Token(id, i, 0.0, "length" if i == count - 1 else None, -0.5))
    pieces = answer.take()
    assert [len(piece.scored) for piece in pieces] == [MOST_SCORED, MOST_SCORED, 1]
    assert [piece.tokens for piece in pieces] == [MOST_SCORED, 2 * MOST_SCORED, count]
    assert [piece.finish for piece in pieces] == [None, None, "length"]
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids)
    assert answer.take() == []


def test_tokens_with_logprobs_say_where_their_text_begins(tokenizer: Tokenizer) -> None:
    answer = _Answer(0, tokenizer, [], min_tokens=0)
    ids = tokenizer.encode("aé.", special=False)
    for i, id in enumerate(ids):
        answer.push(Token(id, i, 0.0, None, -0.5, ((ids[0], -1.5),)))
    [piece] = answer.take()
    scored = piece.scored
    assert b"".join(one.token.bytes for one in scored) == "aé.".encode()
    assert [one.token.text for one in scored] == ["a", "\ufffd", "\ufffd", "."]
    shaped = completion_logprobs(scored)
    assert shaped["text_offset"] == [0, 1, 1, 2]
    assert shaped["token_logprobs"] == [-0.5] * 4
    likeliest = {"token": "a", "logprob": -1.5, "bytes": [97]}
    last = {"token": ".", "logprob": -0.5, "bytes": [46], "top_logprobs": [likeliest]}
    assert chat_logprobs(scored)["content"][3] == last


def test_each_of_n_answers_has_its_own_seed() -> None:
    body = CompletionBody.model_validate({"prompt": [1, 2], "n": 3, "seed": 4})
    requests = body.requests(body.prompts(None), 5)
    assert [request.sampling.seed for request in requests] == [4, 5, 6]
    assert {request.prompt_ids for request in requests} == {(1, 2)}


def test_an_empty_prompt_or_answer_is_bad_input() -> None:
    with pytest.raises(BadInput, match="empty"):
        Request(())
    with pytest.raises(BadInput, match="max_tokens"):
        Request((1,), 0)
