"""The paper's figures beside ours: arithmetic, directions and orders, and the page that tells them."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def paper() -> ModuleType:
    """The script, which no wheel has, from the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(ROOT)])
        return importlib.import_module("benchmarks.paper")


@pytest.fixture(scope="module")
def figures(paper: ModuleType) -> tuple:
    return tuple(figure() for figure in paper.FIGURES)


def values(figures: tuple, number: str) -> list[float]:
    (figure,) = (figure for figure in figures if figure.number == number)
    return [row.ours for row in figure.rows]


def test_the_page_and_the_results_are_what_the_script_writes(
    paper: ModuleType, figures: tuple
) -> None:
    results = ROOT / "benchmarks" / "results"
    for path, text in (
        (ROOT / "docs" / "paper.md", paper.page(figures)),
        (results / "paper.md", paper.summary(figures)),
        (results / "paper.json", paper.as_json(figures, paper.cluster().name)),
    ):
        assert text == path.read_text(), f"{path} is old: python -m benchmarks.paper --write"


def test_every_figure_is_there(figures: tuple) -> None:
    assert [figure.number for figure in figures] == [
        "F1", "F2", "F3", "F4", "F5", "F6", "F7", "F8", "F9", "F10", "F11", "F12",
    ]  # fmt: skip


def test_the_work_of_a_million_tokens_is_four_flops_a_pair_and_channel(
    paper: ModuleType, figures: tuple
) -> None:
    work, minutes = values(figures, "F2")
    assert paper.flops(paper.model("llama-3-70b"), 0, 10**12) == 80 * 4 * 8192 * 10**12
    products = 2 * 80 * 10**6 * 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)
    assert work == pytest.approx((80 * 4 * 8192 * 10**12 + products) / 1e18)
    assert minutes == pytest.approx(work * 1e18 / 989.4e12 / 60)


def test_an_error_is_how_far_a_value_lies_outside_of_what_agrees(paper: ModuleType) -> None:
    assert paper.exactly(2.0).error(1.5) == pytest.approx(-0.25)
    assert paper.between(0.5, 0.6).error(0.55) == 0
    assert paper.between(0.5, 0.6).error(0.66) == pytest.approx(0.1)
    assert paper.at_least(0.7).error(5) == 0
    assert paper.at_most(30).error(60) == pytest.approx(1)
    assert paper.Claim("marginal").error(3) is None
    assert not paper.Row("", "s", paper.at_most(30), None).near


def test_what_is_far_off_is_in_bold_and_counted(paper: ModuleType, figures: tuple) -> None:
    rows = [row for figure in figures for row in figure.rows]
    far = [row for row in rows if row.error is not None and abs(row.error) > 0.15]
    assert paper.page(figures).count("| **") == len(far) > 0
    numbers = sum(row.error is not None for row in rows)
    assert f"{numbers - len(far)} of {numbers} numbers agree" in paper.summary(figures)


def test_directions_and_orders_are_the_papers(figures: tuple) -> None:
    assert all(tbt is not None and tbt <= 30 for tbt in values(figures, "F1"))
    (chunks,) = values(figures, "F3")
    assert 1 < chunks < 1.2
    alone, *speedups = values(figures, "F4")
    assert alone == pytest.approx(1, rel=0.02)
    striped, contiguous = speedups[::2], speedups[1::2]
    assert striped == sorted(striped, reverse=True)
    for even, said, uneven in zip(striped, (1.08, 1.08, 1.29, 1.64), contiguous, strict=True):
        assert even < said < uneven
    assert all(0.7 < share < 1 for share in values(figures, "F5"))
    eight, sixteen = values(figures, "F6")
    assert 1 < eight < sixteen < 1.3
    ratio, two, four = values(figures, "F7")
    assert 0.5 < ratio < 0.7
    assert two < four
    assert values(figures, "F12") == [32, 64, 128]


def test_traffic_is_as_the_paper_tells_it(figures: tuple) -> None:
    ttft, tpot, throughput, *others = values(figures, "F8")
    assert ttft < 1.05
    assert tpot > 2
    assert throughput < 1
    assert 1 < others[2] < tpot, "KVP divides the keys that a token waits for, not the weights"
    median, tail, whole_tail, p90_s, *_ = values(figures, "F9")
    assert tail > median > 30
    assert whole_tail > 1
    assert p90_s < 10
    assert all(capacity > 5 for capacity in values(figures, "F9")[5:])
    by_rate = values(figures, "F10")
    assert all(goodput > 1 for goodput in (*by_rate[3:5], *by_rate[8:10]))
