"""Predictions of pinned configurations: against the plan, against arithmetic, and how sure they are."""

import dataclasses
import time

import pytest
from mnemoc.artifact import Workload
from mnemoc.errors import BadInput, UsageError
from mnemoc.ir.model import load_model
from mnemoc.layout import Layout
from mnemoc.planner import Configuration, Forecast, forecast, load_cluster, make_plan
from mnemoc.planner.curves import through
from mnemoc.planner.evidence import kind
from mnemoc.planner.tell import tell

from .conftest import small_cluster, small_model

ONE = Layout(1, 1, 1)


def asked(layout: Layout = ONE, prompt: int = 9000, **more: int) -> Forecast:
    return forecast(small_model(), small_cluster(), Configuration(layout, prompt, **more))


@pytest.mark.parametrize(
    "layout", [Layout(1, 1, 1), Layout(2, 1, 1), Layout(1, 2, 1), Layout(1, 2, 2)]
)
def test_it_says_what_the_plan_of_the_same_layout_says(layout: Layout) -> None:
    pins = dataclasses.asdict(layout)
    workload = Workload(9000, 1e6, 1e6, 256, objective="ttft")
    plan = make_plan(small_model(), small_cluster(), workload, pinned=pins).plan
    said = asked(layout)
    assert said.stages == tuple(stage.num_layers for stage in plan.stages)
    assert said.ttft.seconds <= plan.predicted.ttft_s * (1 + 1e-9)
    assert said.ttft.seconds == pytest.approx(plan.predicted.ttft_s, rel=0.05)
    assert said.tbt.seconds == pytest.approx(plan.predicted.tbt_s, rel=0.02)
    assert said.memory.weights_bytes == plan.memory.weights_bytes
    assert said.memory.kv_bytes == plan.memory.kv_bytes


def test_parts_add_up_and_lie_within_their_band() -> None:
    for figure in (asked(Layout(2, 2, 1)).ttft, asked(Layout(2, 2, 1)).tbt):
        assert sum(figure.parts_s.values()) == pytest.approx(figure.seconds)
        assert figure.low_s < figure.seconds < figure.high_s


def test_what_is_cached_is_not_prefilled_again_but_attended_to() -> None:
    whole, rest = asked(prompt=9000, chunk=500), asked(prompt=4500, cached=4500, chunk=500)
    fresh = asked(prompt=4500, chunk=500)
    assert fresh.ttft.seconds < rest.ttft.seconds < whole.ttft.seconds
    assert rest.tbt.seconds == pytest.approx(whole.tbt.seconds)
    assert fresh.ttft.seconds + rest.ttft.seconds == pytest.approx(whole.ttft.seconds, rel=0.01)


def test_a_given_chunk_is_taken_and_the_planned_one_is_no_worse() -> None:
    for chunk in (16, 100, 900, 9000):
        said = asked(chunk=chunk)
        assert said.chunks[0] == (0, chunk)
        if chunk <= 1920:
            assert asked().ttft.seconds <= said.ttft.seconds * (1 + 1e-9)


def test_more_at_once_slow_a_token_and_speed_the_whole() -> None:
    one, four = asked(), asked(concurrency=4)
    assert one.tbt.seconds < four.tbt.seconds
    assert one.throughput_tokens_per_s < four.throughput_tokens_per_s
    assert four.memory.kv_bytes == 4 * one.memory.kv_bytes


def test_what_does_not_fit_is_said_to_not_fit() -> None:
    spec, cluster = load_model("llama-3.1-405b"), load_cluster("dgx-h100")
    said = forecast(spec, cluster, Configuration(Layout(8, 1, 1), 8192))
    assert not said.fits
    assert "does not fit" in said.notes[0]


def test_a_ring_of_one_step_each_hides_its_messages_behind_attention_or_shows_them() -> None:
    """(N − 1) layers' messages beyond the attention of a step are what communication grows by."""
    spec, cluster = load_model("llama-3-8b"), load_cluster("dgx-h100")
    long, short = (
        forecast(spec, cluster, Configuration(Layout(8, 1, 1), prompt, cp=4))
        for prompt in (10**6, 10**4)
    )
    tp_alone = 2 * (6 * 2.5e-6 + 2 * 7 / 8 * 250_000 * 4096 * 2 / (450e9 * 0.8))
    assert long.ttft.parts_s["communication"] == pytest.approx(32 * tp_alone, rel=0.1)
    keys = 10**4 / 4 * 2 * 128 * 2
    travel_s = 12e-6 + keys / (50e9 * 0.8)
    exposed = 32 * 3 * (travel_s - short.ttft.parts_s["attention"] / 32 / 4)
    reduced = 32 * 2 * (6 * 2.5e-6 + 2 * 7 / 8 * 2500 * 4096 * 2 / (450e9 * 0.8))
    assert short.ttft.parts_s["communication"] == pytest.approx(exposed + reduced, rel=0.1)


