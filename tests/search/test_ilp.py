"""Cases of the integer program that have a name; random ones are in test_properties."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from hantc.core.errors import BudgetError, HantcError
from hantc.search.ilp import cheapest, solve, solve_diverse
from hantc.search.model import Answer, Task, run
from hantc.search.problem import Border, Item, NoMoreSolutionsError, Problem, overlap


def make(n: int = 10, m: int = 8, seed: int = 0, budget: float = 0.5) -> Problem:
    rng = random.Random(seed)
    items = [
        Item(f"r{a}", f"c{j}", "int8" if j % 2 else "fp32", rng.random() if j else 0.0, rng.random(), frozenset({a}))
        for a in range(n)
        for j in range(m)
    ]
    items += [Item(f"s{a}", "c", "int8", rng.random(), rng.random(), frozenset({a, a + 1})) for a in range(n - 1)]
    return Problem(n, tuple(items), 0.3, budget * n, tuple(Border(a, a + 1, 0.05) for a in range(n - 1)))


def one(*items: tuple[float, float], budget: float = 1.0, fixed: float = 0.0) -> Problem:
    """One atom; (score, cost) of its items."""
    return Problem(
        1, tuple(Item("r", f"c{j}", "fp32", s, c, frozenset({0})) for j, (s, c) in enumerate(items)), fixed, budget
    )


def test_same_input_same_answer() -> None:
    problem = make()
    assert solve(problem) == solve(problem)
    assert solve_diverse(problem, 4) == solve_diverse(problem, 4)


def test_items_that_are_no_numbers_are_passed_over() -> None:
    problem = one((math.nan, 0.1), (-1.0, math.nan), (-math.inf, 0.1), (2.0, 0.5), (3.0, 0.1))
    assert solve(problem).items == (3,)
    assert solve_diverse(problem, 9)[-1].items == (4,)


def test_huge_figures_do_not_reach_the_solver() -> None:
    problem = one((1e300, 0.1), (1.0, 0.5), (0.5, 1e300))
    assert solve(problem).items == (1,)


def test_a_hopeless_budget_tells_the_nearest() -> None:
    with pytest.raises(BudgetError, match=r"2\.5 ms") as failure:
        solve(one((0.0, 9.0), (1.0, 1.5), fixed=1.0, budget=2.0))
    assert failure.value.nearest == 2.5
    assert solve(one((0.0, 9.0), (1.0, 1.5), fixed=1.0, budget=failure.value.nearest)).items == (1,)


def test_the_nearest_of_a_larger_problem_is_itself_reachable() -> None:
    problem = make(budget=0.0)
    with pytest.raises(BudgetError) as failure:
        solve(problem)
    at = solve(replace(problem, budget=failure.value.nearest))
    assert at.cost == pytest.approx(failure.value.nearest)


def test_no_budget() -> None:
    assert solve(one((0.0, 9.0), (1.0, 1.5), budget=math.inf)).items == (0,)


def test_among_exact_items_the_cheapest_wins() -> None:
    problem = one((0.0, 0.9), (0.0, 0.2), (0.0, 0.5))
    solution = solve(problem)
    assert (solution.items, solution.score, solution.gap) == ((1,), 0.0, 0.0)


def test_scale_does_not_matter() -> None:
    problem = make()
    tiny = replace(
        problem,
        items=tuple(replace(i, score=i.score * 1e-9, cost=i.cost * 1e-6) for i in problem.items),
        borders=tuple(replace(b, cost=b.cost * 1e-6) for b in problem.borders),
        fixed_cost=problem.fixed_cost * 1e-6,
        budget=problem.budget * 1e-6,
    )
    assert solve(tiny, gap=0.0).items == solve(problem, gap=0.0).items


def test_a_span_wins_where_it_pays() -> None:
    singles = [Item(f"r{a}", "t", "fp32", 0.0, 1.0, frozenset({a})) for a in range(3)]
    span = Item("s", "merged", "fp32", 0.1, 0.5, frozenset({0, 1}))
    problem = Problem(3, (*singles, span), 0.0, 2.0)
    assert solve(problem).items == (3, 2)
    assert solve(replace(problem, budget=3.0)).items == (0, 1, 2)


def test_borders_make_neighbours_agree() -> None:
    items = [
        Item(f"r{a}", "t", p, s, c, frozenset({a}))
        for a in range(3)
        for p, s, c in (("fp32", 0.0, 1.0), ("int8", 0.1, 0.6))
    ]
    # One int8 atom saves 0.4, enough for the budget, but each border takes 0.3 back.
    borders = tuple(Border(a, a + 1, 0.3) for a in range(2))
    assert solve(Problem(3, tuple(items), 0.0, 2.6), gap=0.0).score == pytest.approx(0.1)
    priced = solve(Problem(3, tuple(items), 0.0, 2.6, borders), gap=0.0)
    assert "".join("i" if items[i].int8 else "f" for i in priced.items) in ("iif", "fii")
    assert priced.cost == pytest.approx(2.5)


def test_spans_that_do_not_tile_are_an_error() -> None:
    items = tuple(Item("s", "c", "fp32", 0.0, 1.0, frozenset(a)) for a in ({0, 1}, {1, 2}))
    with pytest.raises(HantcError, match="do not fit together"):
        solve(Problem(3, items, 0.0, 9.0))


def test_an_atom_without_items_is_an_error() -> None:
    with pytest.raises(HantcError, match=r"atoms \[1\]"):
        solve(Problem(2, (Item("r", "c", "fp32", 0.0, 1.0, frozenset({0})),), 0.0, 9.0))


def test_nothing_to_choose() -> None:
    assert solve(Problem(0, (), 1.0, 2.0)).cost == 1.0
    with pytest.raises(BudgetError):
        solve(Problem(0, (), 3.0, 2.0))
    assert len(solve_diverse(Problem(0, (), 1.0, 2.0), 3)) == 1


def test_diverse_solutions_differ_and_get_no_better() -> None:
    problem = make()
    found = solve_diverse(problem, 6, gap=0.0)
    assert len(found) == 6
    assert all(overlap(problem, a, b) <= 7 for i, a in enumerate(found) for b in found[:i])
    assert [s.score for s in found] == pytest.approx(sorted(s.score for s in found), abs=1e-4)


def test_diverse_stops_where_nothing_is_left() -> None:
    problem = one((0.0, 0.5), (1.0, 0.2), (2.0, 9.0))
    assert [s.items for s in solve_diverse(problem, 10)] == [(0,), (1,)]
    with pytest.raises(NoMoreSolutionsError, match="0 of 1 atoms"):
        solve(problem, exclude=solve_diverse(problem, 10))


def test_diverse_may_use_dominated_items() -> None:
    assert [s.items for s in solve_diverse(one((0.0, 0.5), (1.0, 0.6), (2.0, 0.7)), 3)] == [(0,), (1,), (2,)]


def test_a_hopeless_budget_is_an_error_for_diverse_too() -> None:
    with pytest.raises(BudgetError):
        solve_diverse(one((0.0, 2.0)), 3)


def test_out_of_time_the_cheapest_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make()
    least = cheapest(problem)

    def slow(task: Task, **options: Any) -> Answer:
        return Answer(None, False, False, math.inf) if task.objective == "score" else run(task, **options)

    monkeypatch.setattr("hantc.search.ilp.run", slow)
    solution = solve(problem)
    assert (solution.items, solution.optimal, solution.gap) == (least.items, False, math.inf)
    with pytest.raises(NoMoreSolutionsError, match="was found in"):
        solve(problem, exclude=[solution])
    assert len(solve_diverse(problem, 5)) == 1
    with pytest.raises(BudgetError):
        solve(replace(problem, budget=0.1))


def test_hardly_any_time_still_answers() -> None:
    problem = make(n=20, m=30)
    solution = solve(problem, time_limit=0.001)
    assert solution.cost <= problem.budget
    assert solve_diverse(problem, 3, time_limit=0.0)


@pytest.mark.filterwarnings("ignore:PULP_CBC_CMD")
def test_without_highs_cbc_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(n=5, m=4)
    best = solve(problem, gap=0.0)
    monkeypatch.setattr("pulp.HiGHS.available", lambda self: False)
    other = solve(problem, gap=0.0)
    assert other.score == pytest.approx(best.score, abs=1e-4)
    assert other.optimal
    with pytest.raises(HantcError, match="no integer programming solver"):
        solve(problem, engine="highs")
