"""Tables corrected by students."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hantc.core.backend_api import Artefact
from hantc.core.types import Correction, Fetching, Plan, Protocol, Timing, untouched
from hantc.passes.fetching import fetching_for
from hantc.passes.meter import Meter
from hantc.passes.program import footprint, make_plan, make_problem, parts_of, teachers_footprint
from hantc.passes.state import Clock, Evaluated, State
from hantc.passes.trials import corrected, evaluated, measure_students, trials, turns_of, write_student
from hantc.search.ilp import solve_diverse
from hantc.search.problem import make_solution
from tests.passes.test_meter import Moody
from tests.passes.test_program import chain, cost, score, state_of

if TYPE_CHECKING:
    from tests.passes.conftest import Lab


def plans(state: State) -> list[Plan]:
    problem = make_problem(state, math.inf)
    return [make_plan(state, problem, s) for s in solve_diverse(replace(problem, budget=5.5), 6)]


def wide(scale: float = 1.0) -> State:
    fast = [(cost(f"r0{i}", "cb_stack", "fp32", 1.2), score(f"r0{i}", "cb_stack", "fp32", 0.02)) for i in range(3)]
    return state_of(chain(), fast, scale=scale)


def load(state: State, plan: Plan) -> float:
    """A plan's load on the caches."""
    assert state.match is not None and state.costs is not None
    return state.costs.fetching.load_mb(*footprint(state.match, state.costs, plan))


def test_a_plans_parts_add_up_to_its_latency() -> None:
    state = wide(scale=0.9)
    assert state.costs is not None and state.match is not None
    rows = tuple(replace(r, params=250_000) for r in state.costs.rows)  # a megabyte each, a quarter in INT8
    heavy = replace(state.costs, rows=rows, fetching=Fetching(2.0, 0.2, 3.5, 0.5))
    table = {(r.region, r.candidate, r.precision): r for r in rows}
    for correction in (Correction(), Correction(1.1, 0.9, 1.3, 2.0, 0.8, 1.5)):
        costs = replace(heavy, correction=correction)
        fetched = set()
        for plan in plans(replace(state, costs=costs)):
            parts = parts_of(state.match, costs, plan)
            total = math.fsum(ms * factor for ms, factor in zip(parts, astuple(correction), strict=True))
            assert total == pytest.approx(plan.predicted_latency_ms)
            *_, glue, fetching = parts
            assert glue == pytest.approx(0.5)
            own = [table[c.region, c.candidate, c.precision] for c in plan.choices]
            ms = sum(r.latency_ms * (0.9 if untouched(r.candidate, r.precision) else 1.0) for r in own)
            load = sum(r.weight_mb for r in own) + 0.5 * ms
            assert fetching == pytest.approx(0.2 * (max(0.0, load - 2.0) + max(0.0, load - 3.5)))
            fetched.add(round(fetching, 6))
        assert len(fetched) > 1, "plans differ in it"


def test_what_others_do_to_the_caches_is_told_by_the_teacher_beside_the_students() -> None:
    """Since the table was measured, fetching weights has come to take twice as long: the teacher, the heaviest, says
    so, and plans of few weights are not moved."""
    state = wide()
    assert state.costs is not None
    own = [untouched(r.candidate, r.precision) for r in state.costs.rows]
    rows = tuple(replace(r, params=2_000_000 * mine) for r, mine in zip(state.costs.rows, own, strict=True))
    costs = replace(state.costs, rows=rows, fetching=fetching_for(2.0, 24.0, 24.0, 48.0, 4.0), teacher_ms=6.5 + 2.0)
    state = replace(state, costs=costs)
    problem = make_problem(state, math.inf)
    cheap = solve_diverse(replace(problem, budget=4.6), 4)
    light = [p for p in (make_plan(state, problem, s) for s in cheap) if load(state, p) <= 24.0]
    found = [Evaluated(p, p.predicted_latency_ms, 6.5 + 4.0, None, None) for p in light]
    assert found
    after = corrected(state, trials(state, found))
    correction = after.correction
    assert correction.fetching * after.fetching.ms(48.0) > 3.2
    assert (correction.floats, correction.int8) == pytest.approx((1.0, 1.0), abs=0.03)


