"""Choosing: within the budget, by what whole students measure and lose."""

from __future__ import annotations

import math
from dataclasses import astuple, fields, replace
from typing import TYPE_CHECKING, Any

import pytest

from hantc.core.config import Budget
from hantc.core.errors import BudgetError
from hantc.core.store import Store
from hantc.core.types import CandidateSpec, Correction, CostTable, Fetching, MatchResult, Plan, ScoreRow
from hantc.passes.program import make_problem
from hantc.passes.select import Select
from hantc.passes.state import Clock, Context, Evaluated, State
from hantc.passes.trials import measure_students
from hantc.search.pareto import reachable

if TYPE_CHECKING:
    from tests.passes.conftest import Lab

STACK = CandidateSpec.make("cb_stack", k=3, w=0.5).name


def in_fp32(lab: Lab) -> State:
    """The scored state without INT8; candidates with invented scores."""
    state = lab.scored
    assert state.costs is not None and state.match is not None and state.weights is not None
    made = {"r01": 0.4, "r02": 0.3, "r03": 0.1, "r02_r03": 0.6}
    scores = [ScoreRow(r.name, "teacher", "fp32", 0.0, 0.0, 0.0, 1.0, 0.0) for r in state.match.regions]
    scores += [ScoreRow(r, STACK, "fp32", v, 0.0, 0.0, 1.0, 0.1) for r, v in made.items()]
    rows = tuple(r for r in state.costs.rows if r.precision == "fp32")
    return replace(state, scores=tuple(scores), costs=replace(state.costs, rows=rows))


def select(state: State, ctx: Context) -> tuple[State, Plan]:
    after = Select().call(state, ctx)
    assert after.plan is not None
    return after, after.plan


def check(state: State, plan: Plan) -> None:
    """Every atom is covered exactly once, by what has been priced and scored; figures add up."""
    assert state.match is not None and state.costs is not None and state.scores is not None
    atoms = [a for c in plan.choices for a in state.match.region(c.region).atoms]
    assert sorted(atoms) == list(range(state.match.n_atoms))
    assert atoms == sorted(atoms), "in the network's order"
    usable = {(r.region, r.candidate, r.precision) for r in state.scores if not r.dropped}
    assert {(c.region, c.candidate, c.precision) for c in plan.choices} <= usable & set(state.costs.by_key())
    assert plan.predicted_score == pytest.approx(sum(c.score for c in plan.choices))


@pytest.mark.parametrize("fraction", [0.6, 0.8, 1.0])
def test_the_plan_keeps_to_the_budget_and_to_what_is_measured(lab: Lab, fraction: float) -> None:
    ctx = lab.fresh(precisions=("fp32",), budget=Budget(fraction=fraction))
    state, plan = select(in_fp32(lab), ctx)
    check(state, plan)
    assert state.costs is not None
    budget = fraction * state.costs.teacher_ms
    assert plan.budget_ms == pytest.approx(budget)
    assert plan.predicted_latency_ms <= budget * 1.000001
    (chosen,) = [e for e in state.evaluated if e.chosen]
    assert [(c.region, c.candidate) for c in chosen.plan.choices] == [(c.region, c.candidate) for c in plan.choices]
    assert chosen.measured_ms <= 1.02 * budget
    assert chosen.measured_ms == pytest.approx(plan.predicted_latency_ms, rel=0.05)
    assert chosen.teacher_ms == pytest.approx(state.costs.teacher_ms)
    fitting = [e.loss for e in state.evaluated if e.measured_ms <= budget and e.loss is not None]
    assert chosen.loss == pytest.approx(min(fitting))
    changed = [c for c in plan.choices if c.candidate != "teacher"]
    assert bool(changed) == (fraction < 1), "with room for it, the teacher itself is best"


def test_students_are_judged_as_networks(lab: Lab) -> None:
    state, _ = select(in_fp32(lab), lab.fresh(precisions=("fp32",), budget=Budget(fraction=1.0)))
    teacher = [e for e in state.evaluated if all(c.candidate == "teacher" for c in e.plan.choices)]
    assert teacher
    assert all(e.accuracy == 100.0 for e in teacher)
    others = [e for e in state.evaluated if e not in teacher]
    assert all(e.loss is not None and teacher[0].loss is not None and e.loss > teacher[0].loss for e in others)
    plans = [tuple((c.region, c.candidate, c.precision) for c in e.plan.choices) for e in state.evaluated]
    assert len(set(plans)) > 1, "several selections are looked at"


def test_both_precisions_together(lab: Lab) -> None:
    ctx = lab.fresh(budget=Budget(fraction=0.5))
    state, plan = select(lab.scored, ctx)
    check(state, plan)
    assert {c.precision for c in plan.choices} & {"int8"}, "INT8 costs a quarter here and nearly nothing in accuracy"
    (chosen,) = [e for e in state.evaluated if e.chosen]
    assert chosen.measured_ms <= 1.02 * plan.budget_ms
    assert chosen.accuracy is not None and chosen.accuracy > 80, "of few images: the others are blended"
    assert all(c.runner_up for c in plan.choices)
    assert "seconds" in plan.solver


