"""Costs: the table equals the printed formulas, and the arithmetic is the one that experts do."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from mnemoc.ir.build import build
from mnemoc.ir.model import ModelSpec, load_model
from mnemoc.ir.passes import carry, fuse, overlap, shard
from mnemoc.ir.sizes import SYMBOLS
from mnemoc.layout import Layout
from mnemoc.planner import Cluster, load_cluster
from mnemoc.planner.chunks import Sizes
from mnemoc.planner.cost import PARTS, Links, Terms, links_of, price_terms
from mnemoc.planner.counting import HALVES, count
from mnemoc.planner.footprint import Footprint, footprint
from mnemoc.planner.formulas import (
    choosing,
    compile_parts,
    compile_totals,
    in_halves,
    stage_formulas,
    tabulate,
)

from .conftest import CURVES

ONE = np.ones(())


def terms_of(
    name: str,
    tp: int,
    kvp: int,
    ffn: str = "repeated",
    *,
    eager: bool = False,
    halves: bool = False,
) -> tuple[Terms, Footprint]:
    module = fuse(shard(build(load_model(name)), tp=tp, kvp=kvp, ffn=ffn))
    module = carry(overlap(module) if halves else module)
    cluster, links = load_cluster("dgx-h100"), Links("inter", "inter")
    dtype = load_model(name).dtype
    terms = price_terms(count(module), cluster, dtype, module.mesh, links, eager=eager)
    return terms, footprint(module, "cuda:sm_90")


WIRINGS = {
    key: terms_of("qwen3-8b", *key, eager=key[0] == 8, halves=True)[0]
    for key in ((1, 1, "repeated"), (8, 1, "repeated"), (4, 2, "repeated"), (4, 4, "helix"))
}


LEAST_ROWS = 1000


@cache
def priced(wiring: tuple[int, int, str]) -> tuple[Any, ...]:
    """A wiring's formulas, and sizes → seconds by table, by formulas, and by part."""
    terms = WIRINGS[wiring]
    totals, formulas = tabulate(terms), stage_formulas(terms, LEAST_ROWS)
    table = choosing(totals, LEAST_ROWS) if HALVES in terms else totals
    return formulas, table, compile_totals(formulas), compile_parts(formulas)


@settings(max_examples=60, deadline=None)
@given(
    wiring=st.sampled_from(sorted(WIRINGS)),
    numbers=st.tuples(*(st.integers(0, 10**7) for _ in SYMBOLS)),
)
def test_the_table_equals_the_formulas_that_the_artifact_prints(
    wiring: tuple[int, int, str], numbers: tuple[int, ...]
) -> None:
    formulas, *priced_by = priced(wiring)
    sizes = Sizes(*(np.array(float(n)) for n in numbers))
    table, compiled, parts = (price(sizes) for price in priced_by)
    halved = HALVES in formulas and bool(in_halves(sizes, LEAST_ROWS))
    for block in table:
        formula = formulas[HALVES if halved and block == "layer" else block]
        assert set(formula.parts) == set(PARTS)
        assert table[block] == pytest.approx(compiled[block], rel=1e-12)
        assert sum(parts[block].values()) == pytest.approx(compiled[block], rel=1e-12)
        printed = sum(
            eval(sympy.pycode(e), dict(zip(map(str, SYMBOLS), numbers, strict=True)))
            for e in formula.parts.values()
        )
        printed = max(printed, formula.host_s)
        assert printed == pytest.approx(float(compiled[block]), rel=1e-12)


@pytest.mark.parametrize(("name", "kib"), [("llama-3-8b", 128), ("llama-3-70b", 320)])
def test_kv_per_token_is_what_the_paper_says(name: str, kib: int) -> None:
    spec = load_model(name)
    for tp in (1, 8):
        _, held = terms_of(name, tp, 1)
        assert held.kv_per_token * spec.num_layers * tp == kib * 1024


def test_the_weights_of_all_ranks_are_those_of_the_checkpoint() -> None:
    spec = load_model("llama-3-8b")
    _, held = terms_of("llama-3-8b", 1, 1)
    whole = sum(2 * math.prod(shape) for shape in spec.tensors().values())
    assert held.embed + spec.num_layers * held.layer + held.head == whole