def test_how_much_the_caches_hold_is_told_by_the_students() -> None:
    """By the table all weights beyond a load of 4 MB are fetched: students of all weights show that it is 60."""
    state = wide()
    assert state.costs is not None
    rows = tuple(replace(r, params=4_000_000 if r.candidate == "teacher" else 100_000) for r in state.costs.rows)
    teacher_mb = 3 * 16.0
    wrong, right = (fetching_for(4.0, held, teacher_mb, 2 * teacher_mb, teacher_mb / 6.0) for held in (4.0, 60.0))
    state = replace(state, costs=replace(state.costs, rows=rows, fetching=wrong, teacher_ms=10.5))
    assert state.costs is not None
    real = replace(state, costs=replace(state.costs, fetching=right))
    problem, true_problem = make_problem(state, math.inf), make_problem(real, math.inf)
    found = []
    for budget in (4.0, 5.0, 6.0, 7.0, 8.0, 9.0):
        solution = solve_diverse(replace(true_problem, budget=budget), 1)[0]
        ms = solution.cost
        found.append(Evaluated(make_plan(state, problem, solution), ms, 10.5, None, None))
    costs = corrected(state, trials(state, found))
    assert 50.0 <= costs.fetching.free_mb <= 70.0, costs.fetching
    assert corrected(real, trials(real, found)).fetching == right, "no other where there is no need"


def test_students_of_several_rounds_are_understood_in_the_state_of_each() -> None:
    """The caches hold 2 MB; a megabyte above costs 0.05, 0.1 and 0.2 ms in three rounds: so the teacher says."""
    state = wide()
    assert state.costs is not None
    rows = tuple(replace(r, params=500_000) for r in state.costs.rows)
    wide_rows = tuple(replace(r, params=4_000_000) if untouched(r.candidate, r.precision) else r for r in rows)
    states = {ms: Fetching(2.0, ms) for ms in (0.05, 0.1, 0.2)}
    state = replace(state, costs=replace(state.costs, rows=wide_rows, fetching=states[0.1], teacher_ms=6.5 + 4.6))
    assert state.costs is not None
    problem, found = make_problem(state, math.inf), []
    for at in states.values():
        true_problem = make_problem(replace(state, costs=replace(state.costs, fetching=at)), math.inf)
        for budget in (5.0, 6.0, 8.0):
            s = solve_diverse(replace(problem, budget=budget), 1)[0]
            ms = make_solution(true_problem, s.items, optimal=False, gap=math.inf).cost
            found.append(Evaluated(make_plan(state, problem, s), ms, 6.5 + at.ms(48.0), None, None))
    costs = corrected(state, trials(state, found))
    assert costs.fetching == states[0.1]
    assert astuple(costs.correction) == pytest.approx([1.0] * 6, abs=0.03)


def test_what_the_students_do_not_tell_stays_the_tables() -> None:
    """The teacher takes three times as long for its weights, and none of the students has any: how many stay in the
    caches is what the table says."""
    state = wide()
    assert state.costs is not None
    rows = tuple(replace(r, params=2_000_000 if untouched(r.candidate, r.precision) else 0) for r in state.costs.rows)
    costs = replace(state.costs, rows=rows, fetching=fetching_for(0.8, 20.0, 24.0, 48.0, 4.0), teacher_ms=6.5 + 0.8)
    state = replace(state, costs=costs)
    problem = make_problem(state, math.inf)
    light = [make_plan(state, problem, s) for s in solve_diverse(replace(problem, budget=4.6), 4)]
    light = [p for p in light if load(state, p) <= 20.0]
    found = [Evaluated(p, p.predicted_latency_ms, 6.5 + 2.4, None, None) for p in light]
    after = corrected(state, trials(state, found))
    assert found and after.fetching.free_mb == pytest.approx(20.0)
    assert after.correction.fetching * after.fetching.ms(48.0) == pytest.approx(2.4, rel=0.1)


