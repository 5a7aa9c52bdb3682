"""The live page, in a real browser and over a real engine under load; its data; snapshots."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from mnemoc.runtime import Engine, Request, Sampling
from mnemoc.runtime.executor.workers import NurseryProcess
from mnemoc.runtime.request import Handle, Origin
from mnemoc.runtime.server import Options, create_app
from mnemoc.runtime.server.live import SHOWN, load_page
from mnemoc.runtime.server.options import Limits
from mnemoc.runtime.telemetry.snapshot import Look, Snapshot

Serving = Callable[..., AbstractContextManager[str]]
SAMPLING = Sampling(ignore_eos=True)
EVIL = "<img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def engine(
    models: Callable[..., Path], plans: Callable[..., Path], nursery: NurseryProcess
) -> Iterator[Engine]:
    """Two KVP groups; chunks so small that a long prompt takes seconds."""
    model = models("llama")
    plan = plans(model, kvp=2, num_pages=2048, context=30_000, stripe_tokens=96, max_rows=64)
    with Engine.start(plan, model, nursery=nursery) as engine:
        yield engine


def look(engine: Engine, most: int = 10, wanted: tuple[int, ...] = ()) -> Snapshot:
    taken: list[Snapshot] = []
    came = threading.Event()

    def take(snapshot: Snapshot) -> None:
        taken.append(snapshot)
        came.set()

    assert engine.look(Look(take, most, wanted))
    assert came.wait(30)
    return taken[0]


def submit(engine: Engine, length: int, tokens: int, name: str = "") -> Handle:
    ids = [1 + i % 300 for i in range(length)]
    request = Request(ids, tokens, SAMPLING, origin=Origin(name))
    return engine.submit(request, lambda event: None)


def wait_for(what: Callable[[], bool], seconds: float = 20) -> None:
    deadline_s = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline_s, "it did not come to pass"
        time.sleep(0.02)


def test_of_an_engine_that_has_ended_the_page_still_hears(
    models: Callable[..., Path],
    plans: Callable[..., Path],
    nursery: NurseryProcess,
    serving: Serving,
) -> None:
    """The first test: a nursery serves one engine after another."""
    model = models("llama")
    with Engine.start(plans(model), model, nursery=nursery) as ended:
        app = create_app(ended, None)
    with serving(app) as url:
        live = httpx.get(f"{url}/live").json()
    assert live["healthy"] is False and live["requests"] == []


def test_a_snapshot_shows_who_is_where(engine: Engine) -> None:
    long = submit(engine, 20_000, 50, "long")
    short = submit(engine, 20, 5000)
    wait_for(lambda: bool(short.tokens) and long.progress is not None)
    seen = look(engine, wanted=(short.id, 10**9))
    one = next(one for one in seen.requests if one.id == long.id)
    assert (one.name, one.state, one.prompt, one.generated) == ("long", "prefill", 20_000, 0)
    assert 0 < one.prefilled < 20_000
    assert one.eta_s is not None and one.eta_s > 0 and one.ttft_s is None
    (other,) = seen.wanted.values()
    assert other.state == "decode" and other.ttft_s is not None and other.eta_s is None
    assert seen.counts == {"prefill": 1, "queued": 0, "preempted": 0, "decode": 1}
    assert all(group.total == 2048 and group.held > 0 for group in seen.groups)
    assert any(long.id == id for batch in seen.batches for id, _ in batch.chunks)
    assert look(engine, most=1).requests[0].id == long.id, "first those that wait for a token"
    for handle in (long, short):
        handle.cancel()
    wait_for(lambda: not sum(look(engine).counts.values()))


def test_hundreds_of_requests_make_a_small_answer(engine: Engine, serving: Serving) -> None:
    handles = [submit(engine, 10, 3000) for _ in range(300)]
    with serving(create_app(engine, None)) as url:
        wait_for(lambda: sum(look(engine).counts.values()) == 300)
        answer = httpx.get(f"{url}/live")
        again = httpx.get(f"{url}/live")
    for handle in handles:
        handle.cancel()
    live = answer.json()
    assert len(live["requests"]) == SHOWN and sum(live["counts"].values()) == 300
    assert len(answer.content) < 30_000
    assert again.content == answer.content, "those who ask at once get one look"
    wait_for(lambda: not sum(look(engine).counts.values()))


def test_the_page_may_run_nothing_but_its_own_script() -> None:
    page, headers = load_page()
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy
    assert "http" not in page, "it asks nobody else for anything"
    assert "innerHTML" not in page


# ------------------------------------------------------------------------------ in a browser


@pytest.fixture
def tab(chromium: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A tab with the options of the test's parameter; it must not complain of anything."""
    context = chromium.new_context(**getattr(request, "param", {}))
    page = context.new_page()
    page.said = []
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("console", lambda told: page.said.append(told.text))
    yield page
    context.close()


