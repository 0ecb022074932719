"""Simple selections to compare the integer program with: greedy, and random within the budget."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache

from hantc.search.ilp import cheapest
from hantc.search.model import undominated
from hantc.search.problem import Problem, Solution, budget_error, evaluate, fits, make_solution, validate

Cover = Callable[[frozenset[int]], tuple[float, tuple[int, ...]] | None]


def greedy(problem: Problem) -> Solution:
    """From the cheapest selection, take the swap that saves most score per added millisecond until no swap that
    saves score fits the budget. Deterministic. BudgetError as in `ilp.solve`."""
    picked, cover = _start(problem)
    pool = undominated(problem)  # a beaten item saves less per millisecond than the one that beats it
    score, cost = evaluate(problem, picked)
    while True:
        best: tuple[float, float, frozenset[int]] | None = None
        for j in pool:
            swapped = _swap(problem, picked, j, cover)
            if swapped is None or _score_change(problem, picked, swapped) >= -1e-12:
                continue
            new_score, new_cost = evaluate(problem, swapped)
            if not fits(new_cost, problem.budget):
                continue
            saved, spent = score - new_score, new_cost - cost
            rate = saved / spent if spent > 0 else math.inf
            if best is None or (rate, saved) > best[:2]:
                best = (rate, saved, swapped)
        if best is None:
            return make_solution(problem, picked, optimal=False, gap=math.inf)
        picked = best[2]
        score, cost = evaluate(problem, picked)


def random_selection(problem: Problem, *, seed: int, moves: int | None = None) -> Solution:
    """A random selection within the budget: `moves` random swaps (default 20 per atom) from the cheapest one,
    each kept if it fits. Same seed, same answer. BudgetError as in `ilp.solve`."""
    rng = random.Random(seed)
    picked, cover = _start(problem)
    pool = validate(problem).items
    for _ in range(20 * problem.n_atoms if moves is None else moves):
        swapped = _swap(problem, picked, rng.choice(pool), cover)
        if swapped is not None and fits(evaluate(problem, swapped)[1], problem.budget):
            picked = swapped
    return make_solution(problem, picked, optimal=False, gap=math.inf)


def _start(problem: Problem) -> tuple[frozenset[int], Cover]:
    """The cheapest selection, and what fills the holes that a swap leaves."""
    start = cheapest(problem)
    if not fits(start.cost, problem.budget):
        raise budget_error(problem, start.cost)
    return frozenset(start.items), _filler(problem, validate(problem).items)


def _filler(problem: Problem, pool: tuple[int, ...]) -> Cover:
    """A function from a set of atoms to the cheapest items that cover it exactly (borders not counted)."""
    cheapest_at: dict[frozenset[int], int] = {}
    for i in pool:
        atoms = problem.items[i].atoms
        if atoms not in cheapest_at or problem.items[i].cost < problem.items[cheapest_at[atoms]].cost:
            cheapest_at[atoms] = i

    @cache
    def fill(hole: frozenset[int]) -> tuple[float, tuple[int, ...]] | None:
        if not hole:
            return 0.0, ()
        first = min(hole)
        best: tuple[float, tuple[int, ...]] | None = None
        for atoms, i in cheapest_at.items():
            if first in atoms and atoms <= hole:
                rest = fill(hole - atoms)
                if rest is not None and (best is None or problem.items[i].cost + rest[0] < best[0]):
                    best = (problem.items[i].cost + rest[0], (i, *rest[1]))
        return best

    return fill


def _swap(problem: Problem, picked: frozenset[int], j: int, cover: Cover) -> frozenset[int] | None:
    """`picked` with item j put in, whatever it overlaps taken out, and holes filled cheaply; None if not possible."""
    if j in picked:
        return None
    atoms = problem.items[j].atoms
    out = {i for i in picked if not atoms.isdisjoint(problem.items[i].atoms)}
    hole = frozenset(a for i in out for a in problem.items[i].atoms) - atoms
    filled = cover(hole)
    return None if filled is None else (picked - out) | {j, *filled[1]}


def _score_change(problem: Problem, before: frozenset[int], after: frozenset[int]) -> float:
    gained = sum(problem.items[i].score for i in after - before)
    return gained - sum(problem.items[i].score for i in before - after)
