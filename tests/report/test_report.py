"""The page says what was planned, needs nothing else, and is the same for the same plan."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest
from mnemoc import pipeline
from mnemoc.artifact import Workload
from mnemoc.codegen import render_report
from mnemoc.codegen.report.fill import memory, promise, stage_bytes
from mnemoc.codegen.report.frontier import edge
from mnemoc.codegen.report.reasons import alternatives, sources
from mnemoc.units import format_duration

VOID = {"meta", "link", "input"}


class Reader(HTMLParser):
    """Checks that elements nest, and collects ids, references and the text of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.said: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "srcset", "action"):
                self.references.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.said.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_well_formed_and_refers_to_nothing_outside(page):
    reader = read(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert reader.references == ["data:,"]
    assert "http" not in page
    assert "@import" not in page
    assert not re.search(r"url\(", page)


def test_the_same_plan_gives_the_same_page(report, page):
    assert render_report(report) == page


def test_figures_of_the_plan_stand_on_the_page(planned, page):
    said = " ".join(" ".join(read(page).said).split())
    plan, workload = planned.plan, planned.workload
    assert f"{plan.gpus} GPUs" in said
    assert f"{workload.context:,} tokens" in said
    for seconds in (plan.predicted.ttft_s, plan.predicted.tbt_s, workload.ttft_s, workload.tbt_s):
        assert format_duration(seconds) in said
    for note in plan.notes:
        assert note in said
    for other in plan.alternatives:
        assert str(other.layout) in said
    for key, number in planned.cluster.numbers.items():
        assert key in said
        assert number.source.rpartition(": ")[2] in said


def test_a_cluster_file_cannot_put_markup_into_the_page(report):
    numbers = report.cluster["numbers"]
    evil = {"value": 1.0, "unit": "1", "source": "</script><script>alert(1)</script>"}
    cluster = {**report.cluster, "name": "<b>", "numbers": {**numbers, "efficiency.matmul": evil}}
    page = render_report(dataclasses.replace(report, cluster=cluster, model="<i>&"))
    assert "<script>alert" not in page
    assert "<b> tokens" not in page
    read(page)


def test_a_broken_promise_is_said_to_be_broken(report, page):
    assert "The promise is kept." in page
    strict = dataclasses.replace(report.workload, tbt_s=report.plan.predicted.tbt_s / 2)
    broken = promise(strict, report.plan)
    assert [gauge.kept for gauge in broken.gauges] == [True, False, True]
    assert broken.gauges[1].share == pytest.approx(200, abs=0.1)
    assert "The promise is not kept." in render_report(dataclasses.replace(report, workload=strict))


def test_parts_of_a_gauge_add_up_to_its_share(report):
    for gauge in promise(report.workload, report.plan).gauges:
        assert sum(part.share for part in gauge.parts) == pytest.approx(gauge.share, rel=0.01)


def test_weights_and_kv_of_the_stages_are_those_that_the_planner_counted(planned, report):
    held = planned.plan.memory
    fullest = max(stage_bytes(planned.plan, report.planned), key=sum)
    assert sum(fullest) == held.weights_bytes + held.kv_bytes + held.room_kv_bytes
    bars = memory(planned.workload, planned.plan, report.planned).bars
    for bar, stage in zip(bars, planned.plan.stages, strict=True):
        assert bar.layers.startswith(f"layers {stage.first_layer} to")
        assert sum(part.share for part in bar.parts) < 100.1
    room = [{part.name: part.share for part in bar.parts}["room"] for bar in bars]
    assert max(room) == pytest.approx(100 * held.room_bytes / held.capacity_bytes, abs=0.01)


def test_it_says_how_a_request_comes_to_lie_on_its_groups(planned, report):
    striped = memory(planned.workload, planned.plan, report.planned)
    assert (
        f"a request is dealt to 2 groups, {planned.plan.stripe_tokens:,} tokens" in striped.sentence
    )
    whole = dataclasses.replace(planned.plan, stripe_tokens=1_000_192)
    contiguous = memory(planned.workload, whole, report.planned)
    assert "takes on its next group after 1,000,192 tokens." in contiguous.sentence


def test_alternatives_mark_the_promise_that_they_break(report):
    chosen, *others = alternatives(report.workload, report.plan)
    assert chosen.chosen
    assert not chosen.broken
    assert len(others) == len(report.plan.alternatives)
    for choice, other in zip(others, report.plan.alternatives, strict=True):
        assert ("tbt" in choice.broken) == (other.tbt_s > report.workload.tbt_s)


def test_the_frontier_is_drawn_point_by_point_and_marks_what_keeps_the_promise(report, page):
    drawn = edge(report.workload, report.plan).drawing
    points = report.plan.frontier.points
    assert drawn.chart.count('class="dot ') == 2 * len(points) == 2 * len(drawn.table.rows)
    kept = [p.ttft_s <= report.workload.ttft_s and p.tbt_s <= report.workload.tbt_s for p in points]
    assert [row[-1] == "keeps both" for row in drawn.table.rows] == kept
    assert len(re.findall('class="dot [a-z]+ kept"', drawn.chart)) == 2 * sum(kept)
    chosen = points[drawn.first]
    assert (chosen.layout, chosen.gpus) == (report.plan.layout, report.plan.gpus)
    assert len({mark.drawn for mark in drawn.marks}) == len(drawn.marks)
    assert [mark.note for mark in drawn.marks].count("as promised") == 1
    assert f"{sum(kept)} of them keep" in page


def test_a_plan_without_a_frontier_says_how_to_get_one_and_keeps_its_what_ifs(report, page):
    bare = dataclasses.replace(report, plan=dataclasses.replace(report.plan, frontier=None))
    without = render_report(bare)
    read(without)
    assert "--pareto" in without
    assert "--pareto" not in page
    for row in edge(report.workload, report.plan).what_ifs:
        assert row[0] in ("TTFT", "TBT", "one node")
        for words in row[1:]:
            assert f"<td>{words}</td>" in without
            assert f"<td>{words}</td>" in page


def test_sources_are_counted_by_kind(planned):
    found = sources(planned.cluster.describe())
    kinds = [figure.kind for figure in found.figures]
    assert f"{kinds.count('datasheet')} datasheet" in found.sentence
    assert f"{len(kinds)} figures" in found.sentence
    values = {figure.key: figure.value for figure in found.figures}
    assert values["peak.bfloat16"] == "989.4 TFLOP/s"
    assert values["links.intra.latency"] == "2.5 µs"
    assert values["efficiency.matmul"] == "70%"


@pytest.mark.parametrize("context", [16, 500, 8000])
@pytest.mark.parametrize("stages", [1, 2])
def test_small_plans_have_a_page_too(context, stages, reported):
    workload = Workload(context=context, ttft_s=60.0, tbt_s=1.0, output_tokens=16)
    pinned = {"tp": 1, "spp": stages, "kvp": 1}
    made = pipeline.plan("tiny-llama", "local", workload, gpus=stages, pinned=pinned)
    page = render_report(reported(made))
    read(page)
    assert "nan" not in page
