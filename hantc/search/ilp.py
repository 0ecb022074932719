"""Select one item per place by integer programming: the best, or several that differ."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from hantc.core.errors import BudgetError, HantcError
from hantc.search.model import Answer, Engine, Task, run
from hantc.search.problem import (
    NoMoreSolutionsError,
    Problem,
    Solution,
    budget_error,
    fits,
    make_solution,
    overlap_cap,
)


def solve(
    problem: Problem,
    *,
    gap: float = 1e-3,
    time_limit: float = 20.0,
    exclude: Sequence[Solution] = (),
    max_overlap: float = 0.7,
    engine: Engine = "auto",
) -> Solution:
    """The selection with the least score within the budget, proved to the relative `gap`.

    `exclude`: earlier solutions of the same problem, with each of which the answer shares at most `max_overlap`
    of the atoms (and never all). `time_limit` in seconds; when it ends the best selection found is returned
    with `optimal` False, at worst the cheapest one. Items with non-finite figures are passed over.

    Raises BudgetError (`nearest`: least reachable cost in ms) if the budget cannot be met, NoMoreSolutionsError
    if the budget can be met but not beside `exclude` or not in time, HantcError if no selection exists at all.
    """
    cuts = tuple(frozenset(s.items) for s in exclude)
    cap = overlap_cap(problem.n_atoms, max_overlap)
    task = Task(problem, "score", max_cost=problem.budget, cuts=cuts, cut_cap=cap)
    answer = run(task, gap=gap, time_limit=time_limit, engine=engine)
    if answer.picked is not None:
        return _as_solution(problem, answer)
    # The reachable minimum is a far smaller program: it tells a hopeless budget from too little time.
    least = cheapest(problem, engine=engine)
    if not fits(least.cost, problem.budget):
        raise budget_error(problem, least.cost)
    if not exclude:
        return Solution(least.items, least.score, least.cost, optimal=False, gap=math.inf)
    why = "exists" if answer.infeasible else f"was found in {time_limit:.3g} s"
    raise NoMoreSolutionsError(
        f"no further selection within {problem.budget:.4g} ms {why} that shares at most {cap} of "
        f"{problem.n_atoms} atoms with each of {len(cuts)} earlier ones",
        where="search",
        hint="raise the budget or the allowed overlap",
    )


def solve_diverse(
    problem: Problem,
    k: int,
    *,
    max_overlap: float = 0.7,
    gap: float = 1e-3,
    time_limit: float = 60.0,
    engine: Engine = "auto",
) -> list[Solution]:
    """Up to `k` selections, best first found first, every two of which share at most `max_overlap` of the atoms.

    `time_limit` (seconds) is for all of them together. Fewer come back, without an error, when no further one
    exists or time ends; the first one always comes. Raises what `solve` raises for the first one.
    """
    deadline = time.monotonic() + time_limit
    found: list[Solution] = []
    while len(found) < k:
        left = deadline - time.monotonic()
        if found and left <= 0:
            break
        # Up to twice its even share each, so that one hard program does not use up all the time.
        share = min(left, max(1.0, 2 * left / (k - len(found))))
        try:
            found.append(
                solve(problem, gap=gap, time_limit=share, exclude=found, max_overlap=max_overlap, engine=engine)
            )
        except NoMoreSolutionsError:
            break
    return found


def cheapest(problem: Problem, *, time_limit: float = 20.0, engine: Engine = "auto") -> Solution:
    """The selection that costs least, whatever its score and the budget; exact unless time ends. `gap` is of the
    cost outside the fixed part. HantcError if no selection covers every atom exactly once."""
    answer = run(Task(problem, "cost"), gap=0.0, time_limit=time_limit, engine=engine)
    if answer.picked is None:
        why = "exists: the spans do not fit together" if answer.infeasible else f"was found in {time_limit:.3g} s"
        if problem.limits and answer.infeasible:
            names = " and ".join(limit.name for limit in problem.limits)
            raise BudgetError(
                f"no selection meets {names} together",
                nearest=math.inf,
                where="search",
                hint="allow more of one of them",
            )
        raise HantcError(
            f"no selection that covers all {problem.n_atoms} atoms exactly once {why}",
            where="search",
            hint="give every atom a candidate of its own, such as its teacher",
        )
    return _as_solution(problem, answer)


def _as_solution(problem: Problem, answer: Answer) -> Solution:
    return make_solution(problem, answer.picked or (), optimal=answer.optimal, gap=answer.gap)
