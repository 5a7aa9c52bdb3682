"""The log: what it says of requests and workers, and what a disk that is full does to it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from mnemoc.errors import BadInput, RuntimeFault
from mnemoc.runtime import Engine, Request, Sampling
from mnemoc.runtime.executor.workers import NurseryProcess
from mnemoc.runtime.request import Promise
from mnemoc.runtime.server import Options, create_app
from mnemoc.runtime.server.chronicle import AT_ONCE, WAITING, Chronicle, Entry
from mnemoc.runtime.server.journal import Journal, as_text
from mnemoc.runtime.server.serve import chronicled
from mnemoc.runtime.tokenizer import Tokenizer

Serving = Callable[..., AbstractContextManager[str]]
SECRET = "a prompt that nobody else may read"


@pytest.fixture(scope="module")
def engine(
    models: Callable[..., Path], plans: Callable[..., Path], nursery: NurseryProcess
) -> Iterator[Engine]:
    model = models("llama")
    with Engine.start(plans(model, context=600), model, nursery=nursery) as engine:
        yield engine


def lines(path: Path, event: str, count: int = 1) -> list[dict[str, Any]]:
    """The events of a kind, once there are so many."""
    deadline_s = time.monotonic() + 10
    while True:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        chosen = [one for one in found if one["event"] == event]
        if len(chosen) >= count or time.monotonic() > deadline_s:
            return chosen
        time.sleep(0.02)


def test_each_line_about_a_request_has_its_id_and_none_has_its_prompt(
    engine: Engine, models: Callable[..., Path], serving: Serving, tmp_path: Path
) -> None:
    path = tmp_path / "log.jsonl"
    options = Options(log_format="json", log_file=path)
    with chronicled(options) as chronicle:
        app = create_app(engine, Tokenizer(models("llama")), options, None, chronicle)
        with serving(app) as url:
            body = {"prompt": SECRET, "max_tokens": 7, "ignore_eos": True, "n": 2}
            named = {"X-Request-Id": "order-66"}
            assert httpx.post(f"{url}/v1/completions", json=body, headers=named).is_success
            refused = {"prompt": SECRET, "temperature": 9}
            assert httpx.post(f"{url}/v1/completions", json=refused).status_code == 400
            httpx.get(f"{url}/health")
            ended = lines(path, "ended", 2)
            http = lines(path, "http", 2)
    assert sorted(one.get("answer", 0) for one in ended) == [0, 1]
    for event in ("received", "admitted", "first_token", "ended"):
        assert [one["request_id"] for one in lines(path, event, 2)] == ["order-66"] * 2
    for one in ended:
        assert (one["finish_reason"], one["generated_tokens"]) == ("length", 7)
        assert 0 < one["ttft_s"] <= one["e2e_s"]
        assert one["prompt_tokens"] > 0 and one["time"].endswith("Z")
    assert [(one["path"], one["status"]) for one in http] == [
        ("/v1/completions", 200),
        ("/v1/completions", 400),
    ]
    assert SECRET not in path.read_text()


def test_a_promise_that_is_missed_and_workers_that_die_are_told(
    engine: Engine, tmp_path: Path
) -> None:
    path = tmp_path / "log.jsonl"
    with Chronicle([Journal("json", path)]) as chronicle:
        engine.watched_by(chronicle)
        late = Promise(ttft_s=1e-6, tbt_s=1e-6)
        engine.submit(Request([1] * 20, 5, Sampling(ignore_eos=True), promise=late)).result()
        missed = lines(path, "promise_missed", 2)
        chronicle.lost(RuntimeFault("worker 0 died (killed by SIGKILL)"))
        chronicle.back()
        (lost,) = lines(path, "workers_lost")
        (back,) = lines(path, "workers_up")
    assert [one["promise"] for one in missed] == ["ttft", "tbt"], "each once, however many tokens"
    assert missed[0]["took_s"] > missed[0]["promised_s"]
    assert (lost["level"], lost["error"]) == ("error", "worker 0 died (killed by SIGKILL)")
    assert back["level"] == "info"


def test_what_other_loggers_say_is_in_the_log_with_its_trace(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with chronicled(Options(log_format="json", log_file=path)):
        try:
            raise ValueError("of ours")
        except ValueError:
            logging.getLogger("mnemoc.server").exception("a request failed")
    (said,) = lines(path, "message")
    assert (said["logger"], said["message"]) == ("mnemoc.server", "a request failed")
    assert "ValueError: of ours" in said["trace"]


def test_text_is_one_line_an_event_that_can_be_split_again() -> None:
    entry = Entry(
        0.0, "info", "http", {"path": "/a b", "text": 'say "x"\n', "status": 200, "no": None}
    )
    said = as_text(entry)
    assert said == (
        '1970-01-01T00:00:00.000Z info    http path="/a b" text="say \\"x\\"\\n" status=200'
    )


def test_a_full_disk_loses_lines_and_nothing_else(engine: Engine, serving: Serving) -> None:
    options = Options(log_format="json", log_file=Path("/dev/full"))
    with chronicled(options) as chronicle:
        assert chronicle is not None
        with serving(create_app(engine, None, options, None, chronicle)) as url:
            for _ in range(3):
                body = {"prompt": [1, 2, 3], "max_tokens": 2, "ignore_eos": True}
                assert httpx.post(f"{url}/v1/completions", json=body).is_success
            deadline_s = time.monotonic() + 20
            while chronicle.missing < 12 and time.monotonic() < deadline_s:
                time.sleep(0.02)
            metrics = httpx.get(f"{url}/metrics").text
            assert httpx.get(f"{url}/health").status_code == 200
    (told,) = [
        one for one in metrics.splitlines() if one.startswith("mnemoc:log_events_lost_total")
    ]
    assert float(told.split()[-1]) >= 12


SHORT_OF_SPACE = """
import json, resource, signal, sys, time
from pathlib import Path
from mnemoc.runtime.server.chronicle import Entry
from mnemoc.runtime.server.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
journal = Journal("json", path)
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (150, most))
for i in range(6):
    journal.write([Entry(0.0, "info", "kept", {"i": i})])
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
journal.write([Entry(0.0, "info", "again", {})])
print(journal.lost)
"""


def test_when_there_is_room_again_the_log_says_what_it_lost(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    run = subprocess.run(
        [sys.executable, "-c", SHORT_OF_SPACE, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    whole, torn = [], 0
    for line in path.read_text().splitlines():
        try:
            whole.append(json.loads(line))
        except ValueError:
            torn += 1
    kept = [one["i"] for one in whole if one["event"] == "kept"]
    assert torn == 1, "the line that the disk cut, and it spoils no other"
    assert kept == list(range(len(kept))) and 0 < len(kept) < 6
    assert [one["event"] for one in whole[-2:]] == ["log_lines_lost", "again"]
    assert whole[-2]["lines"] == int(run.stdout) == 6 - len(kept)


def test_a_log_that_was_moved_away_goes_on_in_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    journal = Journal("text", path)
    journal.write([Entry(0.0, "info", "one", {})])
    path.rename(tmp_path / "log.1")
    journal.write([Entry(0.0, "info", "two", {})])
    journal.close()
    assert "one" in (tmp_path / "log.1").read_text()
    assert "two" in path.read_text() and "one" not in path.read_text()


def test_a_log_that_cannot_be_opened_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot write: No such file or directory"):
        Journal("json", tmp_path / "nowhere" / "log")


class Stuck:
    """A disk that hangs until it is let go."""

    def __init__(self) -> None:
        self.lost = 0
        self.free = threading.Event()

    def write(self, entries: Sequence[Entry]) -> None:
        self.free.wait()

    def close(self) -> None: ...


def test_a_disk_that_hangs_holds_up_nobody_and_takes_no_more_memory() -> None:
    stuck = Stuck()
    chronicle = Chronicle([stuck])
    began_s = time.monotonic()
    for _ in range(WAITING + AT_ONCE + 1000):
        chronicle.note("info", "event")
    assert time.monotonic() - began_s < 20
    assert chronicle.missing >= 1000
    stuck.free.set()
    chronicle.close()
