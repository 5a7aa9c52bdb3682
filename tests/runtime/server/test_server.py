"""The HTTP server, asked by the official OpenAI client and by bare HTTP."""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from mnemoc.errors import BadInput
from mnemoc.runtime import Engine, Request, Sampling
from mnemoc.runtime.executor.workers import NurseryProcess
from mnemoc.runtime.server import bind, create_app, serve
from mnemoc.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Served:
    """A server in a thread of this process, and the engine behind it."""

    url: str
    engine: Engine
    tokenizer: Tokenizer

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def name(self) -> str:
        return str(self.engine.manifest.model["name"])

    def greedy_text(self, prompt: str, max_tokens: int) -> str:
        """What the engine itself says."""
        sampling = Sampling(ignore_eos=True)
        request = Request(self.tokenizer.encode(prompt), max_tokens, sampling)
        return self.tokenizer.decode(self.engine.submit(request).result().tokens)


@pytest.fixture(scope="module")
def served(
    models: Callable[..., Path], plans: Callable[..., Path], nursery: NurseryProcess
) -> Iterator[Served]:
    model = models("llama")
    plan = plans(model, kvp=2, num_pages=128, context=1500)
    with Engine.start(plan, model, nursery=nursery) as engine, bind("127.0.0.1", 0) as listener:
        tokenizer = Tokenizer(model)
        app = create_app(engine, tokenizer)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, tokenizer)
        server.should_exit = True
        thread.join()


GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


def test_a_completion_is_what_the_engine_says(served: Served) -> None:
    with served.client as client:
        answer = client.completions.create(
            model=served.name, prompt="once upon", max_tokens=24, **GREEDY
        )
    assert answer.choices[0].text == served.greedy_text("once upon", 24)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(served.tokenizer.encode("once upon"))
    assert answer.usage.completion_tokens == 24


