"""When the engine gives up on its workers, and what a client is told of a request that kills them."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from mnemoc.errors import RuntimeFault
from mnemoc.runtime import recovery
from mnemoc.runtime.executor import workers
from mnemoc.runtime.executor.launcher import Lost
from mnemoc.runtime.executor.suspects import Deadly, Violence
from mnemoc.runtime.recovery import MAX_RESTARTS, STEADY_S, Recovery
from mnemoc.runtime.server.problems import report_errors


@pytest.mark.parametrize(
    ("load_s", "well_s", "gives_up"),
    [(1.0, 1.0, True), (1.0, STEADY_S + 1, False), (STEADY_S + 1, 1.0, True)],
)
def test_restarts_in_a_row_end_the_engine_unless_workers_were_well_in_between(
    load_s: float, well_s: float, gives_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now_s=1000.0)
    monkeypatch.setattr(recovery, "now_s", lambda: clock.now_s)
    spawned: list[float] = []
    plan = SimpleNamespace(plan=SimpleNamespace(target="cpu"))
    flights = SimpleNamespace(replay=lambda error: False)
    workers = SimpleNamespace(spawn=lambda: spawned.append(clock.now_s))
    watch = Recovery(cast(Any, plan), cast(Any, flights), cast(Any, workers), 20.0)

    def fall(times: int) -> None:
        for _ in range(times):
            clock.now_s += load_s
            watch.ready()
            clock.now_s += well_s
            watch.restart(RuntimeFault("gone"))

    fall(MAX_RESTARTS)
    if gives_up:
        with pytest.raises(RuntimeFault, match="gave up after 3 restarts: gone"):
            fall(1)
    else:
        fall(MAX_RESTARTS)
    assert len(spawned) == MAX_RESTARTS * (1 if gives_up else 2)


@pytest.mark.parametrize(
    ("code", "more_oom_kills", "blamed"),
    [(-9, 0.0, False), (-9, 1.0, True), (-9, math.nan, True), (-11, 0.0, True), (1, 0.0, True)],
)
def test_whom_somebody_killed_no_request_is_blamed_for(
    code: int, more_oom_kills: float, blamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = iter([0.0, more_oom_kills])
    monkeypatch.setattr(workers, "_oom_kills", lambda: next(kills))
    heard = b'{"died": 0, "code": %d, "token": "us"}\n' % code
    nursery = workers.NurseryProcess.__new__(workers.NurseryProcess)
    read, write = os.pipe()
    os.write(write, heard)
    nursery.process = cast(Any, SimpleNamespace(stdout=SimpleNamespace(fileno=lambda: read)))
    nursery._token, nursery._oom_kills = "us", workers._oom_kills()
    (lost,) = nursery.hear()
    assert isinstance(lost, Lost)
    assert isinstance(lost.error, Violence) is not blamed
    os.close(read)
    os.close(write)


def test_clients_are_told_not_to_send_again_what_kills_the_workers() -> None:
    app = FastAPI()
    report_errors(app)

    @app.get("/")
    async def ask() -> None:
        raise Deadly("the workers died 3 times in a row over this request")

    answer = TestClient(app).get("/")
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    assert "died 3 times" in answer.json()["error"]["message"]