def test_without_labels(lab: Lab) -> None:
    ctx = lab.fresh(data=lab.plain, budget=Budget(fraction=0.5))
    state, plan = select(lab.scored, ctx)
    check(state, plan)
    # agreement with the teacher stands in for accuracy
    assert all(e.accuracy is not None and 0 <= e.accuracy <= 100 for e in state.evaluated)
    assert all(e.loss is not None and e.loss >= -1e-6 for e in state.evaluated)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("hantc.passes.select.measure_students", never)


def test_the_same_question_is_answered_from_the_store(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = lab.fresh(budget=Budget(fraction=0.5))
    first, plan = select(lab.scored, ctx)
    forbid(monkeypatch)
    again, same = select(lab.scored, lab.fresh(budget=Budget(fraction=0.5), store=ctx.store))
    assert same == plan
    assert again.evaluated == first.evaluated
    assert first.costs is not None and again.costs is not None
    assert again.costs == first.costs
    with pytest.raises(AssertionError, match="measured again"):
        select(lab.scored, lab.fresh(budget=Budget(fraction=0.6), store=ctx.store))


@pytest.mark.parametrize("slow", [1, 2])
def test_the_table_is_corrected_by_a_few_students_and_none_is_timed_twice(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, slow: int
) -> None:
    asked: list[int] = []
    measure = measure_students

    def counting(*args: Any) -> list[Evaluated]:
        asked.append(len(args[-1]))
        off = slow if len(asked) == 1 else 1  # the first time, students take `slow` times what the table says
        return [replace(e, measured_ms=off * e.plan.predicted_latency_ms) for e in measure(*args)]

    monkeypatch.setattr("hantc.passes.select.measure_students", counting)
    state, _ = select(lab.scored, lab.fresh(budget=Budget(fraction=0.7), effort={"solutions": 6}))
    *probed, more, explored = asked
    assert len(probed) == slow
    assert all(0 < n <= 4 for n in probed)
    assert probed[-1] + more <= 6
    assert len(state.evaluated) == probed[-1] + more + explored
    assert state.costs is not None and lab.scored.costs is not None
    assert state.costs.scale == lab.scored.costs.scale
    if slow == 1:
        assert state.costs.correction == Correction()
    else:
        assert max(astuple(state.costs.correction)) > 1.2


@pytest.mark.parametrize(("limit_s", "rounds"), [(0.5, 1), (1e6, 3)])
def test_correcting_ends_when_its_time_is_up(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, limit_s: float, rounds: int
) -> None:
    """Students that take ever longer than the corrected table says: one round where there is no time for more."""
    asked: list[int] = []
    measure = measure_students

    def growing(*args: Any) -> list[Evaluated]:
        asked.append(len(args[-1]))
        return [replace(e, measured_ms=1.3 * e.plan.predicted_latency_ms) for e in measure(*args)]

    monkeypatch.setattr("hantc.passes.select.measure_students", growing)
    ctx = replace(lab.fresh(budget=Budget(fraction=0.9)), clock=Clock(limit_s))
    assert lab.scored.match is not None
    found, _ = Select()._corrected(lab.scored, ctx, 0.9 * lab.scored.costs.teacher_ms, ())  # type: ignore[union-attr]
    assert len(asked) == rounds and found.costs != lab.scored.costs


def test_the_corrected_costs_are_the_same_from_the_store(lab: Lab) -> None:
    ctx = lab.fresh(budget=Budget(fraction=0.5))
    state = replace(lab.scored, costs=replace(lab.scored.costs, scale=0.5))  # type: ignore[type-var]
    first, _ = select(state, ctx)
    again, _ = select(state, lab.fresh(budget=Budget(fraction=0.5), store=ctx.store))
    assert first.costs is not None and again.costs is not None
    assert first.costs.correction != Correction(), "the table was corrected"
    assert again.costs.correction == first.costs.correction


def test_what_weights_cost_by_the_students_is_the_same_from_the_store(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(state: State, seen: object) -> CostTable:
        assert state.costs is not None
        return replace(state.costs, fetching=Fetching(0.01, 0.2))

    monkeypatch.setattr("hantc.passes.select.corrected", told)
    ctx = lab.fresh(budget=Budget(fraction=0.5))
    state = replace(lab.scored, costs=replace(lab.scored.costs, scale=0.5))  # type: ignore[type-var]
    select(state, ctx)
    forbid(monkeypatch)
    again, _ = select(state, lab.fresh(budget=Budget(fraction=0.5), store=ctx.store))
    assert again.costs is not None and again.costs.fetching == Fetching(0.01, 0.2)


def test_a_plan_made_in_haste_is_none_for_those_who_have_time(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(seconds: float, store: Store) -> Context:
        return replace(lab.fresh(budget=Budget(fraction=0.5), store=store), clock=Clock(seconds))

    store = lab.fresh().store
    _, plan = select(lab.scored, asked(300.0, store))
    forbid(monkeypatch)
    assert select(lab.scored, asked(200.0, store))[1] == plan
    with pytest.raises(AssertionError, match="measured again"):
        select(lab.scored, asked(400.0, store))


@pytest.mark.parametrize("other", [{"fetching": Fetching(0.0, 0.01)}, {"correction": Correction(own=1.2)}])
def test_another_table_is_another_question(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, other: dict[str, Fetching | Correction]
) -> None:
    ctx = lab.fresh(budget=Budget(fraction=0.5))
    select(lab.scored, ctx)
    forbid(monkeypatch)
    state = replace(lab.scored, costs=replace(lab.scored.costs, **other))  # type: ignore[type-var]
    with pytest.raises(AssertionError, match="measured again"):
        select(state, lab.fresh(budget=Budget(fraction=0.5), store=ctx.store))


def test_a_budget_out_of_reach_is_an_error_that_names_the_nearest(lab: Lab) -> None:
    with pytest.raises(BudgetError) as failure:
        select(in_fp32(lab), lab.fresh(precisions=("fp32",), budget=Budget(ms=0.01)))
    error = failure.value
    assert error.exit_code == 1
    assert "0.010 ms" in error.message
    assert error.nearest > 0
    assert error.hint.startswith("--budget ")
    # what the hint says, a share of the teacher's latency, works
    advised = Budget.parse(error.hint.split()[1].rstrip(","))
    assert advised.fraction == pytest.approx(min(error.nearest, 1.0))
    state, plan = select(in_fp32(lab), lab.fresh(precisions=("fp32",), budget=advised))
    check(state, plan)
    assert state.costs is not None
    assert plan.predicted_latency_ms <= advised.in_ms(state.costs.teacher_ms) * 1.000001


def test_a_budget_missed_by_no_more_than_measuring_can_be_wrong_is_tried(lab: Lab) -> None:
    """A nearest budget that was promised may be missed by a little when the table is corrected again."""
    state = in_fp32(lab)
    assert state.costs is not None
    least = reachable(make_problem(state, math.inf))[0] / state.costs.teacher_ms
    _, plan = select(state, lab.fresh(precisions=("fp32",), budget=Budget(fraction=least / 1.08)))
    assert 1 < plan.predicted_latency_ms / plan.budget_ms <= 1.1
    with pytest.raises(BudgetError):
        select(state, lab.fresh(precisions=("fp32",), budget=Budget(fraction=least / 1.3)))


def test_a_budget_of_the_teachers_own_latency_is_met_whatever_the_corrected_table_says(lab: Lab) -> None:
    """Students corrected it upwards: now the fastest selection seems to take longer than the teacher was measured."""
    state = in_fp32(lab)
    assert state.costs is not None
    least = reachable(make_problem(state, math.inf))[0] / state.costs.teacher_ms
    dear = Correction(*(2.0 / least for _ in fields(Correction)))
    _, plan = select(
        replace(state, costs=replace(state.costs, correction=dear)),
        lab.fresh(precisions=("fp32",), budget=Budget(fraction=1.0)),
    )
    assert plan.budget_ms == pytest.approx(state.costs.teacher_ms)
    assert plan.predicted_latency_ms == pytest.approx(plan.budget_ms), "students that were timed say otherwise"


def test_the_fastest_within_the_allowed_drop(lab: Lab) -> None:
    strict, _ = select(in_fp32(lab), lab.fresh(precisions=("fp32",), max_drop=0.0))
    loose, plan = select(in_fp32(lab), lab.fresh(precisions=("fp32",), max_drop=100.0))
    check(loose, plan)
    (tight,), (free,) = ([e for e in s.evaluated if e.chosen] for s in (strict, loose))
    assert free.measured_ms == min(e.measured_ms for e in loose.evaluated)
    assert free.measured_ms <= tight.measured_ms
    assert tight.accuracy == max(e.accuracy or math.nan for e in strict.evaluated)


def test_without_data_the_teachers_own_operations_are_the_plan(lab: Lab) -> None:
    state, plan = select(lab.scored, lab.context())
    assert [(c.region, c.candidate, c.precision) for c in plan.choices] == [
        (r, "teacher", "fp32") for r in ("r00", "r01", "r02", "r03")
    ]
    assert all(c.cost_ms == c.teacher_cost_ms > 0 for c in plan.choices)
    assert state.costs is not None
    assert plan.predicted_latency_ms == plan.budget_ms == state.costs.teacher_ms
    assert plan.predicted_score == 0.0
    assert "--data" in str(plan.solver["method"])
    assert state.evaluated == ()


def test_a_network_without_regions_has_an_empty_plan(lab: Lab) -> None:
    bare = replace(lab.scored, match=MatchResult((), (), 0), scores=())
    _, plan = select(bare, lab.fresh())
    assert plan.choices == ()
