"""Random small problems against trying everything: spans, borders, both precisions, weights, negative scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hantc.core.errors import BudgetError
from hantc.core.types import Fetching
from hantc.search.baselines import greedy, random_selection
from hantc.search.ilp import cheapest, solve, solve_diverse
from hantc.search.model import Engine, undominated
from hantc.search.pareto import reachable, solve_for_score
from hantc.search.problem import (
    Border,
    Item,
    Limit,
    NoMoreSolutionsError,
    Problem,
    Solution,
    evaluate,
    overlap,
    overlap_cap,
)

few = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to four atoms, singles, spans, borders and weights (in half of them for nothing); figures on a grid of 1/8, so
    that no budget is met or missed by a rounding error only."""
    n = draw(st.integers(1, 4))
    figure = st.integers(0, 40).map(lambda v: v / 8)
    precision = st.sampled_from(["fp32", "int8"])
    items = []
    for a in range(n):
        for j in range(draw(st.integers(1, 4))):
            figures = draw(figure) - 1, draw(figure)
            items.append(Item(f"r{a}", f"c{j}", draw(precision), *figures, frozenset({a}), load_mb=draw(figure)))
    for j in range(draw(st.integers(0, 4)) if n > 1 else 0):
        first = draw(st.integers(0, n - 2))
        atoms = frozenset(range(first, draw(st.integers(first + 1, n - 1)) + 1))
        figures = draw(figure), draw(figure)
        items.append(Item(f"s{first}", f"c{j}", draw(precision), *figures, atoms, load_mb=draw(figure)))
    side = st.one_of(st.none(), st.integers(0, n - 1))
    borders = tuple(Border(draw(side), draw(side), draw(figure)) for _ in range(draw(st.integers(0, 4))))
    budget = draw(st.integers(0, 20 * n)) / 8
    steep = draw(st.one_of(st.none(), figure))
    fetching = Fetching(draw(figure), draw(st.sampled_from([0.0, 0.0, 0.25, 1.0])), steep)
    return Problem(n, tuple(draw(st.permutations(items))), draw(figure) / 4, budget, borders, fetching=fetching)


def covers(problem: Problem, start: int = 0) -> Iterator[tuple[int, ...]]:
    """Every exact cover; spans made above are runs of neighbours, so going through the atoms in order does."""
    if start == problem.n_atoms:
        yield ()
        return
    for i, item in enumerate(problem.items):
        if min(item.atoms) == start:
            for rest in covers(problem, max(item.atoms) + 1):
                yield (i, *rest)


def figures(problem: Problem) -> list[tuple[float, float]]:
    return [evaluate(problem, picked) for picked in covers(problem)]


def assert_honest(problem: Problem, solution: Solution) -> None:
    assert (solution.score, solution.cost) == evaluate(problem, solution.items)
    firsts = [min(problem.items[i].atoms) for i in solution.items]
    assert firsts == sorted(firsts)


@pytest.mark.filterwarnings("ignore:PULP_CBC_CMD")
@pytest.mark.parametrize("engine", ["highs", "cbc"])
def test_solve_is_the_best_of_all(engine: Engine) -> None:
    @settings(few, max_examples=60 if engine == "highs" else 12)
    @given(problems())
    def check(problem: Problem) -> None:
        options = figures(problem)
        within = [score for score, cost in options if cost <= problem.budget]
        if not within:
            with pytest.raises(BudgetError) as failure:
                solve(problem, gap=0.0, engine=engine)
            assert failure.value.nearest == pytest.approx(min(cost for _, cost in options))
            return
        solution = solve(problem, gap=0.0, engine=engine)
        assert_honest(problem, solution)
        assert solution.score == pytest.approx(min(within), abs=1e-3)
        assert solution.cost <= problem.budget
        assert solution.optimal and solution.gap <= 1e-6

    check()