def test_chunked_attention_has_an_intensity_free_of_the_context() -> None:
    """I = c·h_q/h_kv FLOP per byte of K and V at 16 bits, whatever lies before the chunk."""
    module = fuse(shard(build(load_model("llama-3-70b")), tp=1, kvp=1))
    (attend,) = (t for t in count(module)["layer"] if t.resource == "attention_prefill")
    chunk = 40
    for before in (10**5, 10**7):
        flops = attend.flops[3] * chunk * before
        moved = attend.bytes[4] * before
        assert flops / moved == pytest.approx(chunk * 64 / 8)


def test_two_thousand_tokens_are_bound_by_compute_and_one_by_bandwidth() -> None:
    terms, _ = terms_of("llama-3-8b", 1, 1)
    linear = compile_parts(stage_formulas(terms))

    def seconds(rows: int) -> float:
        return float(linear(Sizes(ONE * rows, ONE, ONE, ONE, ONE, ONE))["layer"]["linear"])

    assert seconds(2) < 1.01 * seconds(1)
    assert seconds(4096) == pytest.approx(2 * seconds(2048), rel=1e-3)


def test_a_size_that_halves_the_speed_costs_as_much_again(
    cluster: Callable[..., Cluster], model: Callable[..., ModelSpec]
) -> None:
    """At x = half a call takes twice its time at full efficiency: rows, shared rows, bytes of a decode."""
    spec = model()
    module = fuse(shard(build(spec, "float32"), tp=1, kvp=1))
    tasks, links = count(module), Links("intra", "intra")

    def layer(part: str, bandwidth: float, **sizes: float) -> float:
        machine = cluster(memory__bandwidth=bandwidth)
        terms = price_terms(tasks, machine, "float32", module.mesh, links)
        given = {str(symbol): ONE * sizes.get(str(symbol), 0.0) for symbol in SYMBOLS}
        return float(compile_parts(stage_formulas(terms))(Sizes(**given))["layer"][part])

    rows = CURVES["matmul"].half
    at_best = layer("linear", 1e12, T=1e9, QK=1) * rows / 1e9
    assert layer("linear", 1e12, T=rows, QK=1) == pytest.approx(2 * at_best, rel=1e-3)
    chunk = CURVES["attention_prefill"].half * spec.num_kv_heads / spec.num_heads
    at_best = layer("attention", 1e12, QK=1e13, KV=1e7) * chunk / 1e6
    got = layer("attention", 1e12, QK=chunk * 1e7, KV=1e7)
    assert got == pytest.approx(2 * at_best, rel=1e-3)
    tokens = CURVES["attention_decode"].half / (2 * spec.num_kv_heads * spec.head_dim * 4)
    at_best = layer("attention", 1e9, KD=1e12) * tokens / 1e12
    assert layer("attention", 1e9, KD=tokens) == pytest.approx(2 * at_best, rel=1e-3)
    assert layer("attention", 1e9) == 0, "no decode, no fixed cost of one"


@pytest.mark.parametrize(("tp", "kvp", "share"), [(1, 1, 1.0), (2, 1, 0.5), (2, 2, 0.25)])
def test_ranks_that_share_a_memory_draw_together_what_it_has(
    tp: int, kvp: int, share: float, cluster: Callable[..., Cluster]
) -> None:
    module = fuse(shard(build(load_model("tiny-llama"), "float32"), tp=tp, kvp=kvp))
    own, shared = cluster(), cluster(memory__shared_bandwidth=9e9)
    keys = Sizes(ONE, ONE, ONE * 0, ONE * 0, ONE * 1e9, ONE * 0)

    def attention_s(machine: Cluster) -> float:
        terms = price_terms(count(module), machine, "float32", module.mesh, Links("intra", "intra"))
        return float(compile_parts(stage_formulas(terms))(keys)["layer"]["attention"])

    reached = 1e10 * CURVES["attention_decode"].full
    expected = max(1.0, reached / (9e9 * share))
    assert attention_s(shared) / attention_s(own) == pytest.approx(expected, rel=1e-6)


