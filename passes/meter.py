"""The meter: latencies of small models net of a session's overhead, all on one clock, kept in the store.

A shared machine runs at another speed from one minute to the next, and a table is measured over minutes. So
every group of models is timed beside the same small reference network (the canary), and its figures are scaled
to the speed at which the canary ran when it was first seen on this device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from hantc.core.backend_api import Artefact, BuildSpec
from hantc.core.errors import HantcError
from hantc.core.types import CostRow, CostTable, Protocol, Shape, Timing, digest
from hantc.dialect.floats import in_bf16
from hantc.dialect.half import to_fp16
from hantc.dialect.qdq import QuantSpec
from hantc.dialect.qdq_graph import opset_of
from hantc.passes import frames
from hantc.passes.state import Context

_RESTLESS = 1.2  # between the slow and the fast tenth of the groups that were timed
_FEW_PACES = 10
_COPIES = 4
_HELD_MB = 6.0  # of copies' weights together: shared caches keep so many even where others use them much
_GROUP = 24  # artefacts timed interleaved with each other; bounds the memory of open sessions
METHOD = 11  # version of the measuring method: rows measured otherwise are not reused
_CLOCK = 9  # of the reference network and how it is timed
_BORDERS = 2  # the same of borders' figures
_CANARY = (48, 24, 24)  # channels, height, width: about a millisecond on two cores


@dataclass(frozen=True)
class Work:
    """One thing to time. `row` lacks the figures."""

    key: str
    row: CostRow
    model: ModelProto
    chain: bool
    in_shape: Shape
    out_shape: Shape


def _canary_model() -> ModelProto:
    """A small network of what vision networks spend their time on: a full, a depthwise and a pointwise
    convolution, and an activation behind each."""
    c, h, w = _CANARY
    rng = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for i, (k, groups) in enumerate(((3, 1), (3, c), (1, 1), (3, 1))):
        value = (rng.standard_normal((c, c // groups, k, k)) / (k * (c / groups) ** 0.5)).astype(np.float32)
        weights.append(onnx.numpy_helper.from_array(value, f"w{i}"))
        pads = [k // 2] * 4
        nodes.append(helper.make_node("Conv", [name, f"w{i}"], [f"c{i}"], kernel_shape=[k, k], pads=pads, group=groups))
        nodes.append(helper.make_node("HardSwish" if i % 2 else "Relu", [f"c{i}"], [f"a{i}"]))
        name = f"a{i}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", c, h, w])
    y = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", c, h, w])
    graph = helper.make_graph(nodes, "canary", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Meter:
    """Times small models net of a session's overhead; every row is kept in the store."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.protocol = ctx.protocol(warmup=2, samples=12, min_sample_ms=1.0)
        self.thorough = ctx.protocol(warmup=2, samples=25, min_sample_ms=15.0, whole=True)
        self.careful = replace(self.protocol, samples=25)  # for what is taken off many figures
        self.build_spec = BuildSpec(threads=ctx.threads, batch=ctx.config.batch)
        self.base: dict[str, object] = {
            "backend": ctx.backend.name,
            "device": ctx.device_key,
            # rows are warm; which processors they were measured on is the system's numbering of the same
            "protocol": {k: v for k, v in asdict(self.protocol).items() if k not in ("cold", "cores", "settle")},
            "method": METHOD,
        }
        if ctx.cores:
            self.base["pinned"] = True
        if ctx.base == "bf16":  # the rest of a file does not tell
            self.base["floats"] = ctx.base
        self.measured = 0
        self._found: dict[str, dict[str, object]] = {}  # figures by key, those of what could not be timed among them
        self.pace: list[float] = []  # how much slower than at first the canary ran, each time
        try:
            self._canary: Artefact | None = self.build(_canary_model())
        except HantcError:  # a backend that lacks one of its operations: figures are as the clock gives them
            self._canary = None
        self.reference_ms = self._reference()
        self.base["reference_ms"] = self.reference_ms  # rows hold beside the reference that they were scaled to

    @property
    def steady(self) -> bool:
        """Whether figures are scaled to one clock, whatever the machine's speed."""
        return self._canary is not None

    def on_clock_of(self, table: CostTable) -> float | None:
        """What turns the meter's figures into milliseconds of a table's clock, which may be that of another store's
        reference; None where one of them has no reference network, or they have different ones."""
        if not self.steady or self.ctx.config.lut is None:
            return 1.0 if self.steady else None
        other = table.clock_ms is None or table.clock_of != self.clock_of
        return None if other or table.clock_ms is None else table.clock_ms / self.reference_ms

    @property
    def clock_of(self) -> str:
        """Which reference network, timed in which way, figures are scaled by."""
        return digest({"canary": _canary_model().SerializeToString().hex(), "method": _CLOCK})[:12]

    def key(self, **what: object) -> str:
        return digest({**self.base, **what})

    def time(self, models: Sequence[ModelProto], protocol: Protocol | None = None) -> list[Timing]:
        """Time models interleaved with each other and the canary; figures on the canary's first clock."""
        protocol = protocol or self.protocol
        _first = self.ctx.first_session(models[0]) if protocol.settle > 1 else None
        return self.measure([self.build(m) for m in models], protocol)

    def build(self, model: ModelProto) -> Artefact:
        """A model as the table's floats run it."""
        as_run = {"fp16": to_fp16, "bf16": in_bf16}.get(self.ctx.base, lambda m: m)
        return self.ctx.backend.build(as_run(model), self.build_spec)

    def network_fp32(self, model: ModelProto) -> float:
        """Milliseconds of a whole network in FP32, whatever the rest is timed in; kept in the store."""
        key = self.key(network=digest(model.SerializeToString().hex()), precision="fp32")
        found = self.ctx.store.get_json("network", key)
        if found is None:
            _first = self.ctx.first_session(model)
            found = asdict(self.measure([self.ctx.backend.build(model, self.build_spec)], self.thorough)[0])
            self.ctx.store.put_json("network", key, found)
        return Timing(**found).median_ms

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        """`time` of what was built."""
        if self._canary is None:
            self.pace.append(1.0)
            return self.ctx.backend.measure(artefacts, protocol)
        # twice in each round: all figures of the group depend on it
        *timings, first, second = self.ctx.backend.measure([*artefacts, self._canary, self._canary], protocol)
        pace = (first.median_ms + second.median_ms) / 2 / self.reference_ms
        self.pace.append(pace)
        return [replace(t, median_ms=t.median_ms / pace, iqr_ms=t.iqr_ms / pace) for t in timings]

    def file(self, model: ModelProto, protocol: Protocol) -> Timing:
        """A finished file's latency, overhead included, on the canary's first clock; kept nowhere."""
        _first = self.ctx.first_session(model)
        return self.measure([self.ctx.backend.build(model, self.build_spec)], protocol)[0]

    def _reference(self) -> float:
        """The canary's latency when this device was first timed, in milliseconds."""
        if self._canary is None:
            return 1.0
        key = self.key(canary=digest(_canary_model().SerializeToString().hex()))
        found = self.ctx.store.get_json("network", key)
        if found is None:
            protocol = replace(self.protocol, samples=25, min_sample_ms=20.0)
            found = asdict(self.ctx.backend.measure([self._canary], protocol)[0])
            self.ctx.store.put_json("network", key, found)
        return Timing(**found).median_ms

    def network(self, model: ModelProto) -> tuple[Timing, float]:
        """Latency of a whole network, overhead included, and the pace at which it was timed; kept in the store."""
        key = self.key(network=digest(model.SerializeToString().hex()))
        found = self.ctx.store.get_json("network", key)
        if found is not None:
            return Timing(**{k: v for k, v in found.items() if k != "pace"}), float(found["pace"])
        timing = self.time([model], self.thorough)[0]
        self.ctx.store.put_json("network", key, {**asdict(timing), "pace": self.pace[-1]})
        return timing, self.pace[-1]

    def known(self, key: str) -> bool:
        """Whether the figures of `key` are at hand."""
        if key not in self._found:
            stored = self.ctx.store.get_json("cost", key)
            if stored is not None:
                self._found[key] = stored
        return key in self._found

    @property
    def restless(self) -> str:
        """What to say where the pace changed much while figures were taken, else ""."""
        paces = sorted(self.pace)
        if len(paces) < _FEW_PACES:
            return ""
        tenth = len(paces) // 10
        low, high = paces[tenth], paces[-1 - tenth]
        if high <= _RESTLESS * low:
            return ""
        return (
            f"the machine was restless while candidates were timed: a reference network took {low:.2f} to {high:.2f} "
            "times as long as at first; latencies are scaled by that, but less certain"
        )

    def rows(self, work: Sequence[Work], progress: Callable[[float], None] = lambda share: None) -> list[CostRow]:
        """Figures for all of `work`: from the store, or timed in groups that share a frame. `progress` is told each
        share that is done."""
        found, todo = self._found, dict[str, Work]()
        for w in work:
            if not self.known(w.key):
                todo.setdefault(w.key, w)
        groups: dict[tuple[object, ...], list[Work]] = {}
        for w in todo.values():
            same = (w.in_shape, w.out_shape, w.chain, w.row.precision, opset_of(w.model), _copies(w))
            groups.setdefault(same, []).append(w)
        for group in groups.values():
            for i in range(0, len(group), _GROUP):
                part = group[i : i + _GROUP]
                found.update(self._group(part))
                progress(len(part) / len(todo))
        if not todo:
            progress(1.0)
        return [replace(w.row, **_figures(found[w.key])) for w in work]

    def _group(self, group: Sequence[Work]) -> dict[str, dict[str, object]]:
        """Time works of the same shapes, precision and number of copies in a frame, and take what the frame takes
        off."""
        first, copies = group[0], _copies(group[0])
        quant, opset = self._quant(first.row.precision), opset_of(first.model)
        around = frames.frame(first.in_shape, first.out_shape, quant, opset)
        lanes = 1 if first.chain else copies
        built, good = [self.build(frames.empty(first.in_shape, quant, opset, lanes))], []
        for w in group:
            try:
                built.append(self.build(around.around(w.model, copies, chain=w.chain)))
                good.append(w)
            except HantcError as error:
                self.ctx.reporter.event("unsupported", candidate=w.row.candidate, reason=error.message)
        results: dict[str, dict[str, object]] = {
            w.key: {"latency_ms": 1e9, "iqr_ms": 0.0, "samples": 0} for w in group if w not in good
        }
        if not good:
            return results
        empty, *timings = self.measure(built, self.protocol)
        fixed, each = empty.median_ms, 0.0
        if not first.chain:
            each = self._tail(first.out_shape, first.row.precision, opset)
            fixed -= lanes * self._tail(first.in_shape, first.row.precision, opset)
        for w, t in zip(good, timings, strict=True):
            net = max(1e-4, (t.median_ms - fixed) / copies - each)
            results[w.key] = {"latency_ms": net, "iqr_ms": t.iqr_ms / copies, "samples": t.samples}
            self.ctx.store.put_json("cost", w.key, results[w.key])
            self.measured += 1
        return results

    def _quant(self, precision: str) -> QuantSpec | None:
        return self.ctx.quant if precision == "int8" else None

    def _tail(self, shape: Shape, precision: str, opset: int) -> float:
        """Milliseconds of a frame's tail on a tensor of `shape`, 0 where none stands there."""
        key = self.key(tail=shape, precision=precision, opset=opset)
        found = self.ctx.store.get_json("border", key)
        if found is None:
            pair = frames.tails(shape, self._quant(precision), opset)
            found = 0.0
            if pair is not None:
                one, many = self.time(pair[:2], self.careful)
                found = max(0.0, (many.median_ms - one.median_ms) / pair[2])
            self.ctx.store.put_json("border", key, found)
        return float(found)

    def border(self, shape: Shape) -> float:
        """Milliseconds of going from floats to INT8 and back, on a tensor of `shape`; 0 where no convolution does."""
        key = self.key(border=shape, version=_BORDERS)
        found = self.ctx.store.get_json("border", key)
        if found is None:
            quant = self._quant("int8")
            rows = frames.borders(shape, quant) if quant is not None else None
            found = 0.0
            if rows is not None:
                timings = self.time([rows.plain, rows.mixed, *rows.rounded], self.careful)
                found = rows.pair(*(t.median_ms for t in timings))
            self.ctx.store.put_json("border", key, found)
        return float(found)


def _copies(work: Work) -> int:
    """How many copies are timed together: fewer of heavy parts, each of which has its weights to itself, so that caches
    keep them all (one, where its own are more than that). What weights cost beyond the caches is the whole network's
    (`passes.fetching`), not a row's."""
    return max(1, min(_COPIES, int(_HELD_MB / max(work.row.weight_mb, 1e-9))))


def _figures(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {k: stored[k] for k in ("latency_ms", "iqr_ms", "samples")}
