"""F8 to F10 of the paper: traffic. Told from what `traffic_runs` has simulated, ratio by ratio."""

from __future__ import annotations

from .paper_page import Claim, Figure, Row, at_least, at_most, number, percent
from .traffic_kept import Class, Seen, kept
from .traffic_runs import (
    F8_QPS,
    F8_S,
    F9_RATES,
    F9_S,
    F9_SHARES,
    KEPT_BAR,
    ONE_QPS,
    P90_BAR,
    RATES,
)

LOW, MIDDLE, HIGH = F9_RATES
MANY = F9_SHARES[-1]


def f8() -> Figure:
    three, two = _f8("3D"), _f8("2D")
    tight_three, tight_two = _f8("3D, tightest"), _f8("2D, tightest")
    twice = _f8("2D, twice")
    fewer = 1 - three.throughput / twice.throughput
    less = 1 - three.throughput / two.throughput
    bounds = tight_two.tbt_promise_s, tight_three.tbt_promise_s
    return Figure(
        "F8",
        "KVP and SPP against SPP alone",
        f"70B on 64 H100, {F8_QPS:g} requests a second for {F8_S:g} s and then to the end, one in twenty "
        "of 1.99 M tokens: TP 8 × SPP 4 × KVP 2 against TP 8 × SPP 8. The paper's engine fills each "
        "stage's iteration up to one time, so a token crosses half as many of them in 3D: that is taken "
        f"for its setup, with a promise of {three.tbt_promise_s * 1e3:g} ms for 3D and of "
        f"{twice.tbt_promise_s * 1e3:g} ms for 2D. Our engine is promised the whole crossing, so two "
        "other readings stand below it.",
        (
            Row("median TTFT, 3D over 2D", "×", at_most(1.0), three.all.ttft_p50_s / twice.all.ttft_p50_s),
            Row("TPOT, 2D over 3D", "×", at_least(2.0), _tpot_s(twice) / _tpot_s(three)),
            Row("throughput, 3D over 2D", "×", Claim("slightly less"), three.throughput / twice.throughput),
            *_reading("the same promise", three, two),
            *_reading("each the tightest it can give", tight_three, tight_two),
        ),
        "With one time for each stage ours says what the paper says of TPOT and TTFT; in exchange, "
        f"smaller chunks cost {percent(fewer)} of the throughput. With one promise for both, each fills its "
        "iterations up to it, and nothing of TPOT is left to compare: there the difference is in throughput, "
        f"{percent(abs(less))} {'less' if less > 0 else 'more'} in 3D. The tightest promises say what KVP "
        f"can give: {bounds[1] * 1e3:.3g} ms in place of {bounds[0] * 1e3:.3g}. Beside 2 M tokens of keys "
        "a token waits for all the weights, which KVP does not divide, so that is less than half. "
        "Groups that no request ties go at their own pace, but the plan deals a long prompt to both in "
        "stripes: here they are hardly ever free of each other.",
    )  # fmt: skip


def _f8(how: str) -> Seen:
    return kept().of("F8", how, F8_QPS)


def _tpot_s(seen: Seen) -> float:
    """Of the conversations: the mean time between their tokens."""
    mean_s = seen.chats.tbt_mean_s
    assert mean_s is not None
    return mean_s


def _reading(what: str, three: Seen, two: Seen) -> tuple[Row, Row]:
    return (
        Row(f"TPOT, 2D over 3D, {what}", "×", Claim("–"), _tpot_s(two) / _tpot_s(three)),
        Row(f"throughput, 3D over 2D, {what}", "×", Claim("–"), three.throughput / two.throughput),
    )