def test_every_sequence_that_gets_a_token_costs_the_head_its_share(
    cluster: Callable[..., Cluster],
) -> None:
    module = fuse(shard(build(load_model("tiny-llama"), "float32"), tp=1, kvp=1))

    def head_s(rows: int, row_s: float) -> float:
        machine, links = cluster(overhead__row=row_s), Links("intra", "intra")
        terms = price_terms(count(module), machine, "float32", module.mesh, links)
        sizes = Sizes(ONE * rows, ONE * rows, *(ONE * 0,) * 4)
        return float(compile_totals(stage_formulas(terms))(sizes)["head"])

    assert head_s(5, 1e-3) - head_s(5, 0.0) == pytest.approx(5e-3, rel=1e-6)


@pytest.mark.parametrize(("eager", "alone_s"), [(True, 12e-6), (False, 3e-6)])
def test_launches_hide_behind_kernels_that_take_longer_or_are_captured(
    eager: bool, alone_s: float
) -> None:
    terms, _ = terms_of("llama-3-8b", 8, 1, eager=eager)
    seconds = compile_parts(stage_formulas(terms))
    many = Sizes(ONE * 8192, ONE, ONE * 0, ONE * 0, ONE * 8192, ONE * 0)
    assert float(seconds(many)["layer"]["launch"]) == pytest.approx(9 * 1.5e-6)
    one = seconds(Sizes(ONE, ONE, ONE * 0, ONE * 0, ONE * 0, ONE * 0))["entry"]
    assert float(sum(one.values())) == pytest.approx(alone_s, rel=5e-3)


def test_collectives_follow_their_algorithm_and_link() -> None:
    terms, _ = terms_of("llama-3-8b", 8, 2)
    seconds = compile_parts(stage_formulas(terms))
    rows = Sizes(ONE * 1000, ONE, ONE, ONE, ONE, ONE * 0)
    intra, inter = 450e9 * 0.8, 50e9 * 0.8
    payload = 1000 * 4096 * 2
    reduce_s = 6 * 2.5e-6 + 2 * 7 / 8 * payload / intra
    assert seconds(rows)["layer"]["communication"] == pytest.approx(2 * reduce_s)
    assert seconds(rows)["hop"]["communication"] == pytest.approx(12e-6 + payload / inter)
    peers = Sizes(ONE * 1000, ONE, ONE, ONE, ONE, ONE * 3000)
    exchange = 12e-6 + 3000 * 4 * (128 * 2 + 16) / inter
    more = seconds(peers)["layer"]["communication"] - seconds(rows)["layer"]["communication"]
    assert more == pytest.approx(exchange)


def test_helix_reduces_within_the_node_first_and_a_share_of_it_between_nodes() -> None:
    """Per layer: two all-reduces over 4 × 2 ranks, and an exchange of 1/2 of a rank's 8 heads."""
    terms, held = terms_of("llama-3-8b", 4, 2, "helix")
    cluster, rows = load_cluster("dgx-h100"), 1000
    sizes = Sizes(*(ONE * n for n in (rows, 0, 0, 0, 0, rows)))
    seconds = compile_parts(stage_formulas(terms))(sizes)["layer"]["communication"]
    rate = {
        link: cluster[f"links.{link}.bandwidth"] * cluster["efficiency.link"]
        for link in ("intra", "inter")
    }
    alpha = {link: cluster[f"links.{link}.latency"] for link in rate}
    payload = rows * 4096 * 2
    once_s = 2 * 2 * alpha["intra"] + 2 * 3 / 4 * payload / rate["intra"]
    once_s += 2 * 1 * alpha["inter"] + 2 * 1 / 2 * payload / 4 / rate["inter"]
    exchange_s = alpha["inter"] + rows * 4 * (128 * 2 + 16) / rate["inter"]
    assert seconds == pytest.approx(2 * once_s + exchange_s)
    _, whole = terms_of("llama-3-8b", 4, 2)
    shared = (4096 * 4096 + 3 * 14336 * 4096) * 2
    assert whole.layer - held.layer == shared / 4 - shared / 8


def halves_of(tp: int, ffn: str = "repeated") -> Callable[..., tuple[float, dict[str, float]]]:
    """(rows, keys, swapped) → seconds of a whole layer, and of one in halves by part."""
    terms, _ = terms_of("llama-3-8b", tp, 8, ffn, halves=True)
    halved = compile_parts(stage_formulas(terms, 2))
    whole = compile_totals(stage_formulas(terms, 1 << 30))

    def seconds(rows: int, keys: int, swapped: int) -> tuple[float, dict[str, float]]:
        sizes = Sizes(*(ONE * n for n in (rows, 0, rows * keys, keys, 0, swapped)))
        parts = {part: float(s) for part, s in halved(sizes)["layer"].items()}
        return float(whole(sizes)["layer"]), parts

    return seconds


