"""What a network costs outside its regions: between two of them, before the first, behind the last.

Each such gap is timed like a region. The teacher's whole latency less its parts' would be the glue too, if parts took
in the network just what they take when timed apart; a few percent more or less of all of them is as much as a
classifier's head, and would burden the fastest students most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import ModelProto, TensorProto

from hantc.core.errors import HantcError
from hantc.core.types import UNUSABLE_MS, CostRow, CostTable, MatchResult, Region, untouched
from hantc.dialect.alike import work_digest
from hantc.dialect.emitter import emit
from hantc.dialect.examples import example_inputs
from hantc.dialect.graph import cut, shapes_of
from hantc.passes.frames import handed_through
from hantc.passes.meter import Meter, Work
from hantc.passes.state import State

_BATCH = 2  # so that a dim that follows the batch shows
_NAME = "glue"


def inner_glue(match: MatchResult, rows: Sequence[CostRow]) -> dict[str, float]:
    """Milliseconds that the teacher's parts take beyond their blocks, by name, of those that hold more than blocks (a
    dense block: the concatenations behind its layers). What such a part inside another one takes counts once."""
    own = {r.region: r.latency_ms for r in rows if untouched(r.candidate, r.precision)}
    blocks = {r.atoms[0]: r for r in match.regions if len(r.atoms) == 1}
    found: dict[str, float] = {}
    wholes = sorted(_wholes(match), key=lambda r: len(r.atoms))
    for k, region in enumerate(wholes):
        whole, parts = own.get(region.name, 0.0), [own.get(blocks[a].name, 0.0) for a in region.atoms]
        if max(whole, *parts) >= UNUSABLE_MS:  # the engine does not take one of them alone
            found[region.name] = 0.0
            continue
        parts += [found[r.name] for r in wholes[:k] if set(r.atoms) <= set(region.atoms)]
        found[region.name] = max(0.0, whole - sum(parts))
    return found


def glue_shares(match: MatchResult, costs: CostTable) -> tuple[dict[str, float], float]:
    """What each region bears of the `inner_glue` around it, by name, and what is left outside of them all; ms of the
    table's glue. Blocks bear equal shares of a part that holds them, so that what takes the part's place as a whole is
    rid of it."""
    inner, atoms = inner_glue(match, costs.rows), {r.name: frozenset(r.atoms) for r in match.regions}
    total = costs.scale * sum(inner.values())
    # where the glue was not measured it is what the parts left over, which may be less
    factor = costs.scale * min(1.0, costs.glue_ms / total) if total > 0 else 0.0
    shares = dict.fromkeys(atoms, 0.0)
    for name, mine in atoms.items():
        for whole, ms in inner.items():
            if not atoms[whole] <= mine:
                shares[name] += factor * ms * len(mine & atoms[whole]) / len(atoms[whole])
    return shares, costs.glue_ms - factor * sum(inner.values())


def _wholes(match: MatchResult) -> list[Region]:
    blocks = {r.atoms[0]: r for r in match.regions if len(r.atoms) == 1}
    joined = [r for r in match.regions if len(r.atoms) > 1]
    return [r for r in joined if len(r.nodes) > sum(len(blocks[a].nodes) for a in r.atoms)]


@dataclass(frozen=True)
class Glue:
    """What lies outside the regions, ms: starting a run, the gap before each region of the line, by name, the one
    behind the last, and what lies inside wholes."""

    start_ms: float
    before_ms: Mapping[str, float]
    last_ms: float
    inner_ms: float

    @property
    def ms(self) -> float:
        """All of it."""
        return self.start_ms + sum(self.before_ms.values()) + self.last_ms + self.inner_ms


def measure_glue(meter: Meter, state: State, rows: Sequence[CostRow]) -> Glue | None:
    """All gaps, timed; None where regions are not one row, each fed by the one before it. `rows`: the table's so
    far."""
    assert state.network is not None and state.match is not None
    network, info = state.network, state.network.meta["info"]
    if len(info.inputs) != 1 or len(info.outputs) != 1:
        return None
    shapes = shapes_of(network, example_inputs(info, _BATCH))
    work, places = [], []
    for place, entry, exit_ in _gaps(state, state.match):
        a, b = shapes.get(entry, ()), shapes.get(exit_, ())
        if not (a and b) or a[0] != b[0]:
            return None
        try:
            model = emit(cut(network, entry, exit_, a[1:], b[1:])).model
        except HantcError:  # something else feeds it: not a row
            return None
        key = meter.key(glue=work_digest(model))
        blank = replace(rows[0], region=_NAME, candidate=f"{entry}:{exit_}", precision=meter.ctx.base)
        blank = replace(blank, params=weights_in(model))  # a head's decide how many copies are timed
        work.append(Work(key, blank, model, a[1:] == b[1:], a[1:], b[1:]))
        places.append(place)
    first = shapes[next(n.name for n in network.graph.nodes if n.op == "placeholder")]
    start = meter.network(handed_through(first[1:]))[0].median_ms
    gaps = meter.rows(work)
    if any(not g.samples and meter.ctx.capabilities.measures for g in gaps):
        return None  # the engine does not take one of them alone
    before = dict.fromkeys((r.name for r in line_of(state.match)), 0.0)
    found = {p: g.latency_ms for p, g in zip(places, gaps, strict=True)}
    last = found.pop("", 0.0)
    return Glue(start, before | found, last, sum(inner_glue(state.match, rows).values()))


def weights_in(model: ModelProto) -> int:
    """How many floating-point numbers a file's weights are."""
    return sum(math.prod(w.dims) for w in model.graph.initializer if w.data_type == TensorProto.FLOAT)


def line_of(match: MatchResult) -> list[Region]:
    """The regions one behind another that make up the network: blocks, or what holds them and more."""
    holder = {a: r for r in _wholes(match) for a in r.atoms}
    line = [holder.get(r.atoms[0], r) for r in match.regions if len(r.atoms) == 1]
    return list({r.name: r for r in line}.values())


def _gaps(state: State, match: MatchResult) -> list[tuple[str, str, str]]:
    """The region behind each gap ("" behind the last), and the nodes at its ends."""
    assert state.network is not None
    nodes = list(state.network.graph.nodes)
    at = next(n.name for n in nodes if n.op == "placeholder")
    gaps = []
    for region in line_of(match):
        gaps.append((region.name, at, region.input))
        at = region.output
    gaps.append(("", at, nodes[-1].all_input_nodes[0].name))
    return [(name, a, b) for name, a, b in gaps if a != b]


def teachers_rows(regions: Sequence[Region], rows: Sequence[CostRow]) -> list[CostRow]:
    """The rows of single regions as the teacher has them: its parts."""
    atoms = {r.name for r in regions if len(r.atoms) == 1}
    return [r for r in rows if r.region in atoms and untouched(r.candidate, r.precision)]