def test_a_stream_adds_up_to_the_completion_and_ends_with_usage(served: Served) -> None:
    with served.client as client:
        stream = client.completions.create(
            model=served.name,
            prompt="a stream",
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
        events = list(stream)
    text = "".join(event.choices[0].text for event in events if event.choices)
    assert text == served.greedy_text("a stream", 40)
    assert events[-2].choices[0].finish_reason == "length"
    assert events[-1].choices == []
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 40


def test_the_asynchronous_client_streams_many_at_once(served: Served) -> None:
    async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model=served.name, prompt=prompt, max_tokens=16, stream=True, **GREEDY
        )
        return "".join([event.choices[0].text async for event in stream])

    async def ask_all(prompts: Sequence[str]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    prompts = [f"number {i}" for i in range(6)]
    assert asyncio.run(ask_all(prompts)) == [served.greedy_text(text, 16) for text in prompts]


def test_several_prompts_and_several_answers_come_in_order(served: Served) -> None:
    with served.client as client:
        prompts = [list(served.tokenizer.encode(text)) for text in ("one", "another")]
        answer = client.completions.create(
            model=served.name, prompt=prompts, n=2, max_tokens=8, **GREEDY
        )
    one, another = served.greedy_text("one", 8), served.greedy_text("another", 8)
    assert [choice.text for choice in answer.choices] == [one, one, another, another]


def test_chat_answers_in_the_assistants_role_whole_and_streamed(served: Served) -> None:
    conversation: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    with served.client as client:
        whole = client.chat.completions.create(
            model=served.name, messages=conversation, max_completion_tokens=12, **GREEDY
        )
        stream = client.chat.completions.create(
            model=served.name, messages=conversation, max_tokens=12, stream=True, **GREEDY
        )
        deltas = [event.choices[0].delta for event in stream]
    assert whole.choices[0].message.role == "assistant"
    expected = served.greedy_text("system: be brief\nuser: hello\nassistant:", 12)
    assert whole.choices[0].message.content == expected
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == expected


def test_a_stop_string_ends_the_answer_before_itself(served: Served) -> None:
    text = served.greedy_text("stop here", 40)
    stop = text[10:13]
    with served.client as client:
        answer = client.completions.create(
            model=served.name, prompt="stop here", max_tokens=40, stop=[stop, "never"], **GREEDY
        )
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_seed_makes_sampling_repeatable(served: Served) -> None:
    with served.client as client:
        texts = [
            client.completions.create(
                model=served.name, prompt="dice", max_tokens=16, temperature=1.5, seed=seed
            )
            .choices[0]
            .text
            for seed in (1, 1, 2)
        ]
    assert texts[0] == texts[1] != texts[2]


def test_a_bias_and_penalties_change_what_comes(served: Served) -> None:
    with served.client as client:
        ask = functools.partial(
            client.completions.create, model=served.name, prompt=[5, 6], max_tokens=12
        )
        forced = ask(logit_bias={"65": 100}, logprobs=0, **GREEDY).choices[0]
        fresh = ask(frequency_penalty=2, presence_penalty=2, logprobs=0, **GREEDY).choices[0]
    assert forced.text == served.tokenizer.decode([65]) * 12
    assert fresh.logprobs is not None
    assert fresh.logprobs.tokens is not None
    assert len(set(fresh.logprobs.tokens)) > len(fresh.logprobs.tokens) / 2


def test_a_completion_gives_logprobs_whole_and_streamed(served: Served) -> None:
    with served.client as client:
        ask = functools.partial(
            client.completions.create, model=served.name, prompt="how likely", max_tokens=9
        )
        whole = ask(logprobs=3, **GREEDY).choices[0]
        events = [event.choices[0].logprobs for event in ask(logprobs=3, stream=True, **GREEDY)]
    logprobs = whole.logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.token_logprobs == [max(top.values()) for top in logprobs.top_logprobs]
    assert all(0 < len(top) <= 3 for top in logprobs.top_logprobs)
    assert logprobs.text_offset is not None
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    assert len(logprobs.tokens or ()) == 9
    pieces = [event for event in events if event is not None]
    for field in ("tokens", "text_offset"):
        streamed = [value for piece in pieces for value in getattr(piece, field)]
        assert streamed == getattr(logprobs, field)
    streamed = [value for piece in pieces for value in piece.token_logprobs or ()]
    assert streamed == pytest.approx(logprobs.token_logprobs, abs=1e-5)


def test_a_chat_gives_logprobs_whole_and_streamed(served: Served) -> None:
    with served.client as client:
        ask = functools.partial(
            client.chat.completions.create,
            model=served.name,
            messages=[{"role": "user", "content": "how likely"}],
            max_tokens=9,
            logprobs=True,
            top_logprobs=2,
        )
        whole = ask(**GREEDY).choices[0]
        events = [event.choices[0].logprobs for event in ask(stream=True, **GREEDY)]
    assert whole.logprobs is not None
    content = whole.logprobs.content or []
    assert len(content) == 9
    for entry in content:
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == entry.top_logprobs[0].logprob > entry.top_logprobs[1].logprob
    said = b"".join(bytes(entry.bytes or ()) for entry in content)
    assert said.decode(errors="replace") == whole.message.content
    streamed = [entry for event in events if event for entry in event.content or ()]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in content]


def test_many_requests_at_once_are_batched_and_each_gets_its_own_answer(served: Served) -> None:
    prompts = [f"request {i} " * (i % 7 + 1) for i in range(12)]
    alone = [served.greedy_text(prompt, 16) for prompt in prompts]
    together: dict[str, str] = {}

    def ask(prompt: str) -> None:
        with served.client as client:
            answer = client.completions.create(
                model=served.name, prompt=prompt, max_tokens=16, **GREEDY
            )
            together[prompt] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[prompt] for prompt in prompts] == alone
    assert max(iteration.decodes for iteration in served.engine.stats.iterations) > 1


LONG = {"prompt": [1] * 1000, "max_tokens": 900, "ignore_eos": True}


def pages_are_taken(engine: Engine) -> bool:
    """The stream's first bytes may come before the engine has admitted the request."""
    deadline = time.monotonic() + 20
    while engine.kv_used_fraction == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    return engine.kv_used_fraction > 0


def pages_are_freed(engine: Engine) -> bool:
    deadline = time.monotonic() + 20
    while engine.kv_used_fraction > 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    return engine.kv_used_fraction == 0 and engine.num_running == 0


def test_a_client_that_leaves_frees_its_pages(served: Served) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/completions", json=LONG, timeout=0.3)
    assert pages_are_freed(served.engine)


def test_a_client_that_leaves_its_stream_frees_its_pages(served: Served) -> None:
    body = {**LONG, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body) as response:
        stream = response.iter_bytes()  # kept: with it would go the connection
        next(stream)
        assert pages_are_taken(served.engine)
    assert pages_are_freed(served.engine)
    assert served.engine.stats.cancelled > 0