@few
@given(problems(), st.data())
def test_limits_hold_and_cost_no_more_than_they_must(problem: Problem, data: st.DataObject) -> None:
    use = st.integers(0, 16).map(lambda v: v / 8)
    items = tuple(replace(i, uses=(data.draw(use), data.draw(use))) for i in problem.items)
    limits = tuple(Limit(n, data.draw(use) / 4, data.draw(st.integers(0, 40)) / 8 + 1 / 16) for n in ("a", "b"))
    problem = replace(problem, items=items, limits=limits)

    def holds(picked: tuple[int, ...]) -> bool:
        sums = [limit.fixed + sum(items[i].uses[k] for i in picked) for k, limit in enumerate(limits)]
        return all(s <= limit.most for s, limit in zip(sums, limits, strict=True))

    allowed = [(picked, *evaluate(problem, picked)) for picked in covers(problem) if holds(picked)]
    if not allowed:
        with pytest.raises(BudgetError, match="a and b"):
            cheapest(problem)
        with pytest.raises(BudgetError):
            solve(problem, gap=0.0)
        return
    assert cheapest(problem).cost == pytest.approx(min(cost for _, _, cost in allowed), abs=1e-3)
    within = [score for _, score, cost in allowed if cost <= problem.budget]
    if not within:
        with pytest.raises(BudgetError):
            solve(problem, gap=0.0)
        return
    solution = solve(problem, gap=0.0)
    assert holds(solution.items) and solution.score == pytest.approx(min(within), abs=1e-3)


@few
@given(problems(), st.integers(0, 60).map(lambda v: v / 8 - 2))
def test_solve_for_score_is_the_cheapest_of_all(problem: Problem, bound: float) -> None:
    options = figures(problem)
    within = [cost for score, cost in options if score <= bound]
    if not within:
        with pytest.raises(BudgetError) as failure:
            solve_for_score(problem, bound, gap=0.0)
        assert failure.value.nearest == pytest.approx(min(score for score, _ in options), abs=1e-3)
        return
    solution = solve_for_score(problem, bound, gap=0.0)
    assert_honest(problem, solution)
    assert solution.cost == pytest.approx(min(within), abs=1e-3)
    assert solution.score <= bound


@few
@given(problems())
def test_reachable_spans_the_useful_budgets(problem: Problem) -> None:
    options = figures(problem)
    low, high = reachable(problem)
    assert low == pytest.approx(min(cost for _, cost in options))
    best = min(score for score, _ in options)
    assert high == pytest.approx(min(cost for score, cost in options if score == best), abs=1e-3)


@few
@given(problems(), st.sampled_from([0.0, 0.5, 0.7, 1.0]))
def test_each_diverse_solution_is_the_best_left(problem: Problem, max_overlap: float) -> None:
    problem = replace(problem, budget=problem.budget + cheapest(problem).cost)
    cap = overlap_cap(problem.n_atoms, max_overlap)
    found = solve_diverse(problem, 3, max_overlap=max_overlap, gap=0.0)
    left = [
        Solution(picked, *evaluate(problem, picked), optimal=False, gap=0.0)
        for picked in covers(problem)
        if evaluate(problem, picked)[1] <= problem.budget
    ]
    for solution in found:
        assert_honest(problem, solution)
        assert solution.score == pytest.approx(min(s.score for s in left), abs=1e-3)
        left = [s for s in left if overlap(problem, s, solution) <= cap]
    assert all(overlap(problem, a, b) <= cap for i, a in enumerate(found) for b in found[:i])
    assert len(found) == 3 or not left
    if not left:
        with pytest.raises(NoMoreSolutionsError):
            solve(problem, exclude=found, max_overlap=max_overlap)


@few
@given(problems(), st.integers(0, 5))
def test_baselines_are_valid_and_never_better(problem: Problem, seed: int) -> None:
    try:
        best = solve(problem, gap=0.0)
    except BudgetError as failure:
        with pytest.raises(BudgetError) as greedy_failure:
            greedy(problem)
        assert greedy_failure.value.nearest == pytest.approx(failure.nearest)
        return
    for other in (greedy(problem), random_selection(problem, seed=seed)):
        assert_honest(problem, other)
        assert other.cost <= problem.budget
        assert other.score >= best.score - 1e-3
        assert not other.optimal


@few
@given(problems())
def test_the_best_needs_no_dominated_item(problem: Problem) -> None:
    kept = set(undominated(problem))
    left = [evaluate(problem, p)[0] for p in covers(problem) if kept.issuperset(p)]
    assert min(left) == min(score for score, _ in figures(problem))
    assert math.isfinite(min(left))
