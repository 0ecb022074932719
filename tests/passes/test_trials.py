"""Tables corrected by students."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hantc.core.backend_api import Artefact
from hantc.core.types import Correction, Plan, Protocol, Timing
from hantc.passes.program import make_plan, make_problem, parts_of
from hantc.passes.state import Evaluated, State
from hantc.passes.trials import corrected, measure_students, trials
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


def test_a_plans_parts_add_up_to_its_latency() -> None:
    state = wide(scale=0.9)
    assert state.costs is not None and state.match is not None
    for correction in (Correction(), Correction(own=1.1, floats=0.9, int8=1.3, borders=2.0, glue=0.8)):
        costs = replace(state.costs, correction=correction)
        for plan in plans(replace(state, costs=costs)):
            own, floats, int8, borders, glue = parts_of(state.match, costs, plan)
            factors = correction
            total = own * factors.own + floats * factors.floats + int8 * factors.int8
            total += borders * factors.borders + glue * factors.glue
            assert total == pytest.approx(plan.predicted_latency_ms)
            assert glue == pytest.approx(0.5)


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


def students(lab: Lab, machine: Moody, **options: Any) -> list[float]:
    assert lab.scored.costs is not None
    problem = make_problem(lab.scored, 0.7 * lab.scored.costs.teacher_ms)
    ctx = lab.fresh(backend=machine, **options)
    return [e.measured_ms for e in measure_students(lab.scored, ctx, problem, solve_diverse(problem, 3))]


def test_students_are_not_faster_because_the_teacher_is_slower(lab: Lab) -> None:
    """Its many weights suffer more than theirs; a machine that is slower for all shows in the reference network."""
    calm = students(lab, Crowded(1.0))
    assert students(lab, Crowded(1.2)) == pytest.approx(calm)
    assert students(lab, Moody([1.0, 3.0])) == pytest.approx(calm), "the first is the reference"


def test_without_a_reference_network_the_teacher_is_the_clock(lab: Lab) -> None:
    calm, crowded = (students(lab, Crowded(times, refuses="HardSwish")) for times in (1.0, 1.2))
    assert crowded == pytest.approx([ms / 1.2 for ms in calm])


def test_with_a_table_from_a_file_the_teacher_is_the_clock(lab: Lab) -> None:
    """The reference network of the store that it was measured with may have run in a slower hour."""
    calm, slow = (students(lab, Moody([1.0, pace]), lut=Path("table.json")) for pace in (1.0, 3.0))
    assert slow == pytest.approx(calm)
    crowded = students(lab, Crowded(1.2), lut=Path("table.json"))
    assert crowded == pytest.approx([ms / 1.2 for ms in calm])


def test_correcting_by_nothing_changes_nothing() -> None:
    state = wide()
    assert state.costs is not None
    assert corrected(state, []) == state.costs
