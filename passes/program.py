"""The integer program of a state, and what its answers mean: DESIGN §2 over regions, candidates and precisions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

from hantc.core.types import UNUSABLE_MS, CandidateSpec, Choice, CostTable, MatchResult, Plan, untouched
from hantc.passes.glue import glue_shares, teachers_rows
from hantc.passes.limits import Allowance
from hantc.passes.state import State
from hantc.search.problem import Border, Item, Limit, Problem, Solution, clean, evaluate


def make_problem(state: State, budget_ms: float, bounds: Sequence[Allowance] = ()) -> Problem:
    """The integer program of DESIGN §2 over regions × candidates × precisions, with borders and `bounds`."""
    assert state.match is not None and state.costs is not None and state.scores is not None
    costs, match = state.costs.by_key(), state.match
    sums, peaks = [b for b in bounds if b.adds_up], [b for b in bounds if not b.adds_up]
    items = []
    shares, outside = glue_shares(match, state.costs)
    correction, fetching = state.costs.correction, state.costs.fetching
    for row in state.scores:
        cost = costs.get((row.region, row.candidate, row.precision))
        if cost is None or row.dropped or cost.latency_ms >= UNUSABLE_MS:
            continue
        if any(b.uses[row.region, row.candidate] > b.most for b in peaks):
            continue
        atoms = frozenset(match.region(row.region).atoms)
        # a candidate that seems to improve the network does so by chance: it is worth the teacher, no more
        score = row.score if math.isnan(row.score) else max(0.0, row.score)  # max(0.0, nan) is 0.0
        alone = _in_network_ms(state.costs, row.candidate, row.precision, cost.latency_ms)
        ms = inside_ms(state.costs, row.candidate, row.precision, cost.latency_ms)
        ms += shares[row.region] * correction.glue
        load = fetching.load_mb(cost.weight_mb, alone + shares[row.region])
        uses = tuple(b.uses[row.region, row.candidate] for b in sums)
        items.append(Item(row.region, row.candidate, row.precision, score, ms, atoms, uses, load))
    limits = tuple(Limit(b.option, b.fixed, b.most) for b in sums)
    problem = Problem(
        match.n_atoms,
        tuple(items),
        outside * correction.glue,
        budget_ms,
        _borders(match, state.costs),
        limits,
        replace(fetching, ms_per_mb=fetching.ms_per_mb * correction.fetching),
    )
    return clean(problem)[0]


def inside_ms(costs: CostTable, candidate: str, precision: str, ms: float) -> float:
    """What a part that takes `ms` alone takes in a network.

    Where the teacher's parts take longer together than apart, caches are colder there, for what replaces them as well.
    Where they take less, that is the teacher's own doing (what engines fuse of it across the cuts), and says nothing of
    others: taking it for theirs too, ten students of EfficientNet-B0 in floats seemed 5 % too fast in the median, and
    without 2 %."""
    factor: float = getattr(costs.correction, _kind(candidate, precision))
    return factor * _in_network_ms(costs, candidate, precision, ms)


def _in_network_ms(costs: CostTable, candidate: str, precision: str, ms: float) -> float:
    """`inside_ms` before students corrected it."""
    return ms * (costs.scale if _kind(candidate, precision) == "own" else max(1.0, costs.scale))


def _kind(candidate: str, precision: str) -> str:
    """Which of `Correction`'s factors holds for a choice."""
    return "own" if untouched(candidate, precision) else "int8" if precision == "int8" else "floats"


def parts_of(match: MatchResult, costs: CostTable, plan: Plan) -> tuple[float, ...]:
    """Milliseconds by kind, in the order of `Correction`'s fields, of a plan made from `costs`, uncorrected."""
    now = asdict(costs.correction)
    shares, outside = glue_shares(match, costs)
    glue = outside + sum(shares[c.region] for c in plan.choices)
    fetching = costs.fetching.ms(costs.fetching.load_mb(*footprint(match, costs, plan)))
    inside = dict.fromkeys(now, 0.0) | {"glue": glue * now["glue"], "fetching": fetching * now["fetching"]}
    for c in plan.choices:
        inside[_kind(c.candidate, c.precision)] += c.cost_ms
    inside["borders"] = max(0.0, plan.predicted_latency_ms - sum(inside.values()))
    return tuple(ms / now[kind] for kind, ms in inside.items())


