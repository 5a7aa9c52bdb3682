"""Terms as expressions, which the artifact's cost.py prints, and as tables, which the search looks up.

Each plan's re-check compares the two (`check`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray
from sympy.printing.pycode import PythonCodePrinter

from ..artifact import LENT
from ..ir.sizes import SYMBOLS
from .chunks import Floats, Sizes
from .cost import PARTS, Block, Term, Terms
from .counting import HALVES, Row, sum_rows


@dataclass(frozen=True)
class Formula:
    """One block: part → seconds on the device, in the symbols of `ir.sizes`, and what its launches take
    the host. The block takes the longer of the two; what the host takes more counts as launch.

    least_rows: of `halves`, those from which micro-batches go in halves
    """

    parts: Mapping[str, sympy.Expr]
    host_s: float
    least_rows: int = 0


StageFormulas = Mapping[str, Formula]
"""block → formula."""

Totals = Callable[[Sizes], Mapping[str, Floats]]
"""sizes → seconds by block, vectorised."""


def stage_formulas(terms: Terms, least_rows: int = 0) -> StageFormulas:
    """Terms as expressions, by block and part."""
    formulas = {}
    for name, block in terms.items():
        parts = {
            part: sympy.Add(*(t.seconds() for t in block.computing if t.part == part))
            for part in PARTS
        }
        for transfer, beside in block.transfers:
            parts["communication"] += _uncovered(transfer, beside)
        formulas[name] = Formula(parts, block.host_s, least_rows if name == HALVES else 0)
    return formulas


def _uncovered(transfer: Term, beside: Sequence[Term]) -> sympy.Expr:
    """What a transfer adds to the time of what runs beside it."""
    covered = sympy.Add(*(term.seconds() for term in beside))
    return sympy.Max(covered / (LENT - 1), transfer.seconds() - covered, evaluate=False)


def in_halves(sizes: Sizes, least_rows: int) -> NDArray[np.bool_]:
    """Which micro-batches go through layers in halves."""
    return np.asarray((least_rows <= sizes.T - sizes.R) & (sizes.QK > 0) & (sizes.X > 0))


def choosing(totals: Totals, least_rows: int) -> Totals:
    """The seconds of blocks, with those of a layer in halves where it goes in halves."""

    def chosen(sizes: Sizes) -> Mapping[str, Floats]:
        blocks = dict(totals(sizes))
        halves, whole = blocks.pop(HALVES), blocks["layer"]
        return {**blocks, "layer": np.where(in_halves(sizes, least_rows), halves, whole)}

    return chosen


def tabulate(terms: Terms) -> Totals:
    """sizes → seconds by block, as two products with tables of coefficients.

    With a block of halves where terms have one: which is it that counts is to be chosen (`choosing`).
    """
    uppers, lowers, signs = (np.array(rows) for rows in zip(*_tabled(terms), strict=True))
    lesser = np.flatnonzero(signs < 0)
    ranges, at = {}, 0
    for name, block in terms.items():
        groups = [range(at, at := at + len(rows)) for rows in _grouped(block)]
        ranges[name] = groups[0], list(zip(groups[1::2], groups[2::2], strict=True))
    host_s = {name: block.host_s for name, block in terms.items()}
    symbols = [str(symbol) for symbol in SYMBOLS]

    def evaluate(sizes: Sizes) -> Mapping[str, Floats]:
        shape = sizes.T.shape
        columns = [np.ones(shape), *(getattr(sizes, symbol) for symbol in symbols)]
        columns += [np.minimum(gate, 1) for gate in (sizes.QK, sizes.KD, sizes.X)]
        table = np.stack(columns).reshape(len(columns), -1)
        seconds = np.maximum(uppers @ table, lowers @ table)
        seconds[lesser] *= -1
        totals = {}
        for name, (alone, beside) in ranges.items():
            total = seconds[alone].sum(axis=0)
            for covering, transfer in beside:
                covered = seconds[covering].sum(axis=0)
                total += np.maximum(covered * LENT / (LENT - 1), seconds[transfer].sum(axis=0))
            totals[name] = np.maximum(total, host_s[name]).reshape(shape)
        return totals

    return evaluate


Larger = tuple[Row, Row, int]
"""Two affine functions and what the larger is multiplied by: −1 where it is −Max(−a, −b), the smaller."""


def _tabled(terms: Terms) -> Iterator[Larger]:
    for block in terms.values():
        for rows in _grouped(block):
            yield from rows


def _grouped(block: Block) -> list[list[Larger]]:
    """What runs alone, and for each transfer what runs beside it, and itself: rows of a table."""
    alone = [term for term in block.computing if not term.beside]
    groups = [alone, *(group for t, beside in block.transfers for group in (beside, (t,)))]
    return [_fewest(group) for group in groups]


def _fewest(terms: Sequence[Term]) -> list[Larger]:
    """Each maximum or minimum by itself, and all that is affine as one."""
    plain = sum_rows(*((1.0, term.rows[0]) for term in terms if len(term.rows) == 1))
    found: list[Larger] = []
    for term in terms:
        if len(term.rows) == 2:
            sign = -1 if term.lesser else 1
            a, b = (sum_rows((sign, row)) for row in term.rows)
            found.append((a, b, sign))
    return [*found, (plain, plain, 1)]


def compile_totals(formulas: StageFormulas) -> Totals:
    """sizes → seconds by block, vectorised."""
    names = list(formulas)
    totals = [sympy.Add(*formulas[name].parts.values()) for name in names]
    evaluate = _compile(totals)

    def blocks(sizes: Sizes) -> Mapping[str, Floats]:
        pairs = zip(names, evaluate(sizes), strict=True)
        return {name: np.maximum(total, formulas[name].host_s) for name, total in pairs}

    return choosing(blocks, formulas[HALVES].least_rows) if HALVES in formulas else blocks


def compile_parts(formulas: StageFormulas) -> Callable[[Sizes], Mapping[str, Mapping[str, Floats]]]:
    """sizes → seconds by block and part, vectorised."""
    keys = [(block, part) for block in formulas for part in PARTS]
    evaluate = _compile([formulas[block].parts[part] for block, part in keys])

    def parts(sizes: Sizes) -> Mapping[str, Mapping[str, Floats]]:
        result: dict[str, dict[str, Floats]] = defaultdict(dict)
        for (block, part), seconds in zip(keys, evaluate(sizes), strict=True):
            result[block][part] = seconds
        for block, by_part in result.items():
            waits = formulas[block].host_s - sum(by_part.values())
            by_part["launch"] = by_part["launch"] + np.maximum(waits, 0)
        if HALVES in result:
            halved, whole = result.pop(HALVES), result["layer"]
            in_two = in_halves(sizes, formulas[HALVES].least_rows)
            result["layer"] = {part: np.where(in_two, halved[part], whole[part]) for part in PARTS}
        return result

    return parts


def _compile(expressions: list[sympy.Expr]) -> Callable[[Sizes], list[Floats]]:
    """The expressions as one numpy function, through the text that cost.py holds too."""
    printer = PythonCodePrinter({"fully_qualified_modules": False})
    texts = ", ".join(map(printer.doprint, expressions))
    names = ", ".join(str(symbol) for symbol in SYMBOLS)
    scope: dict[str, Any] = {"max": np.maximum, "min": np.minimum}
    function = eval(f"lambda {names}: ({texts},)", scope)

    def evaluate(sizes: Sizes) -> list[Floats]:
        columns = [getattr(sizes, str(symbol)) for symbol in SYMBOLS]
        return [np.broadcast_to(y, columns[0].shape) for y in function(*columns)]

    return evaluate
