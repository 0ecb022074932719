"""The integer program that a state of costs and scores becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from onnx import ModelProto

from hantc.core.types import (
    Correction,
    CostRow,
    CostTable,
    Fetching,
    MatchResult,
    Region,
    ScoreRow,
    Shape,
    untouched,
)
from hantc.passes.program import make_plan, make_problem, teachers_cost
from hantc.passes.state import State
from hantc.search.ilp import solve
from hantc.search.problem import Border, Item, evaluate

SHAPES: tuple[Shape, ...] = ((3, 8, 8), (8, 8, 8), (8, 4, 4), (16, 4, 4))
BORDERS = {(3, 8, 8): 0.1, (8, 8, 8): 0.2, (8, 4, 4): 0.4, (16, 4, 4): 0.8}


def region(name: str, atoms: tuple[int, ...], source: str, target: str, before: Shape, after: Shape) -> Region:
    return Region(name, "residual", source, target, (), before, after, 10, 1, atoms)


def chain(gap: bool = False) -> tuple[Region, ...]:
    """Three regions in a row (with something between the last two if `gap`) and a span of the first two."""
    names = ["x", "a", "b", "c"]
    atoms = [region(f"r0{i}", (i,), names[i], names[i + 1], SHAPES[i], SHAPES[i + 1]) for i in range(3)]
    if gap:
        atoms[2] = replace(atoms[2], input="pooled")
    return (*atoms, region("r00_r01", (0, 1), "x", "b", SHAPES[0], SHAPES[2]))


def cost(name: str, candidate: str, precision: str, ms: float) -> CostRow:
    return CostRow(name, candidate, precision, ms, 0.0, 5, "test", "d", 1, 1)


def score(name: str, candidate: str, precision: str, value: float, dropped: str = "") -> ScoreRow:
    return ScoreRow(name, candidate, precision, value, 0.0, None, 1.0, 0.0, dropped)


def state_of(
    regions: Sequence[Region],
    extra: Sequence[tuple[CostRow, ScoreRow]] = (),
    *,
    scale: float = 1.0,
) -> State:
    """Teachers at 2 ms in FP32 and 1 ms in INT8 (score 0.01) with the glue at 0.5 ms, and `extra` candidates."""
    rows: list[CostRow] = []
    scores: list[ScoreRow] = []
    for r in regions:
        n = len(r.atoms)
        rows += [cost(r.name, "teacher", "fp32", 2.0 * n), cost(r.name, "teacher", "int8", 1.0 * n)]
        scores += [score(r.name, "teacher", "fp32", 0.0), score(r.name, "teacher", "int8", 0.01 * n)]
    table = CostTable(
        (*rows, *(c for c, _ in extra)), teacher_ms=6.5, glue_ms=0.5, transitions=tuple(BORDERS.items()), scale=scale
    )
    n_atoms = sum(len(r.atoms) == 1 for r in regions)
    return State(
        model=ModelProto(),
        model_hash="h",
        match=MatchResult(tuple(regions), (), n_atoms),
        costs=table,
        scores=(*scores, *(s for _, s in extra)),
    )


def items(state: State, budget: float = 5.0) -> dict[str, Item]:
    return {str(i): i for i in make_problem(state, budget).items}


def test_one_item_for_each_priced_and_scored_choice() -> None:
    extra = (cost("r01", "cand", "int8", 0.25), score("r01", "cand", "int8", 0.3))
    problem = make_problem(state_of(chain(), [extra]), 4.0)
    assert (problem.n_atoms, problem.budget, problem.fixed_cost) == (3, 4.0, 0.5)
    assert len(problem.items) == 2 * 4 + 1
    found = {str(i): i for i in problem.items}
    assert found["r01/cand/int8"] == Item("r01", "cand", "int8", 0.3, 0.25, frozenset({1}))
    assert found["r00_r01/teacher/int8"].atoms == frozenset({0, 1})


def test_a_score_below_zero_is_chance_and_counts_as_zero() -> None:
    extra = (cost("r00", "lucky", "fp32", 1.0), score("r00", "lucky", "fp32", -0.7))
    assert items(state_of(chain(), [extra]))["r00/lucky/fp32"].score == 0.0


@pytest.mark.parametrize(
    ("ms", "value", "dropped"),
    [
        (1.0, 0.1, "alone it costs 30 points"),
        (1e9, 0.1, ""),  # what the backend cannot run
        (float("nan"), 0.1, ""),
        (1.0, float("nan"), ""),
        (1.0, float("inf"), ""),
    ],
)
def test_rows_that_cannot_be_chosen_are_left_out(ms: float, value: float, dropped: str) -> None:
    extra = (cost("r00", "bad", "fp32", ms), score("r00", "bad", "fp32", value, dropped))
    found = items(state_of(chain(), [extra]))
    assert "r00/bad/fp32" not in found
    assert len(found) == 8


def test_what_has_a_score_but_no_price_is_left_out() -> None:
    state = state_of(chain())
    assert state.scores is not None
    found = items(replace(state, scores=(*state.scores, score("r02", "unpriced", "fp32", 0.0))))
    assert len(found) == 8


def test_the_measured_scale_applies_to_items_and_borders_but_not_to_the_glue() -> None:
    problem = make_problem(state_of(chain(), scale=1.5), 5.0)
    assert problem.fixed_cost == 0.5
    assert {i.cost for i in problem.items if i.region == "r02"} == {3.0, 1.5}
    plain = make_problem(state_of(chain()), 5.0)
    assert [b.cost for b in problem.borders] == pytest.approx([1.5 * b.cost for b in plain.borders])


def test_what_the_teacher_gains_by_its_own_structure_says_nothing_of_others() -> None:
    extra = [(cost("r02", "good", "fp32", 1.0), score("r02", "good", "fp32", 0.01))]
    slower, quicker = (make_problem(state_of(chain(), extra, scale=s), 5.0) for s in (1.5, 0.5))
    plain = make_problem(state_of(chain(), extra), 5.0)
    assert {untouched(i.candidate, i.precision) for i in plain.items} == {True, False}
    for i, item in enumerate(plain.items):
        own = untouched(item.candidate, item.precision)
        assert slower.items[i].cost == pytest.approx(1.5 * item.cost)
        assert quicker.items[i].cost == pytest.approx((0.5 if own else 1.0) * item.cost)


def test_weights_beyond_what_the_caches_hold_cost_together() -> None:
    """Each of three regions has 8 MB in FP32, 2 in INT8; 10 stay in the caches."""
    state = state_of(chain())
    assert state.costs is not None
    rows = tuple(replace(r, params=2_000_000 * (2 if "_" in r.region else 1)) for r in state.costs.rows)
    costs = replace(state.costs, rows=rows, fetching=Fetching(10.0, 0.05), correction=Correction(fetching=2.0))
    problem = make_problem(replace(state, costs=costs), 9.0)
    at = {str(item): i for i, item in enumerate(problem.items)}
    own = [at[f"r0{k}/teacher/fp32"] for k in range(3)]
    assert evaluate(problem, own)[1] == pytest.approx(6.5 + 2.0 * 0.05 * (24 - 10))
    span = [at["r00_r01/teacher/fp32"], own[2]]
    assert evaluate(problem, span)[1] == pytest.approx(6.5 + 2.0 * 0.05 * (24 - 10))
    lighter = [at["r00/teacher/int8"], at["r01/teacher/int8"], own[2]]
    assert evaluate(problem, lighter)[1] == pytest.approx(0.5 + 4.0 + 0.05 + 0.2 + 2.0 * 0.05 * (12 - 10))
    assert solve(replace(problem, budget=6.6)).score > 0, "the teacher fits only without its weights"


def test_time_empties_shared_caches_too() -> None:
    """Others bring in two megabytes in each millisecond that parts take, before students corrected it."""
    state = state_of(chain())
    assert state.costs is not None
    rows = tuple(replace(r, params=2_000_000 * (2 if "_" in r.region else 1)) for r in state.costs.rows)
    costs = replace(state.costs, rows=rows, fetching=Fetching(12.0, 0.05, 20.0, 2.0), scale=1.5)
    for correction in (Correction(), Correction(own=1.3, int8=0.7)):
        problem = make_problem(replace(state, costs=replace(costs, correction=correction)), 9.0)
        loads = {str(item): item.load_mb for item in problem.items}
        ms = {(r.region, r.candidate, r.precision): r.latency_ms for r in rows}
        assert loads["r00/teacher/fp32"] == pytest.approx(8.0 + 2.0 * 1.5 * ms["r00", "teacher", "fp32"])
        assert loads["r00/teacher/int8"] == pytest.approx(2.0 + 2.0 * 1.5 * ms["r00", "teacher", "int8"])


def test_borders_stand_between_neighbours_and_at_both_ends() -> None:
    borders = make_problem(state_of(chain()), 5.0).borders
    # half a quantise/dequantise pair each
    assert set(borders) == {Border(None, 0, 0.05), Border(0, 1, 0.1), Border(1, 2, 0.2), Border(2, None, 0.4)}


def test_glue_between_regions_is_a_float_neighbour_on_both_sides() -> None:
    borders = make_problem(state_of(chain(gap=True)), 5.0).borders
    assert set(borders) == {
        Border(None, 0, 0.05),
        Border(0, 1, 0.1),
        Border(1, None, 0.2),
        Border(None, 2, 0.2),
        Border(2, None, 0.4),
    }


def test_without_measured_borders_they_cost_nothing() -> None:
    state = state_of(chain())
    assert state.costs is not None
    borders = make_problem(replace(state, costs=replace(state.costs, transitions=())), 5.0).borders
    assert {b.cost for b in borders} == {0.0}


def test_the_plan_says_what_its_solution_says() -> None:
    extra = [
        (cost("r02", "good", "int8", 0.25), score("r02", "good", "int8", 0.02)),
        (cost("r02", "other", "fp32", 0.5), score("r02", "other", "fp32", 0.005)),
        (cost("r00_r01", "wide", "fp32", 1.0), score("r00_r01", "wide", "fp32", 0.001)),
    ]
    state = state_of(chain(), extra)
    problem = make_problem(state, 2.1)
    solution = solve(problem)
    plan = make_plan(state, problem, solution)
    assert [(c.region, c.candidate, c.precision) for c in plan.choices] == [
        ("r00_r01", "wide", "fp32"),
        ("r02", "other", "fp32"),
    ]
    assert plan.predicted_latency_ms == pytest.approx(0.5 + 1.0 + 0.5)
    assert plan.budget_ms == 2.1
    assert plan.predicted_score == pytest.approx(0.006)
    span, last = plan.choices
    assert span.teacher_cost_ms == 4.0, "of the blocks that the span covers"
    assert (last.teacher_cost_ms, last.cost_ms, last.score) == (2.0, 0.5, 0.005)
    assert span.runner_up == "teacher fp32"
    assert last.runner_up == "teacher fp32"
    assert plan.solver["items"] == len(problem.items)
    assert plan.solver["optimal"] is True


def test_what_the_teacher_takes_as_its_parts() -> None:
    state = state_of(chain())
    assert state.costs is not None
    problem = make_problem(state, 9.0)
    own = [k for k, i in enumerate(problem.items) if len(i.atoms) == 1 and untouched(i.candidate, i.precision)]
    assert len(own) == 3 and teachers_cost(problem) == pytest.approx(evaluate(problem, own)[1]) and own
    rows = tuple(replace(r, latency_ms=1e9) if str(r.region) == "r01" else r for r in state.costs.rows)
    broken = make_problem(replace(state, costs=replace(state.costs, rows=rows)), 9.0)
    assert teachers_cost(broken) == 0.0, "the engine does not take one of them alone"
