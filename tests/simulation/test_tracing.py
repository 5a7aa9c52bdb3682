"""The file for Perfetto keeps the format's rules, and holds what happened."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mnemoc.artifact import Manifest
from mnemoc.errors import BadInput
from mnemoc.runtime.simulation import Arrival, Asked, Limits, Simulation, survey
from mnemoc.runtime.telemetry.tracing import Recorder

from .conftest import make_cost, make_manifest
from .test_simulation import LAYOUTS, Listed, mixed

Events = list[dict[str, Any]]
Read = Callable[[Path], Events]
Recorded = Callable[[Path, list[Arrival], Manifest], Events]


@pytest.fixture
def recorded(read_trace: Read) -> Recorded:
    """recorded(path, requests, manifest) → the events of a simulation, which keep the format's rules."""

    def simulate(path: Path, requests: list[Arrival], manifest: Manifest) -> Events:
        _simulate(path, requests, manifest)
        return read_trace(path)

    return simulate


def _simulate(path: Path, requests: list[Arrival], manifest: Manifest) -> None:
    traffic, layout = Listed(tuple(requests)), manifest.plan.layout
    surveyed = survey(traffic, Limits.of(manifest), skip=False)
    with Recorder.open(path, layout) as recorder:
        cost = make_cost(layout.spp)
        Simulation(manifest, cost, traffic, surveyed, Asked(), recorder).run()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_simulation_is_recorded_by_the_rules(
    tmp_path: Path, recorded: Recorded, layout: str
) -> None:
    manifest = make_manifest(**LAYOUTS[layout])
    events = recorded(tmp_path / "trace.json", mixed(30), manifest)
    spp, kvp = manifest.plan.layout.spp, manifest.plan.layout.kvp
    names = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert len(names) == len(set(names)) == (2 * spp - 1) * kvp
    phases = [e["name"] for e in events if e["pid"] == 4 and e["ph"] == "b"]
    assert {name: phases.count(name) for name in set(phases)} == {
        "queued": 30,
        "prefill": 30,
        "decode": 30,
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "trace.json"]


def test_a_requests_phases_follow_one_another_through_preemption(
    tmp_path: Path, recorded: Recorded
) -> None:
    requests = [Arrival(0.01 * i, 300, 200) for i in range(20)]
    events = recorded(tmp_path / "trace.json.gz", requests, make_manifest(num_pages=100))
    spans: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    ends = [e for e in events if e["pid"] == 4 and e["ph"] in "be"]
    for begin, end in zip(ends[::2], ends[1::2], strict=True):
        assert (begin["ph"], begin["id"], begin["name"]) == ("b", end["id"], end["name"])
        spans[begin["id"]].append((begin["ts"], end["ts"], begin["name"]))
    names = [name for one in spans.values() for _, _, name in one]
    assert len(spans) == 20 and "preempted" in names
    for one in spans.values():
        assert one[0][2] == "queued" and one[-1][2] == "decode"
        assert all(a[1] == pytest.approx(b[0], abs=0.01) for a, b in itertools.pairwise(one))


def test_chunks_and_decodes_are_all_there(tmp_path: Path, recorded: Recorded) -> None:
    events = recorded(tmp_path / "t.json", [Arrival(0.0, 1100, 4)], make_manifest())
    rows = [e["name"] for e in events if e["pid"] == 3 and e["ph"] == "b"]
    assert rows[:2] == ["chunk of 100 after 0", "chunk of 100 after 100"]
    assert rows[-5:] == ["chunk of 50 after 1000", "chunk of 50 after 1050", *["1 decodes"] * 3]
    marks = [e["args"]["rows"] for e in events if e["ph"] == "n"]
    assert sum(marks) == 1100


def test_an_interrupted_recording_leaves_nothing(tmp_path: Path) -> None:
    layout = make_manifest().plan.layout

    def interrupted() -> None:
        with Recorder.open(tmp_path / "trace.json", layout):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot write: No such file"):
        Recorder.open(tmp_path / "none" / "trace.json", make_manifest().plan.layout)