def test_what_is_computed_beside_messages_hides_them_and_takes_a_little_longer() -> None:
    """A 32nd of the device is theirs; of long messages, what sticks out counts too."""
    seconds, rows, keys = halves_of(1), 4096, 100_000
    _, few = seconds(rows, keys, rows)
    _, more = seconds(rows, keys, 2 * rows)
    assert 0 < few["communication"] == pytest.approx(more["communication"], rel=0.05), (
        "all is hidden"
    )
    beside = few["attention"] / 2 + few["linear"] / 2
    assert few["communication"] < beside / 31 * 1.1
    cluster = load_cluster("dgx-h100")
    rate = cluster["links.inter.bandwidth"] * cluster["efficiency.link"]
    a, b = (seconds(rows, keys, n * rows) for n in (100, 101))
    row_s = 32 * (128 * 2 + 16) / rate
    grown = sum(b[1].values()) - sum(a[1].values())
    merged = b[1]["attention"] - a[1]["attention"]
    # Each half's merge is longer too, of which the first's is beside the second's messages.
    assert grown == pytest.approx(rows * row_s + merged / 2, rel=1e-6)


def test_sums_over_the_groups_are_not_beside_messages_for_they_need_the_same_link() -> None:
    whole_s, parts = halves_of(1, "helix")(4096, 100_000, 7 * 4096)
    reduces_s = 2 * (2 * 3 * 12e-6 + 2 * 7 / 8 * 4096 * 4096 * 2 / 40e9)
    assert parts["communication"] > 0.9 * reduces_s
    assert sum(parts.values()) > 0.95 * whole_s, "so that little is gained"


def test_large_chunks_between_nodes_gain_a_tenth_and_small_ones_lose() -> None:
    seconds = halves_of(1)
    large_s, large = seconds(2048, 131_072, 7 * 2048)
    small_s, small = seconds(64, 131_072, 7 * 64)
    assert sum(large.values()) < 0.9 * large_s
    assert sum(small.values()) > 1.1 * small_s


def test_on_a_cpu_messages_are_beside_nothing() -> None:
    module = overlap(fuse(shard(build(load_model("llama-3-8b"), "float32"), tp=1, kvp=2)))
    cluster = load_cluster("local")
    terms = price_terms(count(module), cluster, "float32", module.mesh, Links("intra", "intra"))
    assert not terms[HALVES].transfers
    sizes = Sizes(*(ONE * n for n in (4096, 0, 4096 * 10_000, 10_000, 0, 4096)))
    blocks = tabulate(terms)(sizes)
    assert blocks[HALVES] > blocks["layer"]


@pytest.mark.parametrize(
    ("layout", "links"),
    [
        (Layout(8, 1, 1), Links("intra", "intra")),
        (Layout(2, 2, 2), Links("intra", "intra")),
        (Layout(8, 2, 1), Links("intra", "inter")),
        (Layout(8, 1, 2), Links("inter", "intra")),
        (Layout(4, 4, 2), Links("intra", "inter")),
        (Layout(4, 4, 4), Links("inter", "inter")),
    ],
)
def test_an_axis_leaves_its_node_when_its_span_does_not_fit(layout: Layout, links: Links) -> None:
    assert links_of(layout, load_cluster("dgx-h100")) == links


def test_a_slower_figure_never_makes_anything_faster(
    cluster: Callable[..., Cluster], model: Callable[..., ModelSpec]
) -> None:
    module = fuse(shard(build(model(), "float32"), tp=2, kvp=2))
    sizes = Sizes(*(ONE * n for n in (64, 2, 10_000, 500, 300, 70)))

    def total(**changed: float) -> float:
        changed_cluster = cluster(**changed)
        terms = price_terms(
            count(module), changed_cluster, "float32", module.mesh, Links("inter", "inter")
        )
        return sum(float(seconds) for seconds in tabulate(terms)(sizes).values())

    assert total(peak__float32=5e10) > total()
    assert total(memory__bandwidth=5e9) > total()
    assert total(links__intra__latency=1e-3) > total()
    assert total(links__inter__bandwidth=1e8) > total()
    assert total(overhead__launch=1e-3) > total()
