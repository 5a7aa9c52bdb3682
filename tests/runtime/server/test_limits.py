"""Who may ask, how much and how many: keys, sizes, times, places."""

from __future__ import annotations

import hmac
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from mnemoc.errors import BadInput
from mnemoc.runtime import Engine
from mnemoc.runtime.server import Limits, Options
from mnemoc.runtime.server.limits import Keys

Front = Callable[..., AbstractContextManager[str]]

SHORT: dict[str, Any] = {"prompt": [1, 2], "max_tokens": 2}
ENDLESS: dict[str, Any] = {"prompt": [1], "max_tokens": 1400, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def strict(front: Front) -> Iterator[str]:
    limits = Limits(("first-key", "second-key"), 5000, 0.5, concurrency=1)
    with front(Options(limits=limits)) as url:
        yield url


def key(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


FIRST = key("first-key")


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/load", "/openapi.json", "/nowhere"])
@pytest.mark.parametrize("headers", [{}, key("first-ke"), {"Authorization": "first-key"}])
def test_without_a_key_there_is_nothing(strict: str, path: str, headers: dict[str, str]) -> None:
    response = httpx.get(strict + path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["x-request-id"]


def test_any_of_the_keys_opens_and_probes_need_none(strict: str) -> None:
    for headers in (FIRST, key("second-key"), {"Authorization": "bearer  second-key"}):
        assert httpx.get(f"{strict}/v1/models", headers=headers).status_code == 200
        answer = httpx.post(f"{strict}/v1/completions", json=SHORT, headers=headers)
        assert answer.status_code == 200
    for path in ("/health", "/ping"):
        response = httpx.get(strict + path)
        assert (response.status_code, response.content) == (200, b"")


def test_every_key_is_compared_in_constant_time_whichever_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def watched(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    keys = Keys(["a", "b" * 100, "c"])
    for given, admitted in (("a", True), ("c", True), ("none", False), ("é", False)):
        compared.clear()
        assert keys.admit(f"Bearer {given}") is admitted
        assert len(compared) == 3
        assert {len(part) for pair in compared for part in pair} == {32}  # digests: no length shows
    assert not keys.admit(None)
    assert not keys.admit("Basic a")
    assert Keys([]).admit(None)


@pytest.mark.parametrize("bad", ["", " ", "two words", "schlüssel", "a\n"])
def test_a_key_that_could_not_be_sent_is_bad_input(bad: str) -> None:
    with pytest.raises(BadInput, match="an API key must be printable ASCII"):
        Limits((bad,))


def test_a_large_body_is_refused_announced_or_not(strict: str) -> None:
    body = {"prompt": "a" * 6000}
    pieces = json.dumps(body).encode()
    announced = httpx.post(f"{strict}/v1/completions", json=body, headers=FIRST)
    chunked = httpx.post(
        f"{strict}/tokenize",
        content=(pieces[at : at + 1000] for at in range(0, len(pieces), 1000)),
        headers={**FIRST, "Content-Type": "application/json"},
    )
    for response in (announced, chunked):
        assert response.status_code == 413
        assert response.json()["error"]["message"] == "the body is larger than 5,000 bytes"
        assert response.headers["connection"] == "close"


def test_a_body_may_be_as_large_as_the_context_needs() -> None:
    assert Limits().most_body_bytes(1000) == 2**22
    assert Limits().most_body_bytes(10_000_000) == 160_000_000
    assert Limits(body_bytes=7).most_body_bytes(10_000_000) == 7


def test_a_body_that_stays_away_is_given_up_and_holds_nothing(strict: str, engine: Engine) -> None:
    where = strict.removeprefix("http://").split(":")
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer first-key\r\n"
        "Content-Type: application/json\r\nContent-Length: 500\r\n\r\n"
    )
    with socket.create_connection((where[0], int(where[1])), timeout=30) as client:
        client.sendall(head.encode() + b'{"prompt": [1, 2')
        began_s = time.monotonic()
        time.sleep(0.1)
        assert load(strict) == 1
        answer = b""
        while data := client.recv(4096):  # until the server hangs up
            answer += data
    assert 0.3 < time.monotonic() - began_s < 20
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"the body did not come: 16 bytes in" in answer
    assert load(strict) == 0
    assert (engine.num_running, engine.num_waiting) == (0, 0)


def load(url: str) -> int:
    return int(httpx.get(f"{url}/load", headers=FIRST).json()["server_load"])


def test_beyond_as_many_as_may_be_at_work_clients_are_told_when_to_come_again(strict: str) -> None:
    url = f"{strict}/v1/completions"
    with httpx.stream("POST", url, json=ENDLESS, headers=FIRST) as running:
        stream = running.iter_bytes()  # kept: with it would go the connection
        next(stream)
        refused = httpx.post(url, json=SHORT, headers=FIRST)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        wait = refused.headers["retry-after"]
        assert int(wait) >= 1
        assert refused.json()["error"]["message"].endswith(f"try again in {wait} s")
        assert httpx.get(f"{strict}/v1/models", headers=FIRST).status_code == 200
    assert until(lambda: load(strict) == 0)
    assert httpx.post(url, json=SHORT, headers=FIRST).status_code == 200


def test_a_full_queue_sends_clients_away(front: Front, engine: Engine) -> None:
    """Of two requests that need most of the pages, one waits."""
    large = {**ENDLESS, "prompt": [7] * 1000, "max_tokens": 200}
    with front(Options(limits=Limits(queue=1))) as url:
        post = f"{url}/v1/completions"
        second = {**large, "prompt": [8] * 1000}
        with httpx.stream("POST", post, json=large), httpx.stream("POST", post, json=second):
            assert until(lambda: engine.num_waiting == 1)
            refused = httpx.post(post, json=SHORT)
            assert refused.status_code == 429
            assert "1 answers wait" in refused.json()["error"]["message"]
        assert until(lambda: engine.num_waiting == 0 and engine.num_running == 0)
        assert httpx.post(post, json=SHORT).status_code == 200


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_a_request_keeps_its_name_or_gets_one(front: Front) -> None:
    with front() as url:
        post = f"{url}/v1/completions"
        own = httpx.post(post, json=SHORT, headers={"X-Request-Id": "mine-1"})
        assert (own.headers["x-request-id"], own.json()["id"]) == ("mine-1", "cmpl-mine-1")
        said = httpx.post(post, json={**SHORT, "request_id": "in-body"})
        assert (said.headers["x-request-id"], said.json()["id"]) == ("in-body", "cmpl-in-body")
        both = {"headers": {"X-Request-Id": "head"}, "json": {**SHORT, "request_id": "body"}}
        assert httpx.post(post, **both).json()["id"] == "cmpl-head"
        made = {httpx.get(f"{url}/load").headers["x-request-id"] for _ in range(3)}
        assert len(made) == 3
        wrong = httpx.post(post, json={}, headers={"X-Request-Id": "mine-2"})
        assert (wrong.status_code, wrong.headers["x-request-id"]) == (400, "mine-2")
        for bad in ("two words", "x" * 129):
            given = httpx.get(f"{url}/load", headers={"X-Request-Id": bad})
            assert given.headers["x-request-id"] not in (bad, "")


def test_an_error_of_our_own_is_named_too(
    front: Front, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(engine, "submit", broken)
    with front() as url, caplog.at_level(logging.CRITICAL, "uvicorn.error"):
        response = httpx.post(
            f"{url}/v1/completions", json=SHORT, headers={"X-Request-Id": "unlucky"}
        )
    assert (response.status_code, response.headers["x-request-id"]) == (500, "unlucky")
    assert "secret" not in response.text


def test_keys_come_from_a_file_too(tmp_path: Path) -> None:
    from mnemoc.options import keys_of

    file = tmp_path / "keys"
    file.write_text("one\n\n  two\n")
    assert keys_of(file) == ["one", "two"]
    assert keys_of(None) == []
    file.write_text("\n")
    with pytest.raises(BadInput, match="no key in it"):
        keys_of(file)
