"""The front, and the accuracy-constrained mode on cases with a name."""

from __future__ import annotations

import math

import pytest

from hantc.core.errors import BudgetError, UsageError
from hantc.search.pareto import pareto_front, reachable, solve_for_score
from hantc.search.problem import Item, Problem


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1, 1)], [0]),
        ([(3, 1), (1, 3), (2, 2), (3, 3)], [1, 2, 0]),
        ([(1, 1), (1, 1)], [0]),
        ([(1, 2), (1, 1), (2, 1)], [1]),
        ([(math.nan, 0), (1, math.nan), (2, 2)], [2]),
        ([(0, math.inf), (1, 1)], [0, 1]),
    ],
)
def test_pareto_front(points: list[tuple[float, float]], front: list[int]) -> None:
    assert pareto_front(points) == front


PROBLEM = Problem(
    2,
    tuple(
        Item(f"r{a}", f"c{j}", "fp32", s, c, frozenset({a}))
        for a in range(2)
        for j, (s, c) in enumerate([(0.0, 4.0), (0.0, 3.0), (0.5, 1.0), (0.7, 2.0)])
    ),
    fixed_cost=1.0,
    budget=0.0,
)


def test_reachable_ends() -> None:
    assert reachable(PROBLEM) == (3.0, 7.0)


@pytest.mark.parametrize(("bound", "cost"), [(0.0, 7.0), (0.49, 7.0), (0.5, 5.0), (1.0, 3.0), (math.inf, 3.0)])
def test_solve_for_score_ignores_the_budget(bound: float, cost: float) -> None:
    solution = solve_for_score(PROBLEM, bound)
    assert solution.cost == cost
    assert solution.score <= bound
    assert solution.optimal


def test_an_unreachable_score_tells_the_nearest() -> None:
    with pytest.raises(BudgetError, match="least reachable is 0") as failure:
        solve_for_score(PROBLEM, -0.1)
    assert failure.value.nearest == 0.0


def test_a_bound_that_is_no_number() -> None:
    with pytest.raises(UsageError):
        solve_for_score(PROBLEM, math.nan)
