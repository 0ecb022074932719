"""Trade-offs between score and cost: the front, what is reachable, and the accuracy-constrained mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from hantc.core.errors import BudgetError, UsageError
from hantc.search.ilp import cheapest, solve
from hantc.search.model import Engine, Task, run
from hantc.search.problem import Problem, Solution, make_solution


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats, both figures to be minimised, sorted by the first figure.
    Of equal points the earliest stays; points with NaN are never on the front."""
    order = sorted((i for i, p in enumerate(points) if not any(map(math.isnan, p))), key=lambda i: (*points[i], i))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def reachable(problem: Problem, *, time_limit: float = 20.0, engine: Engine = "auto") -> tuple[float, float]:
    """(least reachable cost, cost of the best-scored selection) in ms: budgets below the first cannot be met,
    budgets above the second bring nothing. HantcError if no selection exists."""
    low = cheapest(problem, time_limit=time_limit, engine=engine)
    free = solve(replace(problem, budget=math.inf), gap=0.0, time_limit=time_limit, engine=engine)
    return low.cost, max(low.cost, free.cost)


def solve_for_score(
    problem: Problem,
    max_score: float,
    *,
    gap: float = 1e-3,
    time_limit: float = 20.0,
    engine: Engine = "auto",
) -> Solution:
    """The cheapest selection whose scores add up to at most `max_score`; the problem's budget is not looked at.
    `gap` is relative to the cost outside the fixed part; `time_limit` in seconds.

    Raises BudgetError if no selection scores that low; its `nearest` is then the least reachable *score*."""
    if math.isnan(max_score):
        raise UsageError("the allowed score is not a number", where="search")
    task = Task(problem, "cost", max_score=max_score)
    answer = run(task, gap=gap, time_limit=time_limit, engine=engine)
    if answer.picked is not None:
        return make_solution(problem, answer.picked, optimal=answer.optimal, gap=answer.gap)
    best = solve(replace(problem, budget=math.inf), gap=0.0, time_limit=time_limit, engine=engine)
    if answer.infeasible:
        raise BudgetError(
            f"no selection scores {max_score:.4g} or less: the least reachable is {best.score:.4g}",
            nearest=best.score,
            where="search",
            hint="allow a larger drop, or train the candidates longer",
        )
    return replace(best, optimal=False, gap=math.inf)
