"""What a running engine records: the same file as a simulation's, as far as it knows."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from mnemoc.runtime import Engine, Request, Sampling
from mnemoc.runtime.executor.workers import NurseryProcess

GREEDY = Sampling(ignore_eos=True)


def test_micro_batches_and_requests_are_recorded(
    models: Callable[..., Path],
    plans: Callable[..., Path],
    nursery: NurseryProcess,
    tmp_path: Path,
    read_trace: Callable[[Path], list[dict[str, Any]]],
) -> None:
    model, file = models("qwen3"), tmp_path / "trace.json.gz"
    with Engine.start(plans(model, spp=2, kvp=2), model, nursery=nursery, trace_out=file) as engine:
        asked = [engine.submit(Request(range(1, 200 + i), 5, GREEDY)) for i in range(3)]
        gone = engine.submit(Request(range(1, 300), 500, GREEDY))
        next(iter(gone))
        gone.cancel()
        for handle in asked:
            handle.result()
        assert not file.exists()
    events = read_trace(file)
    phases = [e["name"] for e in events if e["pid"] == 4 and e["ph"] == "b"]
    warmed_up = 2  # a request for each KVP group
    assert phases.count("queued") == phases.count("prefill") == warmed_up + 4
    assert phases.count("decode") == warmed_up + 4
    busy = {e["tid"] for e in events if e["ph"] == "X"}
    assert busy == {3, 4}, "the last stage of both groups"
    rows = [e["name"] for e in events if e["pid"] == 3]
    assert "chunk of 48 after 0" in rows
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_ends_the_record_and_not_the_engine(
    models: Callable[..., Path],
    plans: Callable[..., Path],
    nursery: NurseryProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("mnemoc.runtime.telemetry.tracing.BUFFERED", 30)
    opened = os.fdopen

    def full(number: int, mode: str) -> IO[bytes]:
        os.close(number)
        return opened(os.open("/dev/full", os.O_WRONLY), mode, 0)

    monkeypatch.setattr(os, "fdopen", full)
    model, file = models("llama"), tmp_path / "trace.json"
    with Engine.start(plans(model), model, nursery=nursery, trace_out=file) as engine:
        monkeypatch.setattr(os, "fdopen", opened)
        assert len(engine.submit(Request((1, 2), 40, GREEDY)).result().tokens) == 40
        assert engine.healthy
        assert list(tmp_path.iterdir()) == [], (
            "what was written is gone while the engine still runs"
        )
    assert [record.message for record in caplog.records] == [
        f"{file}: cannot write: No space left on device; nothing more is recorded"
    ]
