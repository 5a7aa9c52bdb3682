"""`mnemoc predict`: a layout that is pinned, and the figures for it."""

import json
from typing import Any

import pytest


def test_predict_prints_figures_with_bands_for_people_and_machines(mnemoc: Any) -> None:
    question = (
        "predict", "llama-3-8b", "--cluster", "dgx-h100", "--layout", "tp=8,spp=4,kvp=2",
        "--prompt", "1M", "--cached", "100K", "--output", "1K", "--concurrency", 2, "--chunk", 4096,
    )  # fmt: skip
    ran = mnemoc(*question)
    assert ran.code == 0
    assert "TTFT" in ran.out
    assert "rests on" in ran.out
    body = json.loads(mnemoc(*question, "--json").out)
    assert body["gpus"] == 64
    assert body["ttft"]["low_s"] < body["ttft"]["seconds"] < body["ttft"]["high_s"]
    assert sum(body["tbt"]["parts_s"].values()) == pytest.approx(body["tbt"]["seconds"])
    assert body["chunks"][0] == [100_000, 4096]
    assert "is dealt to 2 groups, " in ran.out
    assert body["configuration"]["stripe"] is None
    assert body["stripe_tokens"] % 64 == 0
    assert body["fits"] is True
    assert {use["figure"] for use in body["uses"]} == {"ttft", "tbt"}


def test_a_stripe_is_pinned_like_the_rest_of_a_layout(mnemoc: Any) -> None:
    """Rounded up to what chunks need not cross; contiguous, the next group joins half way."""
    stripes = []
    for stripe in ("64K", "contiguous"):
        ran = mnemoc(
            "predict", "llama-3-8b", "--cluster", "dgx-h100", "--prompt", "1M", "--json",
            "--layout", f"tp=8,kvp=2,stripe={stripe}",
        )  # fmt: skip
        stripes.append(json.loads(ran.out)["stripe_tokens"])
    assert stripes == [67_200, 500_160]


@pytest.mark.parametrize(("overlap", "rows"), [("2K", 2000), ("off", 0)])
def test_from_which_rows_on_layers_go_in_halves_is_pinned_too(
    overlap: str, rows: int, mnemoc: Any
) -> None:
    layout = f"tp=8,kvp=2,overlap={overlap}"
    words = ("--cluster", "dgx-h100", "--prompt", "1M", "--json", "--layout", layout)
    assert json.loads(mnemoc("predict", "llama-3-8b", *words).out)["overlap_rows"] == rows


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (("--layout", "tp=8,spp=2", "--cp", "2"), 2, "takes the place"),
        (("--layout", "tp=3"), 4, "does not divide"),
        (("--layout", "pp=3"), 2, "not a layout"),
        (("--layout", "kvp=2,stripe=wide"), 4, "not a positive count"),
        (("--layout", "kvp=2,stripe="), 2, "not a layout"),
        (("--layout", "stripe=64K"), 2, "stripes need kvp of at least 2"),
        (("--layout", "kvp=2,overlap=wide"), 4, "not a positive count"),
        (("--layout", "overlap=64"), 2, "overlap needs kvp of at least 2"),
        (("--chunk", "often"), 4, "not a positive count"),
        (("--cp", "1000"), 4, "needs 1000 devices"),
    ],
)
def test_predict_refuses_what_makes_no_sense(
    words: tuple[str, ...], code: int, complaint: str, mnemoc: Any
) -> None:
    ran = mnemoc("predict", "llama-3-8b", "--cluster", "dgx-h100", "--prompt", "1M", *words)
    assert ran.code == code
    assert complaint in ran.sentence
