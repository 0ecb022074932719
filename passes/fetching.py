"""What weights cost that the caches do not hold all at once.

A part timed alone finds its weights in the caches, run after run; a whole network finds there only what the rest of it
has left, and what others on the host have in the meantime. As long as all its weights fit, that costs a few percent;
where they do not, each run fetches them from memory again. On a host whose caches others use too, EfficientNet-B0 at
64×64 took 1.03 to 1.08 of its parts up to the region at which 11 MB of its weights were past, 1.20 at 14 MB, and 1.37
at 16, on one thread. So the teacher's beginnings of several lengths are timed, and tell the factor that holds for all,
how much stays, and what fetching the rest costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto
from pydantic import TypeAdapter, ValidationError
from torch import fx

from hantc.core.errors import HantcError
from hantc.core.types import UNUSABLE_MS, WEIGHT_BYTES, CostRow, Fetching, Region, digest, untouched
from hantc.dialect.emitter import emit
from hantc.dialect.examples import example_inputs
from hantc.dialect.graph import cut, shapes_of
from hantc.passes.glue import Glue, line_of, teachers_rows, weights_in
from hantc.passes.meter import Meter
from hantc.passes.state import State

SUSPECT = 1.05  # of whole to parts: what takes longer may do so for its weights
_MOST = 10  # beginnings that are timed
_LEAST = 0.2  # of the parts' time: shorter beginnings say little of the whole
_FLOOR = 0.02  # of the teacher: what the rest costs where parts alone seem to take longer
_RATIO = (0.75, 1.33)  # of whole to parts: further apart, something else is wrong than the caches
_GRID = 33  # how finely it is asked what the caches hold
_NOTHING_MS = 1e-6
_SLOWEST = 0.25  # ms a megabyte: 4 GB/s, less than memory gives; where it takes longer there is another reason
_TWICE = 1.5  # of weights above what stays count, where those of the upper half count twice


@dataclass(frozen=True)
class Beginning:
    """A network up to the end of some region, or a whole one: its regions' weights, and what it takes as its parts
    (`apart_ms`) and as it is (`together_ms`)."""

    weight_mb: float
    apart_ms: float
    together_ms: float

    @property
    def mb_per_ms(self) -> float:
        """What others bring into the caches, if it is as much as these weights in the time of the parts."""
        return self.weight_mb / self.apart_ms


@dataclass(frozen=True)
class Beginnings:
    """Beginnings of a network, and the whole timed about them; `outside_mb` of its weights are in none of its
    regions."""

    some: tuple[Beginning, ...]
    whole: Beginning
    outside_mb: float


def measure_beginnings(
    meter: Meter, state: State, rows: Sequence[CostRow], glue: Glue | None, teacher_ms: float
) -> Beginnings | None:
    """Beginnings of the teacher, spread evenly over its weights; None where it takes hardly longer than its parts, or
    where nothing is measured."""
    assert state.network is not None and state.match is not None
    own = {r.region: r for r in rows if untouched(r.candidate, r.precision)}
    line = line_of(state.match)
    if glue is None or not meter.ctx.capabilities.measures or any(own[r.name].latency_ms >= UNUSABLE_MS for r in line):
        return None
    apart = np.cumsum([glue.start_ms, *(own[r.name].latency_ms + glue.before_ms[r.name] for r in line)])[1:]
    weights = np.cumsum([own[r.name].weight_mb for r in line])
    if weights[-1] <= 0 or teacher_ms <= SUSPECT * (apart[-1] + glue.last_ms):
        return None
    whole = emit(state.network).model
    key = meter.key(beginnings=digest(whole.SerializeToString().hex()), apart=apart.tolist())
    try:
        return TypeAdapter(Beginnings).validate_python(meter.ctx.store.get_json("network", key))
    except ValidationError:  # none yet, or of an older version
        found = _timed(meter, state.network, whole, [r.output for r in line], apart, weights, glue.last_ms)
    meter.ctx.store.put_json("network", key, asdict(found))
    return found


def _timed(
    meter: Meter,
    network: fx.GraphModule,
    whole: ModelProto,
    outputs: Sequence[str],
    apart: Any,
    weights: Any,
    last: float,
) -> Beginnings:
    """Those up to some of `outputs`; `apart` and `weights` are sums up to each."""
    shapes = shapes_of(network, example_inputs(network.meta["info"], 1))
    first = next(n.name for n in network.graph.nodes if n.op == "placeholder")
    targets = np.linspace(0, weights[-1], _MOST + 1)[1:]
    ends = sorted({int(np.argmin(np.abs(weights - t))) for t in targets})
    ends, found = [k for k in ends if apart[k] >= _LEAST * apart[-1]], []
    with meter.ctx.reporter.bar("measuring what weights cost", len(ends) + 2) as bar:
        # at both ends of it: what others do to the caches changes from one minute to the next
        before = meter.time([whole], meter.thorough)[0].median_ms
        for k in ends:
            bar.advance()
            out = outputs[k]
            try:
                model = emit(cut(network, first, out, shapes[first][1:], shapes[out][1:])).model
                together = meter.time([model], meter.thorough)[0].median_ms
                found.append(Beginning(float(weights[k]), float(apart[k]), together))
            except HantcError as error:  # the engine does not take it alone
                meter.ctx.reporter.event("unsupported", candidate=f"beginning up to {out}", reason=error.message)
        after = meter.time([whole], meter.thorough)[0].median_ms
    mb = max(float(weights[-1]), whole_mb(whole, meter.ctx.base))
    total = Beginning(mb, float(apart[-1]) + last, (before + after) / 2)
    return Beginnings(tuple(found), total, max(0.0, mb - float(weights[-1])))


def whole_mb(model: ModelProto, base: str) -> float:
    """Megabytes of a file's floating-point weights, as the engine reads them in `base`."""
    return weights_in(model) * WEIGHT_BYTES.get(base, 4) / 1e6


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
    beginnings: Beginnings | None = None,
    inner_ms: float = 0.0,
) -> Balance:
    """The balance of a table; `glue_ms` as timed apart, if it could be, `inner_ms` of it between layers of blocks."""
    own = teachers_rows(regions, rows)
    total, mb = sum(r.latency_ms for r in own), sum(r.weight_mb for r in own)
    floor = _FLOOR * teacher_ms
    if total <= 0:
        return Balance(teacher_ms)
    if glue_ms is not None:
        scale, outside_ms, fetching = teacher_ms / (total + glue_ms), 0.0, Fetching()
        if beginnings is not None and scale > 1.0 and mb > 0:
            scale, held = fit_fetching(beginnings.some, beginnings.whole)
            rate = beginnings.whole.mb_per_ms
            load = mb + rate * (total + inner_ms)
            least = (teacher_ms - most_ms(mb)) / (total + glue_ms)
            scale = min(max(scale, least), teacher_ms / (total + glue_ms))
            # what is outside the regions takes its place in the caches, and its time, whatever the plan
            held -= beginnings.outside_mb + rate * (glue_ms - inner_ms)
            fetching = fetching_for(teacher_ms - scale * (total + glue_ms), held, mb, load, rate / scale)
            outside_ms = max(0.0, teacher_ms - scale * (total + glue_ms) - fetching.ms(load))
        if _RATIO[0] <= scale <= _RATIO[1]:
            return Balance(scale * glue_ms + outside_ms, scale, fetching)
    if teacher_ms - total >= floor:
        return Balance(teacher_ms - total)
    return Balance(floor, (teacher_ms - floor) / total)


