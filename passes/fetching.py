"""What weights cost that the caches do not hold all at once.

A part timed alone finds its weights in the caches, run after run; a whole network finds there only what the rest of it
has left. As long as all its weights fit, that costs a few percent; where they do not, each run fetches them from memory
again. On a host whose caches others use too, EfficientNet-B0 at 64×64 took 1.03 to 1.08 of its parts up to the region
at which 11 MB of its weights were past, 1.20 at 14 MB, and 1.37 at 16, on one thread. So the teacher's beginnings of
several lengths are timed, and tell the factor that holds for all, how much stays, and what fetching the rest costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hantc.core.types import CostRow, Fetching, Region, untouched
from hantc.dialect.emitter import emit
from hantc.dialect.examples import example_inputs
from hantc.dialect.graph import cut, shapes_of
from hantc.passes.glue import UNUSABLE_MS, Glue, line_of, teachers_rows
from hantc.passes.meter import Meter
from hantc.passes.state import State

_SUSPECT = 1.05  # of whole to parts: less than that is no worry
_MOST = 10  # beginnings that are timed
_LEAST = 0.2  # of the parts' time: shorter beginnings say little of the whole
_FLOOR = 0.02  # of the teacher: what the rest costs where parts alone seem to take longer
_RATIO = (0.75, 1.33)  # of whole to parts: further apart, something else is wrong than the caches
_GRID = 33  # how finely it is asked what the caches hold
_SLOWEST = 0.25  # ms a megabyte: 4 GB/s, less than memory gives; where it takes longer there is another reason


@dataclass(frozen=True)
class Beginning:
    """A network up to the end of some region, or a whole one: its regions' weights, and what it takes as its parts
    (`apart_ms`) and as it is (`together_ms`)."""

    weight_mb: float
    apart_ms: float
    together_ms: float


def measure_beginnings(
    meter: Meter, state: State, rows: Sequence[CostRow], glue: Glue | None, teacher_ms: float
) -> list[Beginning]:
    """Beginnings of the teacher, spread evenly over its weights; none where it takes hardly longer than its parts, or
    where nothing is measured."""
    assert state.network is not None and state.match is not None
    own = {r.region: r for r in rows if untouched(r.candidate, r.precision)}
    line = line_of(state.match)
    if glue is None or not meter.ctx.capabilities.measures or any(own[r.name].latency_ms >= UNUSABLE_MS for r in line):
        return []
    apart = np.cumsum([glue.start_ms, *(own[r.name].latency_ms + glue.before_ms[r.name] for r in line)])[1:]
    weights = np.cumsum([own[r.name].weight_mb for r in line])
    if teacher_ms <= _SUSPECT * (apart[-1] + glue.last_ms):
        return []
    network = state.network
    shapes = shapes_of(network, example_inputs(network.meta["info"], 1))
    first = next(n.name for n in network.graph.nodes if n.op == "placeholder")
    targets = np.linspace(0, weights[-1], _MOST + 1)[1:]
    ends = sorted({int(np.argmin(np.abs(weights - t))) for t in targets if weights[-1] > 0})
    found = []
    with meter.ctx.reporter.bar("measuring what weights cost", len(ends)) as bar:
        for k in (k for k in ends if apart[k] >= _LEAST * apart[-1]):
            out = line[k].output
            model = emit(cut(network, first, out, shapes[first][1:], shapes[out][1:])).model
            found.append(Beginning(float(weights[k]), float(apart[k]), meter.network(model)[0].median_ms))
            bar.advance()
    return found


@dataclass(frozen=True)
class Balance:
    """What lies outside every region, in the network; the factor from stand-alone to in-network latency; and what
    fetching weights costs: together they make the teacher's parts the teacher."""

    glue_ms: float
    scale: float = 1.0
    fetching: Fetching = field(default_factory=Fetching)


def balance(
    regions: Sequence[Region],
    rows: Sequence[CostRow],
    teacher_ms: float,
    glue_ms: float | None,
    beginnings: Sequence[Beginning] = (),
) -> Balance:
    """The balance of a table; `glue_ms` as timed apart, if it could be."""
    own = teachers_rows(regions, rows)
    total, mb = sum(r.latency_ms for r in own), sum(r.weight_mb for r in own)
    floor = _FLOOR * teacher_ms
    if total <= 0:
        return Balance(teacher_ms)
    if glue_ms is not None:
        scale, fetching = fit_fetching(beginnings, Beginning(mb, total + glue_ms, teacher_ms))
        if _RATIO[0] <= scale <= _RATIO[1]:
            return Balance(scale * glue_ms, scale, fetching)
    if teacher_ms - total >= floor:
        return Balance(teacher_ms - total)
    return Balance(floor, (teacher_ms - floor) / total)


def fit_fetching(beginnings: Sequence[Beginning], whole: Beginning) -> tuple[float, Fetching]:
    """The factor from parts to a network whose weights the caches hold, and what the rest cost: together they make the
    teacher's parts the teacher (`whole`), and miss its beginnings least (by the sum of relative errors, which a few
    that a restless machine timed wrongly do not move)."""
    alone = whole.together_ms / whole.apart_ms
    least = (whole.together_ms - _SLOWEST * whole.weight_mb) / whole.apart_ms
    if not beginnings or alone <= 1.0:
        return alone, Fetching()
    w, p, t = (np.array([getattr(b, k) for b in beginnings]) for k in ("weight_mb", "apart_ms", "together_ms"))
    best = (np.inf, alone, 0.0)
    for free in np.linspace(0.0, min(w.max(), 0.99 * whole.weight_mb), _GRID):
        share = np.maximum(0.0, w - free) / (whole.weight_mb - free)  # of the teacher's fetching
        told = p - share * whole.apart_ms > 0.05 * p
        # what each beginning by itself says of the factor; one of these misses all of them least
        says = (t - share * whole.together_ms)[told] / (p - share * whole.apart_ms)[told]
        for scale in np.clip([*says, alone], max(1.0, least), alone):
            missed = float(np.sum(np.abs(scale * p + share * (whole.together_ms - scale * whole.apart_ms) - t) / t))
            best = min(best, (missed, float(scale), float(free)))
    _, scale, free = best
    rate = (whole.together_ms - scale * whole.apart_ms) / (whole.weight_mb - free)
    return scale, Fetching(free, rate) if rate > 0 else Fetching()
