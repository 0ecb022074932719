"""Validation and the sums."""

from __future__ import annotations

import math

import pytest

from hantc.core.errors import HantcError, UsageError
from hantc.search.problem import (
    Border,
    Item,
    Problem,
    Solution,
    budget_error,
    clean,
    evaluate,
    make_solution,
    overlap,
    overlap_cap,
    usable,
    validate,
)


def item(*atoms: int, score: float = 0.0, cost: float = 1.0, precision: str = "fp32", name: str = "c") -> Item:
    return Item("r" + "-".join(map(str, atoms)), name, precision, score, cost, frozenset(atoms))


def test_clean_drops_what_cannot_count_and_says_why() -> None:
    items = (
        item(0, score=math.nan, name="nan"),
        item(0, cost=math.inf, name="inf"),
        item(0),
        item(5, name="outside"),
        item(name="nowhere"),
        item(1, score=-math.inf, name="minus"),
        item(1),
    )
    borders = (Border(0, 1, 0.5), Border(0, 1, math.nan), Border(0, 1, -1.0), Border(1, 1, 1.0), Border(None, 9, 1.0))
    kept, reasons = clean(Problem(2, items, 0.0, 5.0, borders))
    assert kept.items == (items[2], items[6])
    assert kept.borders == borders[:1]
    assert len(reasons) == 9 and all(reasons)
    assert "r0/nan/fp32: score is nan" in reasons
    assert "r0/inf/fp32: cost is inf" in reasons
    assert any("[5]" in r for r in reasons)
    assert clean(kept) == (kept, [])


def test_usable_keeps_the_given_indices() -> None:
    use = usable(Problem(1, (item(0, score=math.nan), item(0)), 0.0, 1.0))
    assert use.items == (1,)
    assert len(use.reasons) == 1


def test_an_uncovered_atom_is_named() -> None:
    with pytest.raises(HantcError, match=r"atoms \[1\].*score is nan"):
        validate(Problem(2, (item(0), item(1, score=math.nan)), 0.0, 1.0))


@pytest.mark.parametrize(("fixed", "budget", "error"), [(0.0, math.nan, UsageError), (math.nan, 1.0, HantcError)])
def test_figures_of_the_problem_itself_must_be_numbers(fixed: float, budget: float, error: type[HantcError]) -> None:
    with pytest.raises(error):
        validate(Problem(1, (item(0),), fixed, budget))


@pytest.mark.parametrize(
    ("precisions", "crossings"),
    [
        (("fp32", "fp32", "fp32"), 0),
        (("int8", "fp32", "fp32"), 2),  # input | 0 and 0 | 1
        (("fp32", "int8", "fp32"), 2),
        (("int8", "int8", "int8"), 2),  # input and output only
        (("int8", "fp32", "int8"), 4),
        (("fp16", "int8", "fp32"), 2),  # only int8 counts
    ],
)
def test_borders_cost_where_exactly_one_side_is_int8(precisions: tuple[str, ...], crossings: int) -> None:
    items = tuple(item(a, precision=p) for a, p in enumerate(precisions))
    borders = (Border(None, 0, 0.25), Border(0, 1, 0.25), Border(1, 2, 0.25), Border(2, None, 0.25))
    _, cost = evaluate(Problem(3, items, 2.0, 9.0, borders), (0, 1, 2))
    assert cost == 5.0 + 0.25 * crossings


def test_a_border_inside_a_span_is_free() -> None:
    problem = Problem(2, (item(0, 1, precision="int8"),), 0.0, 9.0, (Border(0, 1, 7.0), Border(None, 0, 0.5)))
    assert evaluate(problem, (0,)) == (0.0, 1.5)


@pytest.mark.parametrize("picked", [(), (0,), (0, 1, 2), (0, 2)])
def test_evaluate_refuses_what_is_no_exact_cover(picked: tuple[int, ...]) -> None:
    with pytest.raises(HantcError, match="covered"):
        evaluate(Problem(2, (item(0), item(1), item(0, 1)), 0.0, 9.0), picked)


def test_make_solution_orders_by_first_atom() -> None:
    problem = Problem(3, (item(2, score=1.0), item(0, 1, score=0.5)), 1.0, 9.0)
    assert make_solution(problem, (0, 1), optimal=True, gap=0.0) == Solution((1, 0), 1.5, 3.0, True, 0.0)


def test_overlap_counts_atoms() -> None:
    problem = Problem(3, (item(0, 1), item(2), item(2, name="d")), 0.0, 9.0)
    a, b = (make_solution(problem, p, optimal=False, gap=0.0) for p in ((0, 1), (0, 2)))
    assert overlap(problem, a, b) == 2
    assert overlap(problem, a, a) == 3


@pytest.mark.parametrize(("n", "share", "cap"), [(10, 0.7, 7), (46, 0.7, 32), (1, 0.7, 0), (4, 1.0, 3), (4, 0.0, 0)])
def test_overlap_cap(n: int, share: float, cap: int) -> None:
    assert overlap_cap(n, share) == cap


def test_the_budget_error_names_a_budget_that_works() -> None:
    error = budget_error(Problem(1, (item(0),), 0.25, 1.0), 1.23456)
    assert error.nearest == 1.23456
    assert "1.235 ms" in str(error) and "1 ms or less" in error.message
    assert error.exit_code == 1