def test_models_health_and_metrics_answer(served: Served) -> None:
    with served.client as client:
        assert [model.id for model in client.models.list()] == [served.name]
    health = httpx.get(f"{served.url}/health")
    assert (health.status_code, health.content) == (200, b"")
    served.greedy_text("something to count", 3)
    metrics = httpx.get(f"{served.url}/metrics").text
    assert "mnemoc:generation_tokens_total{" in metrics
    assert "mnemoc:time_to_first_token_seconds_bucket{" in metrics
    assert "mnemoc:kv_cache_usage_perc{" in metrics


def sample(text: str, name: str) -> float:
    """A counter or gauge in the text that /metrics gives."""
    lines = text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"mnemoc:{name}{{"))


def test_prefix_hits_are_counted_by_the_names_that_dashboards_know(served: Served) -> None:
    names = ("prefix_cache_queries_total", "prefix_cache_hits_total", "prompt_tokens_total")
    before = httpx.get(f"{served.url}/metrics").text
    prompt = [11, 12, 13] * 70
    page_size = served.engine.manifest.plan.page_size
    for _ in range(2):
        body = {"prompt": prompt, "max_tokens": 2, "ignore_eos": True}
        httpx.post(f"{served.url}/v1/completions", json=body)
    hits = (len(prompt) - 1) // page_size * page_size  # a last token is always computed
    after = httpx.get(f"{served.url}/metrics").text
    queries, found, prefilled = (sample(after, name) - sample(before, name) for name in names)
    assert (queries, found) == (2 * len(prompt), hits)
    assert prefilled == queries - found


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"prompt": [1] * 1501}, 400, "the prompt has 1,501 tokens, the plan is for 1.5K"),
        ({"prompt": [1] * 1500, "max_tokens": 9000}, 400, "KV pages of a group, the plan has"),
        ({"prompt": [400]}, 400, "token ids lie in 0..319"),
        ({"prompt": []}, 400, "the prompt is empty"),
        ({"prompt": "a", "temperature": 3}, 400, "temperature"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "a", "logprobs": 21}, 400, "logprobs"),
        ({"prompt": "a", "best_of": 3}, 400, "not served"),
        ({"prompt": "a", "logit_bias": {"320": 1}}, 400, "logit_bias: token ids lie in 0..319"),
        ({"prompt": "a", "min_tokens": 9, "max_tokens": 8}, 400, "at most max_tokens"),
        ({"prompt": "a", "colour": "red"}, 400, "colour"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream is true"),
        ({"max_tokens": 3}, 400, "prompt"),
        ({"prompt": "a", "model": "gpt-5"}, 404, "not served here"),
    ],
)
def test_a_bad_request_gets_a_sentence_in_openais_form(
    served: Served, body: dict[str, Any], status: int, says: str
) -> None:
    response = httpx.post(f"{served.url}/v1/completions", json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


def test_malformed_json_and_unknown_paths_get_the_same_form(served: Served) -> None:
    broken = httpx.post(
        f"{served.url}/v1/completions",
        content=b"{nope",
        headers={"content-type": "application/json"},
    )
    assert (broken.status_code, "error" in broken.json()) == (400, True)
    nowhere = httpx.get(f"{served.url}/v2/nothing")
    assert (nowhere.status_code, "error" in nowhere.json()) == (404, True)


def test_the_client_library_raises_its_own_errors(served: Served) -> None:
    with served.client as client:
        with pytest.raises(openai.BadRequestError, match="1,501 tokens"):
            client.completions.create(model=served.name, prompt=[1] * 1501)
        with pytest.raises(openai.NotFoundError, match="not served here"):
            client.completions.create(model="other", prompt="a")


def test_a_port_in_use_is_refused_before_anything_starts(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            BadInput, match=f"{port}: cannot listen: address already in use; choose"
        ):
            serve(tmp_path / "no plan", models("llama"), "127.0.0.1", port)


def test_an_impossible_port_or_host_is_bad_input() -> None:
    with pytest.raises(BadInput, match=r"0\.\.65535"):
        bind("127.0.0.1", 70000)
    with pytest.raises(BadInput):
        bind("no.such.host.invalid", 80)


def test_a_client_may_be_given_as_long_as_anybody_likes() -> None:
    with bind("127.0.0.1", 0, send_s=1e9) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) > 0