def test_kinds_that_cost_more_in_networks_are_found() -> None:
    """INT8 parts take 1.4 of what the table says, borders three times: the corrected table says so too."""
    state = wide()
    assert state.costs is not None
    truth = Correction(int8=1.4, borders=3.0)
    real = replace(state, costs=replace(state.costs, correction=truth))
    problem, true_problem = make_problem(state, math.inf), make_problem(real, math.inf)
    solutions = solve_diverse(replace(problem, budget=5.5), 6)
    exact = [make_solution(true_problem, s.items, optimal=False, gap=math.inf).cost for s in solutions]
    found = [
        Evaluated(make_plan(state, problem, s), ms, state.costs.teacher_ms, None, None)
        for s, ms in zip(solutions, exact, strict=True)
    ]
    costs = corrected(state, trials(state, found))
    assert costs.correction.borders > 1.5 and costs.correction.int8 > 1.1
    after = make_problem(replace(state, costs=costs), math.inf)
    for s, ms in zip(solutions, exact, strict=True):
        before = abs(s.cost / ms - 1)
        now = abs(make_solution(after, s.items, optimal=False, gap=math.inf).cost / ms - 1)
        assert now <= max(before, 0.03)


class Crowded(Moody):
    """A machine whose memory others use too: the teacher, timed first, no longer keeps its weights in the caches."""

    def __init__(self, times: float, *, refuses: str = "") -> None:
        super().__init__([1.0], refuses=refuses)
        self.times = times

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        first, *rest = super().measure(artefacts, protocol)
        return [replace(first, median_ms=first.median_ms * self.times) if rest else first, *rest]


def students(lab: Lab, machine: Moody, state: State | None = None, **options: Any) -> list[float]:
    state = state or lab.scored
    assert state.costs is not None
    problem = make_problem(state, 0.7 * state.costs.teacher_ms)
    ctx = lab.fresh(backend=machine, **options)
    return [e.measured_ms for e in measure_students(state, ctx, problem, solve_diverse(problem, 3))]


def test_students_are_not_faster_because_the_teacher_is_slower(lab: Lab) -> None:
    """Its many weights suffer more than theirs; a machine that is slower for all shows in the reference network."""
    calm = students(lab, Crowded(1.0))
    assert students(lab, Crowded(1.2)) == pytest.approx(calm)
    assert students(lab, Moody([1.0, 3.0])) == pytest.approx(calm), "the first is the reference"


def test_without_a_reference_network_the_teacher_is_the_clock(lab: Lab) -> None:
    calm, crowded = (students(lab, Crowded(times, refuses="HardSwish")) for times in (1.0, 1.2))
    assert crowded == pytest.approx([ms / 1.2 for ms in calm])


def test_with_a_table_from_a_file_its_reference_network_is_the_clock(lab: Lab) -> None:
    """That of the store at hand may have been timed in a slower hour than the table's."""
    calm = students(lab, Moody([1.0]), lut=Path("table.json"))
    for first, then in ((1.0, 1.0), (1.0, 3.0), (3.0, 1.0)):
        assert students(lab, Moody([first, then]), lut=Path("table.json")) == pytest.approx(calm)
    assert students(lab, Crowded(1.2), lut=Path("table.json")) == pytest.approx(calm)


def test_with_a_table_that_knows_no_reference_the_teacher_is_the_clock(lab: Lab) -> None:
    old = replace(lab.scored, costs=replace(lab.scored.costs, clock_ms=None))  # type: ignore[type-var]
    calm, crowded = (students(lab, Crowded(t), old, lut=Path("table.json")) for t in (1.0, 1.2))
    assert crowded == pytest.approx([ms / 1.2 for ms in calm])