def f9() -> Figure:
    ours, whole, fixed = (
        _f9(how, MIDDLE) for how in ("lars-slack", "whole-prefill", "fixed-chunk")
    )
    chats, waiting = ours.chats, whole.chats
    engines = ("lars-slack", "whole-prefill", "fixed-chunk")
    bars = [(bar, [kept().capacity(how, bar) for how in engines]) for bar in (P90_BAR, KEPT_BAR)]
    tail = waiting.ttft_p99_s / chats.ttft_p99_s
    median = fixed.all.ttft_p50_s / ours.all.ttft_p50_s
    rows = [
        Row("median TTFT, over ours", "×", at_least(30), whole.all.ttft_p50_s / ours.all.ttft_p50_s),
        Row("TTFT, P99, of conversations, over ours", "×", at_least(174), tail),
        Row("TTFT, P99, of all, over ours", "×", Claim("–"), whole.all.ttft_p99_s / ours.all.ttft_p99_s),
        Row("ours: TTFT, P90, of all", "s", at_most(10), ours.all.ttft_p90_s),
        Row("median TTFT, fixed chunks over ours", "×", Claim("–"), median),
    ]  # fmt: skip
    for bar, (best, theirs, also) in bars:
        claim = at_least(5.7) if bar == P90_BAR else Claim("–")
        rows.append(Row(f"capacity, {bar}, ours over theirs", "×", claim, _over(best, theirs)))
        rows.append(
            Row(f"capacity, {bar}, ours over fixed chunks", "×", Claim("–"), _over(best, also))
        )
    low = (_f9(how, LOW) for how in ("lars-slack", "whole-prefill"))
    return Figure(
        "F9",
        "No convoys",
        f"8B on 16 A100, TP 8 × SPP 2, a promise of {ours.tbt_promise_s * 1e3:g} ms between tokens, "
        f"{MANY:.0%} long requests, {MIDDLE:g} requests a second for {F9_S / 60:g} minutes: what an "
        "engine makes of it that prefills a prompt whole before anything else (LoongServe's weakness, with "
        "no other of its own), and one with 2,048 tokens in each iteration, first come, first served, over "
        "`lars-slack`. Capacity: the highest rate, in steps of 19 %, that meets the bar.",
        tuple(rows),
        f"The machine was busy for {percent(_load(MIDDLE))} of the time at this rate. At {LOW:g} requests a "
        f"second, {percent(_load(LOW))}, most come while no long prompt is there, and medians are the same "
        f"({' and '.join(f'{one.all.ttft_p50_s * 1e3:.0f} ms' for one in low)}): the convoy is a matter of "
        f"load. The tail of all is that of the long requests themselves. The rates: {_rates(bars)}; "
        f"{number(RATES[-1])}/s is the highest that was tried.",
    )


def _load(qps: float) -> float:
    return _f9("lars-slack", qps).busy


def _rates(bars: list[tuple[str, list[float]]]) -> str:
    texts = (
        f"{bar}: {number(best)}/s, whole prefills {number(theirs)}, fixed chunks {number(also)}"
        for bar, (best, theirs, also) in bars
    )
    return "; ".join(texts)


def _over(ours: float, theirs: float) -> float | None:
    return ours / theirs if theirs else None


def _f9(how: str, qps: float, share: float = MANY) -> Seen:
    return kept().of("F9", how, qps, share)


def f10() -> Figure:
    rows = []
    for qps in (MIDDLE, HIGH):
        ours, slack, lars = (_f9(how, qps) for how in ("lars-slack", "lrs", "lars"))
        claim = Claim("1.6 to 1.8, of what is open")
        for what, ratio in (
            ("TTFT, median", slack.all.ttft_p50_s / ours.all.ttft_p50_s),
            ("TTFT, P90", slack.all.ttft_p90_s / ours.all.ttft_p90_s),
            ("TTFT, P99, of conversations", _p99(slack) / _p99(ours)),
            ("goodput", ours.goodput / slack.goodput),
        ):
            rows.append(Row(f"{what}, {qps:g}/s", "×", claim, ratio))
        what = f"goodput over LARS alone, {qps:g}/s"
        rows.append(Row(what, "×", Claim("–"), ours.goodput / lars.goodput))
    return Figure(
        "F10",
        "Room for short prompts, by relative slack",
        "As F9: `lars-slack` (relative slack; a long prompt leaves room beside it; decodes lend time) "
        "against `lrs` (least slack in seconds first, nothing beside a long prompt).",
        tuple(rows),
        "Slack in seconds puts conversations before long prompts that are in time, and behind them once "
        f"they are late: at {MIDDLE:g}/s most are in time, and medians are alike, but the tail is not; "
        f"at {HIGH:g}/s, more than the machine can do, conversations wait. What exactly the paper's factor "
        "is of, its text as far as we had it does not say. "
        f"{_beside()}",
    )


def _p99(seen: Seen) -> float:
    return seen.chats.ttft_p99_s


def _beside() -> str:
    """What one prompt of a million tokens does to the conversations that come meanwhile."""

    def chats(how: str) -> Class:
        return kept().of("one", how, ONE_QPS).chats

    idle = chats("idle")
    others = ("lars-slack", "lars", "lrs", "fcfs", "whole-prefill", "fixed-chunk")
    texts = (f"`{how}` {chats(how).ttft_p99_s / idle.ttft_p99_s:.3g}×" for how in others)
    return (
        "And with a single prompt of 1 M tokens in flight, P99 of the TTFT of conversations "
        f"({ONE_QPS:g} a second) over that without it, {idle.ttft_p99_s * 1e3:.0f} ms: {', '.join(texts)}."
    )