def fetching_for(ms: float, held_mb: float, weight_mb: float, load_mb: float, mb_per_ms: float = 0.0) -> Fetching:
    """What makes a teacher whose regions load the caches with `load_mb`, `weight_mb` of which are weights, take `ms` to
    fetch these where the caches hold `held_mb`: less, if a megabyte would take longer than memory does; nothing, if
    what is outside the regions fills them (`held_mb` below 0: then part of `ms` is spent whatever the regions are).
    From midway to the teacher's load on a megabyte costs twice as much as before: caches that are shared, and do not
    throw out what was used longest ago, lose their hold little by little.

    Loads, not weights alone, since it is time as well that empties shared caches: with twenty students of EfficientNet-
    B0, in four draws of thirty turns or nine, what was left unexplained (`Fit.misfit`) fell from 8 to 15 to 3 to 6, and
    worst errors from 12 to 17 % to 8 to 10, when others were taken to bring in the teacher's weights once more in the
    time that it takes. Half or twice as much does hardly worse."""
    if ms <= _NOTHING_MS or weight_mb <= 0 or load_mb <= 0:
        return Fetching()
    # others' data take nothing to fetch: what bounds a megabyte of weights bounds a larger load as a whole
    held = held_mb if held_mb < 0 else max(0.0, min(held_mb, load_mb * (1 - ms / most_ms(weight_mb))))
    rate = min(most_ms(weight_mb) / (_TWICE * load_mb), ms / (_TWICE * (load_mb - held)))
    return Fetching(max(0.0, held), rate, max(0.0, _steep(held, load_mb)), mb_per_ms)


def most_ms(mb: float) -> float:
    """What fetching so many megabytes takes at most, ms."""
    return _SLOWEST / 2 * _TWICE * mb


def _steep(held_mb: float, whole_mb: float) -> float:
    return (held_mb + whole_mb) / 2


def fit_fetching(beginnings: Sequence[Beginning], whole: Beginning) -> tuple[float, float]:
    """The factor from parts to a network whose weights the caches hold, and the load in megabytes up to which they do:
    which miss the beginnings of a network least (by the sum of relative errors, which a few that a restless machine
    timed wrongly do not move), where the rest of what the whole takes is for fetching."""
    alone, load = max(1.0, whole.together_ms / whole.apart_ms), 2 * whole.weight_mb
    if not beginnings:
        return alone, load
    w, p, t = (np.array([getattr(b, k) for b in beginnings]) for k in ("weight_mb", "apart_ms", "together_ms"))
    loads = w + whole.mb_per_ms * p
    best = (np.inf, alone, 0.0)
    for free in np.linspace(0.0, min(loads.max(), 0.99 * load), _GRID):
        above = np.maximum(0.0, loads - free) + np.maximum(0.0, loads - _steep(float(free), load))
        share = above / (_TWICE * (load - free))  # of the whole's fetching
        told = np.abs(p - share * whole.apart_ms) > 0.05 * p
        # what each beginning by itself says of the factor; one of these misses all of them least
        says = (t - share * whole.together_ms)[told] / (p - share * whole.apart_ms)[told]
        for scale in np.clip([1.0, *says, alone], 1.0, alone):
            missed = float(np.sum(np.abs(scale * p + share * (whole.together_ms - scale * whole.apart_ms) - t) / t))
            best = min(best, (missed, float(scale), float(free)))
    return best[1:]