class Ticking(Clock):
    """A clock that goes on by a second whenever somebody looks."""

    def remaining(self) -> float:
        self.excuse(-1.0)
        return super().remaining()


@pytest.mark.parametrize(("limit_s", "turns"), [(1e6, 5), (250.0, 4), (40.0, 2), (0.0, 2)])
def test_students_are_timed_the_shorter_the_less_time_is_left(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, limit_s: float, turns: int
) -> None:
    asked: list[int] = []

    def watched(meter: Meter, artefacts: Sequence[object], protocol: Protocol) -> list[Timing]:
        asked.append(protocol.samples)
        return [Timing(1.0, 0.0, 1)] * len(artefacts)

    assert lab.scored.costs is not None
    problem = make_problem(lab.scored, 0.7 * lab.scored.costs.teacher_ms)
    ctx = replace(lab.fresh(), clock=Ticking(limit_s))
    monkeypatch.setattr(Meter, "measure", watched)
    measure_students(lab.scored, ctx, problem, solve_diverse(problem, 1))
    assert asked == [5] * turns


class Drifting(Moody):
    """A host whose state differs from one timing to the next: the teacher, the first of four, takes so many ms more,
    and a student some share of that."""

    def __init__(self, drift: Sequence[float], share: float = 0.5) -> None:
        super().__init__([1.0])
        self.drift, self.share, self.at = list(drift), share, 0

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        found = super().measure(artefacts, protocol)
        if len(artefacts) != 4:
            return found
        more = self.drift[self.at % len(self.drift)]
        self.at += 1
        (teacher, student, *rest), share = found, self.share
        teacher = replace(teacher, median_ms=teacher.median_ms + more)
        return [teacher, replace(student, median_ms=student.median_ms + share * more), *rest]


DRIFT = [0.0, 4.0, 9.0, 2.0, 6.0, 12.0, 1.0]  # of other length than there are students in a turn


@pytest.mark.parametrize("options", [{}, {"lut": Path("table.json")}], ids=["own", "table"])
def test_students_are_told_in_one_state_of_the_host(lab: Lab, options: dict[str, Any]) -> None:
    state = lab.scored
    assert state.costs is not None
    problem = make_problem(state, 0.7 * state.costs.teacher_ms)
    solutions = solve_diverse(problem, 3)
    calm, moved = (
        measure_students(state, lab.fresh(backend=machine, **options), problem, solutions)
        for machine in (Moody([1.0]), Drifting(DRIFT))
    )
    assert state.costs.clock_ms is not None
    unit = state.costs.clock_ms / Meter(lab.fresh(backend=Moody([1.0]))).reference_ms if options else 1.0
    usual = moved[0].teacher_ms
    assert {e.teacher_ms for e in moved} == {usual}
    assert usual == pytest.approx(calm[0].teacher_ms + 4.0 * unit), "the median of what it drifted"
    for before, after in zip(calm, moved, strict=True):
        assert after.measured_ms == pytest.approx(before.measured_ms + 0.5 * (usual - before.teacher_ms))


