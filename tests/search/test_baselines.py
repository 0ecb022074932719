"""Greedy and random selection on cases with a name."""

from __future__ import annotations

import pytest

from hantc.core.errors import BudgetError
from hantc.search.baselines import greedy, random_selection
from hantc.search.ilp import solve
from hantc.search.problem import Item, Problem


def make(*places: list[tuple[float, float]], budget: float, spans: tuple[Item, ...] = ()) -> Problem:
    items = [
        Item(f"r{a}", f"c{j}", "fp32", s, c, frozenset({a}))
        for a, group in enumerate(places)
        for j, (s, c) in enumerate(group)
    ]
    return Problem(len(places), (*items, *spans), 0.0, budget)


def test_greedy_takes_the_best_rate_first_and_can_be_wrong() -> None:
    # Place 0 saves 0.6 for 0.5 ms (rate 1.2), place 1 saves 1 for 1 ms: only one fits.
    problem = make([(0.6, 0.0), (0.0, 0.5)], [(1.0, 0.0), (0.0, 1.0)], budget=1.0)
    assert greedy(problem).score == pytest.approx(1.0)
    assert solve(problem).score == pytest.approx(0.6)


def test_greedy_leaves_a_span_and_fills_the_hole() -> None:
    span = Item("s", "merged", "fp32", 5.0, 0.1, frozenset({0, 1}))
    problem = make([(0.0, 1.0)], [(0.0, 1.0)], budget=2.0, spans=(span,))
    assert greedy(problem).items == (0, 1)
    tight = make([(0.0, 1.0)], [(0.0, 1.0)], budget=1.5, spans=(span,))
    assert greedy(tight).items == (2,)


def test_random_selections_follow_the_seed_and_the_budget() -> None:
    group = [(j / 10, 1 - j / 10) for j in range(10)]
    problem = make(group, group, group, group, budget=2.0)
    draws = [random_selection(problem, seed=s) for s in range(5)]
    assert draws == [random_selection(problem, seed=s) for s in range(5)]
    assert len({d.items for d in draws}) > 1
    assert all(d.cost <= 2.0 + 1e-5 for d in draws)
    assert random_selection(problem, seed=0, moves=0).items == (9, 19, 29, 39)


def test_hopeless_budgets() -> None:
    problem = make([(0.0, 1.0)], budget=0.5)
    with pytest.raises(BudgetError):
        greedy(problem)
    with pytest.raises(BudgetError):
        random_selection(problem, seed=0)
