"""Whole students on the clock: built, timed beside the teacher, and the table corrected by what they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace

from onnx import ModelProto

from hantc.core.types import Correction, CostTable
from hantc.dialect.emitter import emit
from hantc.passes.assemble import Blueprint, build_student, calibration_feeds, to_onnx
from hantc.passes.glue import teachers_rows
from hantc.passes.meter import Meter
from hantc.passes.program import make_plan, parts_of, specs_of
from hantc.passes.state import Context, Evaluated, State
from hantc.search.correction import fit_factors
from hantc.search.problem import Problem, Solution

# how far from 1 each kind's factor may be expected: borders depend most on what stands beside them
_SPREAD = {"own": 0.05, "floats": 0.1, "int8": 0.15, "borders": 0.5, "glue": 0.2}
_TOGETHER = 0.05  # the same of all kinds: sessions and hours differ by that
_NOTHING = Correction(0.0, 0.0, 0.0, 0.0, 0.0)

Trial = tuple[tuple[float, ...], float]  # a student's `parts_of`, and what it took, ms


def trials(state: State, found: Sequence[Evaluated]) -> list[Trial]:
    """What students of the state's own table tell of it."""
    assert state.costs is not None and state.match is not None
    return [(parts_of(state.match, state.costs, e.plan), e.measured_ms) for e in found]


def measure_students(state: State, ctx: Context, problem: Problem, solutions: Sequence[Solution]) -> list[Evaluated]:
    """Emit every solution as a real student and time it beside the teacher (or take the table's word)."""
    assert state.network is not None and state.costs is not None and ctx.data is not None
    if not solutions:
        return []
    if ctx.from_table:
        made = [make_plan(state, problem, s) for s in solutions]
        return [Evaluated(p, p.predicted_latency_ms, state.costs.teacher_ms, None, None) for p in made]
    meter = Meter(ctx)
    models: list[ModelProto] = [emit(state.network).model]
    plans = []
    for s in solutions:
        plan = make_plan(state, problem, s)
        blueprint = Blueprint.of(plan.choices)
        student = build_student(state, blueprint, specs_of(state))
        models.append(to_onnx(student, blueprint, ctx, calibration_feeds(student, ctx.data, 16, 16)))
        plans.append(plan)
    protocol = ctx.protocol(warmup=3, samples=25, min_sample_ms=12.0)
    with ctx.reporter.bar(f"timing {len(plans)} students", 1.0) as bar:
        # in pairs: in a round of ten a large teacher finds the caches cold each time, and looks slower than it is
        pairs = []
        for model in models[1:]:
            pairs.append(meter.time([models[0], model], protocol))
            bar.advance(1 / len(plans))
    # the meter has them on the table's own clock already, the reference network's; the teacher is one only where there
    # is no such network: its many weights suffer more than students' where others use the caches and the memory too. A
    # table from a file may be on another store's reference
    wanted, steady = state.costs.teacher_ms, meter.steady and ctx.config.lut is None
    paces = [1.0 if steady else wanted / teacher.median_ms for teacher, _ in pairs]
    return [
        Evaluated(p, student.median_ms * pace, teacher.median_ms * pace, None, None)
        for p, (teacher, student), pace in zip(plans, pairs, paces, strict=True)
    ]


def corrected(state: State, seen: Sequence[Trial]) -> CostTable:
    """The table corrected by what whole students took. The teacher itself counts as one of them, that takes what it is
    priced at: kinds that few students have stay near the table."""
    assert state.costs is not None and state.match is not None
    costs = state.costs
    own = costs.scale * sum(r.latency_ms for r in teachers_rows(state.match.regions, costs.rows))
    teacher = astuple(replace(_NOTHING, own=own, glue=costs.glue_ms))
    parts, measured = [t[0] for t in seen] + [teacher], [t[1] for t in seen] + [sum(teacher)]
    factors = fit_factors(parts, measured, list(_SPREAD.values()), _TOGETHER)
    return replace(costs, correction=Correction(**dict(zip(_SPREAD, factors, strict=True))))