def test_context_parallelism_shares_prefill_evenly_but_holds_every_weight() -> None:
    spec, cluster = load_model("llama-3-8b"), load_cluster("dgx-h100")
    two, eight = (
        forecast(spec, cluster, Configuration(Layout(8, 1, 1), 10**6, cp=n)) for n in (2, 8)
    )
    assert 3.5 < two.ttft.seconds / eight.ttft.seconds <= 4.01
    assert two.memory.weights_bytes == eight.memory.weights_bytes
    assert two.memory.kv_bytes == pytest.approx(4 * eight.memory.kv_bytes, rel=0.01)


def test_the_last_of_contiguous_blocks_has_almost_no_causal_half_to_leave_out() -> None:
    """Its own block has: (N − 1)·b² + b²/2 pairs, where striped ranks have N·b²/2 each."""
    spec, cluster = load_model("llama-3-8b"), load_cluster("dgx-h100")
    for ranks in (2, 8):
        even, uneven = (
            forecast(spec, cluster, Configuration(Layout(8, 1, 1), 10**6, cp=ranks, ring=ring)).ttft
            for ring in ("striped", "contiguous")
        )
        more = uneven.parts_s["attention"] / even.parts_s["attention"]
        assert more == pytest.approx(2 - 1 / ranks, rel=0.01)
        assert uneven.parts_s["linear"] == even.parts_s["linear"]
        assert uneven.seconds > even.seconds


def test_it_says_which_curves_it_leaves_and_by_how_much() -> None:
    spec, cluster = load_model("llama-3-8b"), load_cluster("dgx-h100")

    def decode_of(prompt: int) -> tuple[float, str, float]:
        said = forecast(spec, cluster, Configuration(Layout(8, 1, 1), prompt))
        (use,) = (u for u in said.uses if u.figure == "tbt" and u.part == "attention")
        return use.beyond, use.words, use.band

    inside, words, band = decode_of(10**6)
    assert inside == 1
    assert "interpolates points from 67M to 537M" in words
    beyond, words, wider = decode_of(10**7)
    assert beyond == pytest.approx(10**7 * 512 / 537e6, rel=0.01)
    assert f"extrapolates {beyond:.3g}×" in words
    assert wider > band


def test_a_band_grows_with_what_the_curve_misses_and_with_where_it_comes_from() -> None:
    machine, spec = small_cluster(), small_model()
    rough = through([(16, 0.3), (64, 0.31), (512, 0.5)], "rows", "measured: here")
    sound = through([(16, 0.3), (512, 0.5)], "rows", "measured: here")
    guess = dataclasses.replace(sound, source="assumed: nobody knows")

    def high_s(curve: object) -> float:
        curves = {**machine.curves, "attention_prefill": curve}
        changed = dataclasses.replace(machine, curves=curves)
        figure = forecast(spec, changed, Configuration(Layout(1, 1, 1), 9000)).ttft
        return figure.high_s / figure.seconds

    assert high_s(sound) < high_s(rough)
    assert high_s(sound) < high_s(guess)
    assert [kind(s) for s in ("measured by x", "published: y", "datasheet: z", "as links")] == [
        "measured", "published", "datasheet", "assumed",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "error", "complaint"),
    [
        (Configuration(Layout(1, 1, 1), 0), BadInput, "prompt must be at least 1"),
        (Configuration(Layout(1, 1, 1), 10, cached=-1), BadInput, "may not be negative"),
        (Configuration(Layout(3, 1, 1), 10), BadInput, "does not divide"),
        (Configuration(Layout(1, 9, 1), 10), BadInput, "more than the"),
        (Configuration(Layout(1, 1, 99), 10), BadInput, "needs 99 devices"),
        (Configuration(Layout(1, 1, 1), 10, cp=9), BadInput, "needs 9 devices"),
        (Configuration(Layout(1, 2, 1), 10, cp=2), UsageError, "takes the place of spp and kvp"),
        (Configuration(Layout(1, 1, 1), 10, cp=2, chunk=5), UsageError, "one pass"),
        (Configuration(Layout(1, 1, 1), 10, cp=2, ring="zigzag"), UsageError, "unknown ring"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(
    asked: Configuration, error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        forecast(small_model(), small_cluster(), asked)


def test_a_prediction_takes_a_fifth_of_a_second() -> None:
    spec, cluster = load_model("llama-3-70b"), load_cluster("dgx-h100")
    asked = Configuration(Layout(8, 4, 2), 10**6)
    forecast(spec, cluster, asked)
    spent = []
    for _ in range(3):
        started = time.process_time()
        forecast(spec, cluster, asked)
        spent.append(time.process_time() - started)
    assert min(spent) < 0.2


def test_its_words_name_figures_bands_and_sources() -> None:
    spec, cluster = load_model("llama-3-8b"), load_cluster("dgx-h100")
    asked = Configuration(Layout(8, 4, 2), 10**6)
    text = "\n".join(tell(spec.name, cluster.name, asked, forecast(spec, cluster, asked)))
    for words in ("TTFT", "TBT", "tokens/s", "weights", "chunks", "interpolates", "±", "published"):
        assert words in text