def teachers_cost(problem: Problem) -> float:
    """What the teacher takes as its parts, by a problem's figures, ms; 0 where one of them cannot be run alone."""
    own = [i for i, o in enumerate(problem.items) if len(o.atoms) == 1 and untouched(o.candidate, o.precision)]
    if frozenset().union(*(problem.items[i].atoms for i in own)) != frozenset(range(problem.n_atoms)):
        return 0.0
    return evaluate(problem, own)[1]


def footprint(match: MatchResult, costs: CostTable, plan: Plan) -> tuple[float, float]:
    """What a plan's regions load the caches with: megabytes of weights, and ms as parts times the table's `scale`,
    before students corrected them, with what lies between the layers of blocks."""
    rows, (shares, _) = costs.by_key(), glue_shares(match, costs)
    own = [rows[c.region, c.candidate, c.precision] for c in plan.choices]
    ms = [_in_network_ms(costs, r.candidate, r.precision, r.latency_ms) + shares[r.region] for r in own]
    return math.fsum(r.weight_mb for r in own), math.fsum(ms)


def teachers_footprint(match: MatchResult, costs: CostTable) -> tuple[float, float]:
    """That of the teacher's regions as they are."""
    own, (shares, _) = teachers_rows(match.regions, costs.rows), glue_shares(match, costs)
    ms = [costs.scale * r.latency_ms + shares[r.region] for r in own]
    return math.fsum(r.weight_mb for r in own), math.fsum(ms)


def _borders(match: MatchResult, costs: CostTable) -> tuple[Border, ...]:
    pair = {s: 0.5 * costs.scale * costs.correction.borders * ms for s, ms in costs.transitions}
    atoms = [r for r in match.regions if len(r.atoms) == 1]
    ends = {r.output: r.atoms[0] for r in atoms}
    borders, fed = [], set()
    for r in atoms:
        left = ends.get(r.input)
        fed.add(left)
        borders.append(Border(left, r.atoms[0], pair.get(r.in_shape, 0.0)))
    last = [r for r in atoms if r.atoms[0] not in fed]
    borders += [Border(r.atoms[0], None, pair.get(r.out_shape, 0.0)) for r in last]
    return tuple(borders)


def specs_of(state: State) -> dict[str, CandidateSpec]:
    """Specs of all proposals by candidate name."""
    return {p.spec.name: p.spec for p in state.proposals or ()}


def make_plan(state: State, problem: Problem, solution: Solution) -> Plan:
    """A solution in the plan's terms, with each region's runner-up (least score among the unchosen). Choices' costs are
    their own, without their shares of what lies between the layers of a block that holds them."""
    assert state.match is not None and state.costs is not None
    shares, _ = glue_shares(state.match, state.costs)
    borne = {name: ms * state.costs.correction.glue for name, ms in shares.items()}
    choices = []
    for index in solution.items:
        item = problem.items[index]
        region = state.match.region(item.region)
        others = [o for i, o in enumerate(problem.items) if o.region == item.region and i != index]
        second = min(others, key=lambda o: (o.score, o.cost), default=None)
        teacher = sum(
            o.cost
            for o in problem.items
            if o.atoms <= item.atoms and len(o.atoms) == 1 and untouched(o.candidate, o.precision)
        )
        choices.append(
            Choice(
                region=item.region,
                kind=region.kind,
                candidate=item.candidate,
                precision=item.precision,
                score=item.score,
                cost_ms=item.cost - borne[item.region],
                teacher_cost_ms=teacher - borne[item.region],
                runner_up=f"{second.candidate} {second.precision}" if second else "",
            )
        )
    solver = {
        "optimal": solution.optimal,
        "gap": solution.gap if math.isfinite(solution.gap) else None,
        "items": len(problem.items),
    }
    return Plan(tuple(choices), solution.cost, problem.budget, solution.score, solver)
