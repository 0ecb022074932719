"""Whole students on the clock: built, timed beside the teacher, and the table corrected by what they take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from onnx import ModelProto

from hantc.core.types import Correction, CostTable, Fetching, Plan
from hantc.dialect.emitter import emit
from hantc.passes.assemble import Blueprint, build_student, calibration_feeds, to_onnx
from hantc.passes.fetching import SUSPECT, fetching_for, most_ms
from hantc.passes.glue import teachers_rows
from hantc.passes.limits import activation_bytes
from hantc.passes.meter import Meter
from hantc.passes.program import footprint, make_plan, parts_of, specs_of, teachers_footprint
from hantc.passes.state import Context, Evaluated, State
from hantc.passes.turns import Room, Turns, at_one_state, in_turns
from hantc.search.correction import Fit, fit_factors
from hantc.search.problem import Problem, Solution

# how far from 1 each kind's factor may be expected: borders depend most on what stands beside them
_SPREAD = {"own": 0.05, "floats": 0.1, "int8": 0.15, "borders": 0.5, "glue": 0.2, "fetching": 0.5}
_TOGETHER = 0.05  # the same of all kinds: sessions and hours differ by that
_SIZES = 16
_EVIDENCE = 4.0  # of another size of the caches than the table's, twice the logarithm of the odds
_TURNS = 5  # in which students are timed: fewer where the run's time is short
_NOTHING = Correction(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Trial:
    """A student's `parts_of` and `footprint`, what it took, and the teacher in the same state of the host, ms."""

    parts: tuple[float, ...]
    footprint: tuple[float, float]
    ms: float
    teacher_ms: float


def trials(state: State, found: Sequence[Evaluated]) -> list[Trial]:
    """What students of the state's own table tell of it."""
    assert state.costs is not None and state.match is not None
    match, costs = state.match, state.costs
    return [
        Trial(parts_of(match, costs, e.plan), footprint(match, costs, e.plan), e.measured_ms, e.teacher_ms)
        for e in found
    ]


def measure_students(state: State, ctx: Context, problem: Problem, solutions: Sequence[Solution]) -> list[Evaluated]:
    """Emit every solution as a real student and time it beside the teacher (or take the table's word)."""
    assert state.costs is not None
    plans = [make_plan(state, problem, s) for s in solutions]
    if ctx.from_table:
        return [Evaluated(p, p.predicted_latency_ms, state.costs.teacher_ms, None, None) for p in plans]
    return time_students(state, ctx, plans, [write_student(state, ctx, p) for p in plans])


def write_student(state: State, ctx: Context, plan: Plan) -> ModelProto:
    """A plan's student as it would run, its ranges from a few images."""
    assert ctx.data is not None
    blueprint = Blueprint.of(plan.choices)
    student = build_student(state, blueprint, specs_of(state))
    return to_onnx(student, blueprint, ctx, calibration_feeds(student, ctx.data, 16, 16))


def time_students(state: State, ctx: Context, plans: Sequence[Plan], models: Sequence[ModelProto]) -> list[Evaluated]:
    """Time each plan's `write_student` beside the teacher."""
    return evaluated(state, plans, turns_of(state, ctx, models))


def evaluated(state: State, plans: Sequence[Plan], found: Sequence[Turns]) -> list[Evaluated]:
    """Plans with what their students take, from `turns_of`: all in one state of the host, that in which the teacher
    takes what it usually took meanwhile."""
    usual = statistics.median(teacher for own in found for _, teacher in own) if found else 0.0
    slopes = _expected_slopes(state, plans)
    times = [at_one_state(own, usual, slope) for own, slope in zip(found, slopes, strict=True)]
    return [Evaluated(p, ms, usual, None, None) for p, ms in zip(plans, times, strict=True)]


