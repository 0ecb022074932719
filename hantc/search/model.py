"""The integer program itself: reduces a problem, states it in PuLP, runs HiGHS (CBC where HiGHS is missing)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pulp  # type: ignore[import-untyped, unused-ignore]

from hantc.core.errors import HantcError
from hantc.search.problem import Border, Problem, validate

Engine = Literal["auto", "highs", "cbc"]
_TIE = 1e-6  # weight of the secondary figure (in units of its own bound) against the primary's typical item
_CLIP = 1e7  # larger coefficients, in units of the typical one, mean nothing to a floating-point solver
_SLACK = 1e-9  # so that a bound that equals a reachable sum stays reachable after rounding


@dataclass(frozen=True)
class Task:
    """What to minimise under which bounds. `cuts`: earlier selections (item indices), each of which may share
    at most `cut_cap` atoms with the answer."""

    problem: Problem
    objective: Literal["score", "cost"]
    max_cost: float = math.inf
    max_score: float = math.inf
    cuts: tuple[frozenset[int], ...] = ()
    cut_cap: int = 0


@dataclass(frozen=True)
class Answer:
    """What the solver says. `infeasible` is a proof; without it and without `picked`, time ran out."""

    picked: tuple[int, ...] | None
    infeasible: bool
    optimal: bool
    gap: float


@dataclass(frozen=True)
class _Reduced:
    """The figures of the items that are left, by item index, and the borders between two atoms."""

    score: Mapping[int, float]
    cost: Mapping[int, float]
    borders: tuple[Border, ...]


def run(task: Task, *, gap: float, time_limit: float, engine: Engine = "auto") -> Answer:
    """Solve `task` to the relative `gap` within `time_limit` seconds. Same input, same answer, unless time runs
    out. Among answers with equal objective it prefers a low secondary figure (cost under score, and back).
    HantcError if the problem is not valid (see `problem.validate`)."""
    if task.problem.n_atoms == 0:
        fixed = task.problem.fixed_cost
        late = fixed > task.max_cost or task.max_score < 0 or bool(task.cuts)
        late = late or any(limit.fixed > limit.most for limit in task.problem.limits)
        return Answer(None if late else (), late, not late, 0.0)
    reduced = _reduce(task)
    lp, z = _state(task, reduced)
    solver, is_highs = _solver(engine, gap, time_limit)
    status = lp.solve(solver)
    if status == pulp.LpStatusInfeasible:
        return Answer(None, True, False, math.inf)
    picked = tuple(i for i, var in z.items() if var.varValue is not None and var.varValue > 0.5)
    if status != pulp.LpStatusOptimal or not _covers(task.problem, picked):
        return Answer(None, False, False, math.inf)
    proved = lp.sol_status == pulp.LpSolutionOptimal
    reached = _highs_gap(lp) if is_highs else (gap if proved else math.inf)
    return Answer(picked, False, proved, reached)


def _covers(problem: Problem, picked: Iterable[int]) -> bool:
    atoms = [a for i in picked for a in problem.items[i].atoms]
    return sorted(atoms) == list(range(problem.n_atoms))


def _highs_gap(lp: pulp.LpProblem) -> float:
    info: Any = lp.solverModel.getInfo()
    value, bound = info.objective_function_value, info.mip_dual_bound
    difference = value - bound
    return max(0.0, difference / max(abs(value), 1e-9)) if difference > 1e-9 else 0.0


def _solver(engine: Engine, gap: float, time_limit: float) -> tuple[Any, bool]:
    limit = max(time_limit, 0.01)
    if engine != "cbc" and pulp.HiGHS(msg=False).available():
        tight = {"primal_feasibility_tolerance": 1e-9, "mip_feasibility_tolerance": 1e-9}
        solver = pulp.HiGHS(msg=False, gapRel=gap, gapAbs=1e-9, timeLimit=limit, random_seed=0, parallel="off", **tight)
        return solver, True
    cbc = pulp.PULP_CBC_CMD(msg=False, gapRel=gap, timeLimit=limit, threads=1)
    if engine == "highs" or not cbc.available():
        raise HantcError("no integer programming solver", where="search", hint="pip install highspy")
    return cbc, False


def _reduce(task: Task) -> _Reduced:
    """Fold borders with fp32 surroundings into the items, then remove items that another one beats."""
    problem = task.problem
    use = validate(problem)
    borders = [b for b in (problem.borders[k] for k in use.borders) if b.cost > 0]
    edge: dict[int, float] = {}
    for b in borders:
        inner = b.right if b.left is None else b.left if b.right is None else None
        if inner is not None:
            edge[inner] = edge.get(inner, 0.0) + b.cost
    score = {i: problem.items[i].score for i in use.items}
    cost = {i: problem.items[i].cost for i in use.items}
    for i in use.items:
        if problem.items[i].int8:
            cost[i] += sum(edge.get(a, 0.0) for a in problem.items[i].atoms)
    if task.objective == "cost" and math.isinf(task.max_score):
        score = dict.fromkeys(score, 0.0)  # the score does not matter
    mutual = tuple(b for b in borders if b.left is not None and b.right is not None)
    touched = {a for b in mutual for a in (b.left, b.right) if a is not None}
    kept = _undominated(task, score, cost, touched)
    return _Reduced({i: score[i] for i in kept}, {i: cost[i] for i in kept}, mutual)


def _undominated(task: Task, score: Mapping[int, float], cost: Mapping[int, float], touched: set[int]) -> list[int]:
    """Item a beats b if it stands in the same place, looks the same to the borders, is no worse in score, cost, uses
    and load (where that costs anything), and is in no cut that b is not in: putting a for b then keeps any selection
    valid and no worse."""
    cuts = {i: frozenset(k for k, cut in enumerate(task.cuts) if i in cut) for i in score}
    groups: dict[tuple[frozenset[int], bool], list[int]] = {}
    for i in score:
        item = task.problem.items[i]
        groups.setdefault((item.atoms, item.int8 and not touched.isdisjoint(item.atoms)), []).append(i)
    items = task.problem.items

    def load(i: int) -> float:
        return items[i].load_mb if task.problem.fetching.ms_per_mb > 0 else 0.0

    def thriftier(j: int, i: int) -> bool:
        return load(j) <= load(i) and all(a <= b for a, b in zip(items[j].uses, items[i].uses, strict=True))

    kept: list[int] = []
    for members in groups.values():
        best: list[int] = []
        for i in sorted(members, key=lambda i: (score[i], cost[i], load(i), len(cuts[i]), i)):
            if not any(cost[j] <= cost[i] and cuts[j] <= cuts[i] and thriftier(j, i) for j in best):
                best.append(i)
        kept += best
    return sorted(kept)


def undominated(problem: Problem) -> list[int]:
    """Indices of the items that no other one at the same place and precision beats in score and cost: no best
    selection needs the rest. HantcError if the problem is not valid."""
    return list(_reduce(Task(problem, "score")).score)


def _unit(values: Iterable[float], bound: float) -> tuple[float, float]:
    """(typical size of one figure, size of the bound or of the typical figure), both above 0."""
    sizes = [abs(v) for v in values if v]
    typical = statistics.median(sizes) if sizes else 1.0
    return typical, max(typical, abs(bound) if math.isfinite(bound) else 0.0)


def _clip(value: float) -> float:
    return max(-_CLIP, min(_CLIP, value))


def _state(task: Task, reduced: _Reduced) -> tuple[pulp.LpProblem, dict[int, pulp.LpVariable]]:
    """The program in PuLP, figures scaled to about 1, and its pick variables by item index."""
    problem = task.problem
    lp = pulp.LpProblem("select", pulp.LpMinimize)
    z = {i: _variable(lp, f"z{i:07d}", pulp.LpBinary) for i in reduced.score}
    crossing, fetched = _crossings(lp, problem, reduced), _fetched(lp, problem, z)
    cost_unit, cost_scale = _unit(
        [*reduced.cost.values(), *(b.cost for _, b in crossing), *(ms for _, ms in fetched)],
        task.max_cost - problem.fixed_cost,
    )
    score_unit, score_scale = _unit(reduced.score.values(), task.max_score)

    def cost_sum(unit: float) -> pulp.LpAffineExpression:
        terms = [(z[i], _clip(c / unit)) for i, c in reduced.cost.items()]
        terms += [(t, _clip(ms / unit)) for t, ms in fetched]
        return pulp.LpAffineExpression(terms + [(t, _clip(b.cost / unit)) for t, b in crossing])

    def score_sum(unit: float) -> pulp.LpAffineExpression:
        return pulp.LpAffineExpression([(z[i], _clip(s / unit)) for i, s in reduced.score.items()])

    if task.objective == "cost":
        lp += cost_sum(cost_unit) + _TIE * score_sum(score_scale)
    elif any(reduced.score.values()):
        lp += score_sum(score_unit) + _TIE * cost_sum(cost_scale)
    else:
        lp += cost_sum(cost_unit)  # all exact: the cheapest is the best
    by_atom: dict[int, list[pulp.LpVariable]] = {a: [] for a in range(problem.n_atoms)}
    for i, var in z.items():
        for atom in problem.items[i].atoms:
            by_atom[atom].append(var)
    for atom, variables in by_atom.items():
        lp += pulp.lpSum(variables) == 1, f"cover{atom}"
    for k, (t, border) in enumerate(crossing):
        left, right = _side(problem, z, border.left, border.right), _side(problem, z, border.right, border.left)
        lp += t >= left - right, f"out{k}"
        lp += t >= right - left, f"in{k}"
    if math.isfinite(task.max_cost):
        lp += cost_sum(cost_scale) <= (task.max_cost - problem.fixed_cost) / cost_scale + _SLACK, "budget"
    if math.isfinite(task.max_score):
        lp += score_sum(score_scale) <= task.max_score / score_scale + _SLACK, "score"
    for k, limit in enumerate(problem.limits):
        _, scale = _unit([problem.items[i].uses[k] for i in z], limit.most - limit.fixed)
        used = pulp.LpAffineExpression([(var, problem.items[i].uses[k] / scale) for i, var in z.items()])
        lp += used <= (limit.most - limit.fixed) / scale + _SLACK, f"limit{k}"
    for k, cut in enumerate(task.cuts):
        shared = [(z[i], len(problem.items[i].atoms)) for i in sorted(cut) if i in z]
        if shared:
            lp += pulp.LpAffineExpression(shared) <= task.cut_cap, f"cut{k}"
    return lp, z


def _variable(lp: pulp.LpProblem, name: str, category: str) -> pulp.LpVariable:
    """A variable in [0, 1]. PuLP 3.3.2 deprecates the constructor; what replaces it is not in 3.3.0."""
    make = getattr(lp, "add_variable", pulp.LpVariable)
    return make(name, 0, 1, cat=category)


def _crossings(lp: pulp.LpProblem, problem: Problem, reduced: _Reduced) -> list[tuple[pulp.LpVariable, Border]]:
    """One variable per border on which the precision can change: 1 where it does."""
    if not any(problem.items[i].int8 for i in reduced.score):
        return []
    return [(_variable(lp, f"t{k:05d}", pulp.LpContinuous), b) for k, b in enumerate(reduced.borders)]


def _fetched(
    lp: pulp.LpProblem, problem: Problem, z: Mapping[int, pulp.LpVariable]
) -> list[tuple[pulp.LpVariable, float]]:
    """A variable for the load above each of fetching's knees, 1 where it is as much as can be, and what that much
    costs, ms; none where it never costs anything. Fetching is convex in the load: nothing to branch on."""
    loads = {i: problem.items[i].load_mb for i in z}
    heaviest = [0.0] * problem.n_atoms
    for i, mb in loads.items():
        for atom in problem.items[i].atoms:
            heaviest[atom] = max(heaviest[atom], mb / len(problem.items[i].atoms))
    found = []
    for k, knee in enumerate(problem.fetching.knees if problem.fetching.ms_per_mb > 0 else ()):
        most = sum(heaviest) - knee
        if most > 1e-6 * sum(heaviest):
            above = _variable(lp, f"fetched{k}", pulp.LpContinuous)
            total = pulp.LpAffineExpression([(z[i], mb / most) for i, mb in loads.items()])
            lp += above >= total - knee / most, f"fetching{k}"
            found.append((above, most * problem.fetching.ms_per_mb))
    return found


def _side(
    problem: Problem, z: Mapping[int, pulp.LpVariable], atom: int | None, other: int | None
) -> pulp.LpAffineExpression:
    """1 if `atom` is in int8 through an item that does not hold `other` too (then the border is inside it)."""
    terms = [
        (var, 1.0)
        for i, var in z.items()
        if problem.items[i].int8 and atom in problem.items[i].atoms and other not in problem.items[i].atoms
    ]
    return pulp.LpAffineExpression(terms)
