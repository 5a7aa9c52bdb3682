"""What all tests share: which mnemoc is under test, offline, and hypothesis without a stopwatch."""

import gzip
import itertools
import json
import os
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MNEMOC_CALIBRATE", "0")  # --cluster local as shipped, at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import hypothesis
import mnemoc
import pytest

# A shell that starts the tests in the background has them ignore SIGINT, and their children with them:
# handled here, it is back at its default in what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("mnemoc", deadline=None)
hypothesis.settings.load_profile("mnemoc")


def pytest_report_header(config: pytest.Config) -> str:
    return f"mnemoc under test: {mnemoc.__file__}"


ALONE = ("tests/runtime", "tests/test_calibration.py")
"""Start engines and servers, or measure: one after the other, when all else is done."""


def _unit(nodeid: str) -> str:
    return "alone" if nodeid.startswith(ALONE) else nodeid.partition("::")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _unit(item.nodeid) == "alone")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes (`pytest -n 2`), each takes a file at a time, and one of them what is ALONE."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _unit(nodeid)

        def _reschedule(self, node: Any) -> None:
            others = [other for other in self.nodes if other is not node]
            last = [*self.workqueue] == ["alone"]
            # A process keeps its last test back until it hears that there is none after it.
            if last and any(self._pending_of(self.assigned_work[other]) > 1 for other in others):
                return
            super()._reschedule(node)
            if last and not self.workqueue:
                for other in others:
                    other.shutdown()

    config.option.loadscopereorder = False
    return Files(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-goldens", action="store_true", help="write golden texts anew")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` holds text against goldens/NAME beside the test (--rewrite-goldens writes it)."""

    def check(name: str, text: str) -> None:
        path = Path(request.path).parent / "goldens" / name
        if request.config.getoption("--rewrite-goldens"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), f"{path} differs: --rewrite-goldens, then read the diff"

    return check


Events = list[dict[str, Any]]


@pytest.fixture
def read_trace() -> Callable[[Path], Events]:
    """read_trace(path) → the events of a file for Perfetto, which keep the format's rules."""

    def read(path: Path) -> Events:
        raw = path.read_bytes()
        body = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        assert body.keys() == {"displayTimeUnit", "traceEvents"}
        return _check_trace(body["traceEvents"])

    return read


def _check_trace(events: Events) -> Events:
    """The rules of the Trace Event Format, as far as these phases go."""
    begun: dict[Any, list[float]] = defaultdict(list)
    slices: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    flows: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        assert {"ph", "pid", "tid", "ts", "name"} <= event.keys()
        assert isinstance(event["ts"], (int, float)) and event["ts"] >= 0
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        key = (event["pid"], event.get("cat"), event.get("id"))
        match event["ph"]:
            case "X":
                assert event["dur"] >= 0
                slices[event["pid"], event["tid"]].append((event["ts"], event["dur"]))
            case "b":
                begun[key].append(event["ts"])
            case "e":
                assert begun[key].pop() <= event["ts"]
            case "n":
                assert event["cat"] and event["id"]
            case "s" | "t" | "f":
                flows[event["cat"], event["id"]].append(event)
            case "M":
                assert event["args"].keys() <= {"name", "sort_index"}
            case other:
                pytest.fail(f"a phase that nobody writes: {other}")
    assert not any(begun.values()), "what begins ends"
    for track in slices.values():
        track.sort()
        for (start, length), (after, _) in itertools.pairwise(track):
            assert start + length <= after + 0.01, "slices of a track do not overlap"
    starts = {name: {start for start, _ in track} for name, track in slices.items()}
    for arrow in flows.values():
        assert arrow[0]["ph"] == "s" and arrow[-1]["ph"] == "f"
        assert all(event["ph"] == "t" for event in arrow[1:-1])
        for event in arrow:
            assert event["ts"] in starts[event["pid"], event["tid"]], "arrows tie slices"
    return events


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter computes with bfloat16 and e4m3 as GPUs do.

    Left alone, it rounds halves up, loses what is carried, and multiplies the bits of bfloat16 as integers.
    """
    import numpy as np
    import torch
    from triton import language as tl
    from triton.runtime import interpreter

    inexact, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    narrow = {
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
        tl.bfloat16: (torch.bfloat16, torch.int16),
    }

    def convert(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target not in narrow:
            return inexact(x, source, target, rounding)
        dtype, bits = narrow[target]
        values = torch.from_numpy(np.ascontiguousarray(x)).view(torch.float32)
        rounded = values.to(dtype).view(bits).numpy()
        return rounded.view(f"u{rounded.itemsize}")

    def widened(handle: Any) -> Any:
        if handle.dtype != tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest),
    )


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser. Of a module, not longer: while it is there, this thread can run no other event loop."""
    if not CHROMIUM:
        if os.environ.get("CI") == "true":
            pytest.fail("no Chromium on this machine: `make browser` installs one")
        pytest.skip("no Chromium on this machine: `make browser` installs one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