def turns_of(state: State, ctx: Context, models: Sequence[ModelProto], turns: int = _TURNS) -> list[Turns]:
    """What each student takes, and the teacher beside it, turn by turn, in ms of the table's clock."""
    assert state.network is not None and state.costs is not None
    if not models:
        return []
    meter, original = Meter(ctx), emit(state.network).model
    protocol = ctx.protocol(warmup=3, samples=5, min_sample_ms=12.0, whole=True)
    # a GPU's memory is not asked for: one at a time there
    room = Room(ctx.memory_limit / 4 if ctx.base != "fp16" else 0.0, activation_bytes(state.network, ctx))

    with ctx.reporter.bar(f"timing {len(models)} students", len(models)) as bar:
        found = in_turns(meter, original, models, protocol, turns, room, ctx.clock.remaining, bar.advance)
    # the reference network is the clock; the teacher is one only where there is no such network: its many weights
    # suffer more than students' where others use the caches and the memory too
    wanted, clock = state.costs.teacher_ms, meter.on_clock_of(state.costs)
    if clock is None and meter.steady:
        ctx.note("the latency table has another reference network than this version: the teacher tells the speed")
    return [[(ms * (clock or wanted / t), t * (clock or wanted / t)) for ms, t in own] for own in found]


def _expected_slopes(state: State, plans: Sequence[Plan]) -> list[float]:
    """How much longer each plan's student should take for each millisecond that the teacher does because of others: as
    fetching its weights costs by the table, of what fetching the teacher's does."""
    assert state.costs is not None and state.match is not None
    match, costs, fetching = state.match, state.costs, state.costs.fetching
    whole = fetching.ms(fetching.load_mb(*teachers_footprint(match, costs)))
    own = [fetching.ms(fetching.load_mb(*footprint(match, costs, p))) for p in plans]
    return [ms / whole if whole > 0 else 0.0 for ms in own]


def corrected(state: State, seen: Sequence[Trial]) -> CostTable:
    """The table corrected by what whole students took. The teacher itself counts as one of them: kinds that few
    students have stay near the table. What it takes beside them tells what weights cost just then, which others on the
    host decide with it; how many of them stay in the caches, the students tell."""
    assert state.costs is not None and state.match is not None
    costs = state.costs
    inside = costs.scale * sum(r.latency_ms for r in teachers_rows(state.match.regions, costs.rows))
    teachers = mb, ms = teachers_footprint(state.match, costs)

    def fetching_ms(fetching: Fetching, footprint: tuple[float, float]) -> float:
        return fetching.ms(fetching.load_mb(*footprint))

    priced = inside + costs.glue_ms + fetching_ms(costs.fetching, teachers)
    now = statistics.median(t.teacher_ms for t in seen) if seen else priced
    measured = [t.ms for t in seen] + [now]
    apart = inside + costs.glue_ms

    def excess(teacher_ms: float) -> float:
        """What the teacher takes for its weights; something where it does not seem to, for ratios of it."""
        return max(teacher_ms - apart, (SUSPECT - 1) * apart)

    def fitted(fetching: Fetching) -> Fit:
        teacher = replace(_NOTHING, own=inside, glue=costs.glue_ms, fetching=fetching_ms(fetching, teachers))
        # fetching costs what it does where the teacher takes as long as beside most; rounds differ in that
        fetched = [excess(t.teacher_ms) / excess(now) * fetching_ms(fetching, t.footprint) for t in seen]
        parts = [(*t.parts[:-1], ms) for t, ms in zip(seen, fetched, strict=True)]
        return fit_factors([*parts, astuple(teacher)], measured, list(_SPREAD.values()), _TOGETHER)

    fits = {costs.fetching: fitted(costs.fetching)}
    free = costs.fetching.free_mb
    if seen and now > SUSPECT * apart and mb > 0 and ms > 0:
        rate, extra = costs.fetching.mb_per_ms or mb / ms, min(now - apart, most_ms(mb))
        load = mb + rate * ms
        if not costs.fetching.mb_per_ms:  # a table of weights alone, or of none that cost anything
            free *= load / mb
        held = [free, *(k / _SIZES * load for k in range(_SIZES))]
        fits |= {f: fitted(f) for f in (fetching_for(extra, h, mb, load, rate) for h in held)}

    def unlikely(fetching: Fetching) -> tuple[float, float]:
        """Of sizes that the students do not tell apart, the table's is the likeliest, and what is nearest to it."""
        other = 0.0 if fetching == costs.fetching else abs(fetching.free_mb - free)
        return round(fits[fetching].misfit + (_EVIDENCE if fetching != costs.fetching else 0.0), 6), other

    best = min(fits, key=unlikely)
    return replace(costs, fetching=best, correction=Correction(**dict(zip(_SPREAD, fits[best].factors, strict=True))))