def test_how_far_a_student_should_go_along_follows_from_its_weights() -> None:
    """Where the caches hold half a megabyte, and the teacher has 24; if turns do not tell."""
    state = wide()
    assert state.costs is not None
    own = [untouched(r.candidate, r.precision) for r in state.costs.rows]
    rows = tuple(
        replace(r, params=2_000_000 if mine else 500_000) for r, mine in zip(state.costs.rows, own, strict=True)
    )
    state = replace(state, costs=replace(state.costs, rows=rows, fetching=Fetching(0.5, 0.1)))
    assert state.costs is not None
    problem = make_problem(state, math.inf)
    plan = make_plan(state, problem, solve_diverse(replace(problem, budget=4.6), 1)[0])
    mb = load(state, plan)
    assert 0.5 < mb < 24.0
    (first, second) = evaluated(state, [plan, plan], [[(4.0, 9.0)] * 5, [(4.0, 8.0)] * 5])
    assert (first.teacher_ms, second.teacher_ms) == (8.5, 8.5)
    slope = (mb - 0.5) / 23.5
    assert first.measured_ms == pytest.approx(4.0 - 0.5 * slope)
    assert second.measured_ms == pytest.approx(4.0 + 0.5 * slope)
    calm = replace(state, costs=replace(state.costs, fetching=Fetching()))
    assert evaluated(calm, [plan, plan], [[(4.0, 9.0)] * 5, [(4.0, 8.0)] * 5])[0].measured_ms == 4.0


def test_time_makes_a_student_go_along_too() -> None:
    """The teacher, priced at 0.9 of its parts alone, loads the caches with 24 MB of weights and as much of others'."""
    state = wide(scale=0.9)
    assert state.costs is not None and state.match is not None
    rows = tuple(replace(r, params=2_000_000 * (r.candidate == "teacher")) for r in state.costs.rows)
    state = replace(state, costs=replace(state.costs, rows=rows, fetching=Fetching(6.0, 0.1, None, 24.0 / 5.4)))
    assert state.costs is not None and state.match is not None
    assert teachers_footprint(state.match, state.costs) == pytest.approx((24.0, 5.4))
    problem = make_problem(state, math.inf)
    plan = make_plan(state, problem, solve_diverse(replace(problem, budget=5.5), 1)[0])
    mb, ms = footprint(state.match, state.costs, plan)
    assert mb < 24.0 and 6.0 < load(state, plan) == pytest.approx(mb + ms * 24.0 / 5.4)
    found = evaluated(state, [plan, plan], [[(4.0, 9.0)] * 5, [(4.0, 8.0)] * 5])
    assert found[0].measured_ms == pytest.approx(4.0 - 0.5 * (load(state, plan) - 6.0) / 42.0)


def test_more_turns_for_those_who_ask(lab: Lab) -> None:
    assert lab.scored.costs is not None
    problem = make_problem(lab.scored, 0.7 * lab.scored.costs.teacher_ms)
    ctx = lab.fresh(backend=Moody([1.0]))
    plan = make_plan(lab.scored, problem, solve_diverse(problem, 1)[0])
    models = [write_student(lab.scored, ctx, plan)] * 2
    assert [len(own) for own in turns_of(lab.scored, ctx, models, 7)] == [7, 7]
    assert turns_of(lab.scored, ctx, [], 7) == []


def test_a_round_in_another_state_moves_no_factor() -> None:
    """The teacher hardly takes longer than its parts in two rounds, and half as long again in the third, whose students
    are as heavy: that is fetching, and says nothing of what students compute with."""
    state = wide()
    assert state.costs is not None
    rows = tuple(replace(r, params=2_000_000) for r in state.costs.rows)
    state = replace(state, costs=replace(state.costs, rows=rows, fetching=Fetching(0.0, 0.01), teacher_ms=6.5 + 0.24))
    problem, found = make_problem(state, math.inf), []
    for more in (0.24, 0.24, 0.24, 0.24, 3.0):
        plan = make_plan(state, problem, solve_diverse(replace(problem, budget=5.0), 1)[0])
        assert state.costs is not None
        mb = load(state, plan)
        ms = plan.predicted_latency_ms - 0.01 * mb + more * mb / 24.0
        found.append(Evaluated(plan, ms, 6.5 + more, None, None))
    correction = corrected(state, trials(state, found)).correction
    assert (correction.own, correction.floats, correction.int8) == pytest.approx((1.0, 1.0, 1.0), abs=0.06)


def test_correcting_by_nothing_changes_nothing() -> None:
    state = wide()
    assert state.costs is not None
    assert corrected(state, []) == state.costs