def row(page: Any, name: str) -> Any:
    return page.locator("#requests tr", has_text=name)


def prefilled(page: Any, name: str) -> int:
    return int(row(page, name).locator("[role=progressbar]").get_attribute("aria-valuenow"))


@pytest.mark.browser
def test_progress_moves_and_a_request_that_is_over_disappears(
    tab: Any, engine: Engine, serving: Serving
) -> None:
    with serving(create_app(engine, None)) as url:
        long = submit(engine, 25_000, 40, "the long one")
        evil = submit(engine, 30, 4000, EVIL)
        tab.goto(url)
        row(tab, "the long one").wait_for()
        first = prefilled(tab, "the long one")
        assert "left" in row(tab, "the long one").inner_text()
        wait_for(lambda: prefilled(tab, "the long one") > first)
        assert row(tab, EVIL).locator("td").first.inner_text() == EVIL
        assert "onerror" in tab.content() and tab.title() != "owned"
        assert tab.locator("#batches li").count() > 3
        assert "rows of the long one" in tab.inner_text("#batches")
        assert tab.locator("#groups li").count() == 2
        assert tab.inner_text("#status").startswith("serving for ")
        long.cancel()
        row(tab, "the long one").wait_for(state="detached")
        evil.cancel()
        tab.get_by_text("none just now").wait_for()
    assert tab.said == []


@pytest.mark.browser
def test_the_page_goes_on_once_the_server_is_back(
    tab: Any, engine: Engine, serving: Serving
) -> None:
    with serving(create_app(engine, None)) as url:
        tab.goto(url)
        tab.get_by_text("serving for").wait_for()
    tab.get_by_text("the server does not answer").wait_for()
    with serving(create_app(engine, None), int(url.rpartition(":")[2])):
        tab.get_by_text("serving for").wait_for()


@pytest.mark.browser
def test_a_key_is_asked_for_once_a_tab_and_is_in_no_address(
    tab: Any, engine: Engine, serving: Serving
) -> None:
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    locked = Options(limits=Limits(api_keys=("sesame",)))
    with serving(create_app(engine, None, locked)) as url:
        tab.goto(url)
        tab.get_by_label("This server asks for an API key").fill("wrong")
        tab.keyboard.press("Enter")
        tab.get_by_text("not one of this server's").wait_for()
        tab.get_by_label("This server asks for an API key").fill("sesame")
        tab.keyboard.press("Enter")
        tab.get_by_text("serving for").wait_for()
        assert not tab.locator("#key").is_visible()
        tab.reload()
        tab.get_by_text("serving for").wait_for()
    assert not [address for address in asked if "sesame" in address]


PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


@pytest.mark.browser
@pytest.mark.parametrize("tab", [PHONE, {**PHONE, "color_scheme": "dark"}], indirect=True)
def test_a_phone_shows_it_without_scrolling_sideways(
    tab: Any, engine: Engine, serving: Serving
) -> None:
    name = "a-name-that-is-far-too-long-for-a-phone-" + "x" * 80
    handle = submit(engine, 20_000, 10, name)
    with serving(create_app(engine, None)) as url:
        tab.goto(url)
        row(tab, name).wait_for()
        width = tab.evaluate("document.documentElement.scrollWidth")
        before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        tab.locator("#theme").tap()
        after = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    handle.cancel()
    wait_for(lambda: not sum(look(engine).counts.values()))
    assert width == 360
    assert before != after


def test_the_data_is_plain_json(engine: Engine, serving: Serving) -> None:
    with serving(create_app(engine, None)) as url:
        text = httpx.get(f"{url}/live").text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
