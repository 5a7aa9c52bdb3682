"""What a client is told of its request: headers, comments, /requests; and what is refused at once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from mnemoc.runtime import Engine
from mnemoc.runtime.executor.workers import NurseryProcess
from mnemoc.runtime.server import Options, bind, create_app, following

LONG: dict[str, Any] = {"prompt": [1] * 3900, "max_tokens": 4, "ignore_eos": True}
"""Some 200 chunks."""


@dataclass(frozen=True)
class Served:
    url: str
    engine: Engine

    def post(self, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}{path}").json()


@contextmanager
def serving(
    plan: Path, model: Path, nursery: NurseryProcess | None, **options: Any
) -> Iterator[Served]:
    chosen = Options(policy="fcfs", **options)
    with (
        Engine.start(plan, model, nursery=nursery, policy="fcfs", prefix_caching=False) as engine,
        bind("127.0.0.1", 0) as listener,
    ):
        app = create_app(engine, None, chosen)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", engine)
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def plan(models: Callable[..., Path], plans: Callable[..., Path]) -> tuple[Path, Path]:
    model = models("llama")
    return plans(model, kvp=2, num_pages=700, context=4000), model


@pytest.fixture(scope="module")
def served(plan: tuple[Path, Path], nursery: NurseryProcess) -> Iterator[Served]:
    with serving(*plan, nursery, news_every_s=0.02) as running:
        yield running


def comments(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.splitlines() if line.startswith(":")]
    return [json.loads(line.removeprefix(": prefill ")) for line in lines]


def test_an_answer_says_what_was_predicted_and_what_came_of_it(served: Served) -> None:
    served.post(LONG)  # from which it is learnt how far this machine is from the invented costs
    response = served.post({**LONG, "n": 2})
    predicted = float(response.headers["X-Predicted-TTFT-Seconds"])
    measured = float(response.headers["X-Measured-TTFT-Seconds"])
    assert 0 < measured < 60
    assert measured / 8 < predicted < measured * 8


def test_a_stream_tells_how_far_its_prompt_is_and_is_a_stream_as_ever(served: Served) -> None:
    response = served.post({**LONG, "stream": True})
    assert float(response.headers["X-Predicted-TTFT-Seconds"]) > 0
    told = comments(response.text)
    assert told[0]["done"] < 3900, "the first comment comes at once"
    assert [one["done"] for one in told] == sorted(one["done"] for one in told)
    assert any(0 < one["done"] < 3900 for one in told), "it is told while it prefills"
    for one in told:
        assert one["total"] == 3900
        assert one["percent"] == round(100 * one["done"] / 3900, 1)
        assert one["eta_s"] >= 0
        assert one["state"] in ("queued", "prefill")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        name = str(served.engine.manifest.model["name"])
        stream = client.completions.create(model=name, prompt=[1] * 900, max_tokens=3, stream=True)
        assert len(list(stream)) >= 1


def test_no_stream_is_silent_for_long(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {**LONG, "prompt": [1] * 50, "max_tokens": 200, "stream": True}
    assert {one["state"] for one in comments(served.post(body).text)} <= {"queued", "prefill"}
    monkeypatch.setattr(following, "SILENCE_S", 0.0)
    assert "decode" in {one["state"] for one in comments(served.post(body).text)}


def test_requests_are_shown_while_they_run_and_a_while_after(served: Served) -> None:
    body = {**LONG, "stream": True, "ttft_slo_s": 50.0, "max_tokens": 60}
    url, named = f"{served.url}/v1/completions", {"X-Request-Id": "a-book"}
    with httpx.stream("POST", url, json=body, headers=named, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        shown = served.get("/requests")["data"][0]
        (answer,) = shown["answers"]
        assert answer["state"] in ("queued", "prefill")
        assert 0 <= answer["eta_s"] <= answer["left_s"]
        assert len(answer["groups"]) == (2 if answer["prefilled"] > 96 else answer["prefilled"] > 0)
        assert shown["object"] == "request" and shown["stream"]
        assert (answer["prompt"], answer["max_tokens"]) == (3900, 60)
        assert (answer["deadline_s"], answer["kept"]) == (50.0, True)
        assert answer["predicted_ttft_s"] > 0
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert shown["id"] == "a-book"
    over = served.get("/requests/a-book")
    assert served.get(f"/requests/{json.loads(data[0])['id']}") == over, "the answer's id does too"
    (answer,) = over["answers"]
    assert answer["state"] == "finished" and answer["finish"] == "length"
    assert answer["generated"] == 60 and answer["ttft_s"] > 0
    gone = httpx.delete(f"{served.url}/requests/{shown['id']}")
    assert gone.status_code == 409
    assert httpx.get(f"{served.url}/requests/nobody").status_code == 404


def test_a_request_that_is_deleted_ends_properly_and_frees_its_pages(served: Served) -> None:
    body = {**LONG, "stream": True, "max_tokens": 90}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        id = served.get("/requests")["data"][0]["id"]
        assert httpx.delete(f"{served.url}/requests/{id}").status_code == 200
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    assert json.loads(data[-2])["choices"][0]["finish_reason"] == "abort"
    assert served.engine.kv_used_fraction == 0
    assert served.get(f"/requests/{id}")["answers"][0]["state"] == "aborted"


def test_a_whole_answer_can_be_deleted_too(served: Served) -> None:
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(served.post({**LONG, "max_tokens": 90}))
    )
    asking.start()
    while not (
        shown := [one for one in served.get("/requests")["data"] if "eta_s" in one["answers"][0]]
    ):
        time.sleep(0.005)
    httpx.delete(f"{served.url}/requests/{shown[0]['id']}")
    asking.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["choices"][0]["finish_reason"] == "abort"


def test_of_a_stream_that_nobody_reads_nobody_asks_the_engine() -> None:
    answers: Any = SimpleNamespace(handles=[SimpleNamespace(tokens=[])], behind=False)
    followed = following.Followed("slow", True, answers, following=None)  # type: ignore[arg-type]
    assert followed.in_want() == answers.handles
    answers.behind = True
    assert followed.in_want() == []


def test_a_strict_server_refuses_what_it_could_not_keep_and_says_when_it_could(
    plan: tuple[Path, Path], nursery: NurseryProcess
) -> None:
    with serving(*plan, None, strict_slo=True) as served:  # a nursery has one engine at a time
        body = {**LONG, "prompt": [1] * 1500}
        patient = {**body, "ttft_slo_s": 600.0}
        for _ in range(5):
            alone = served.post(patient)
        predicted, measured = "X-Predicted-TTFT-Seconds", "X-Measured-TTFT-Seconds"
        alone_s = max(float(alone.headers[predicted]), float(alone.headers[measured]))
        ahead = {**LONG, "ttft_slo_s": 600.0}
        threads = [threading.Thread(target=served.post, args=(ahead,)) for _ in range(5)]
        for thread in threads:
            thread.start()
        while served.engine.num_running + served.engine.num_waiting < 5:
            time.sleep(0.001)
        refused = served.post({**body, "ttft_slo_s": 3 * alone_s})
        assert refused.status_code == 429, refused.text
        error = refused.json()["error"]
        assert error["code"] == "promise_cannot_be_kept"
        assert error["predicted_ttft_s"] > error["promised_ttft_s"] == pytest.approx(3 * alone_s)
        later_s = error["predicted_ttft_s"] - error["promised_ttft_s"]
        assert error["retry_after_s"] == pytest.approx(later_s)
        assert int(refused.headers["Retry-After"]) >= later_s
        assert "try again in" in error["message"]
        assert served.engine.stats.refused == 1
        for thread in threads:
            thread.join()
        assert served.post({**body, "ttft_slo_s": 9 * alone_s}).status_code == 200
        never = served.post({**body, "ttft_slo_s": alone_s / 100})
        assert never.status_code == 400
        assert "the prompt alone takes" in never.json()["error"]["message"]
        assert "Retry-After" not in never.headers
