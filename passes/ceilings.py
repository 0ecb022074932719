"""A machine's ceilings, measured: what the roofline model needs to stand for it, and what bounds a candidate.

Williams, Waterman, Patterson, "Roofline" (CACM 2009): no kernel is faster than the peak of its arithmetic. The peaks
here are those that the engine's own best kernels reach in a quiet moment: who bounds others by them allows for a busy
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from hantc.core.backend_api import Backend, BuildSpec, Capabilities
from hantc.core.errors import HantcError
from hantc.core.types import Protocol, Shape, digest
from hantc.dialect.floats import in_bf16
from hantc.dialect.half import to_fp16
from hantc.dialect.qdq import QuantSpec, quantize_for_timing
from hantc.passes.state import Context

# Convolutions at which engines come near their peak: (channels, height and width, kernel, copies)
_PRODUCTS = ((128, 28, 3, 2), (256, 14, 3, 2), (512, 14, 1, 4), (256, 28, 1, 4))
_STREAM: Shape = (64, 64, 64)  # a mid-size activation, 1 MiB of float32
_STEPS = 8
_TINY: Shape = (8, 1, 1)
_TINY_STEPS = 32
_VERSION = 2  # of the way of measuring
_TURNS = 2
_LEAST_GAIN = 0.1  # of a core, that each further one adds on a machine that is not busy


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s (a multiply-add is two) and bytes/s of one core, what more of them add, and seconds to start a kernel."""

    peaks: tuple[tuple[str, float], ...]  # by precision
    bandwidth: float
    bandwidth_max: float  # of all cores
    op_overhead_s: float
    parallel_efficiency: float  # of every core after the first
    cores: int

    @property
    def doubtful(self) -> bool:
        """Whether further cores added next to nothing: then something else had them while this was measured."""
        return self.cores > 1 and self.parallel_efficiency < _LEAST_GAIN

    def peak(self, precision: str, threads: int) -> float:
        """FLOP/s of so many threads. KeyError for a precision that was not measured."""
        return dict(self.peaks)[precision] * (1 + (min(threads, self.cores) - 1) * self.parallel_efficiency)


def measure_ceilings(backend: Backend, cores: int, pinned: tuple[int, ...] = ()) -> Ceilings:
    """The ceilings of `backend` here, with one core and with all of them (`pinned`: the processors to stay on): some
    seconds of measuring.

    HantcError if the backend predicts, or runs none of the operations."""
    capabilities = backend.capabilities()
    if not capabilities.measures:
        raise HantcError(f"{backend.name} measures nothing here: {capabilities.reason}", where="ceilings")
    # in turns, and the best of them: a spell in which something else has the machine must not pass for its peak
    one, first, together = dict.fromkeys(capabilities.precisions, 0.0), capabilities.precisions[0], 0.0
    for _ in range(_TURNS):
        for p in one:
            one[p] = max(one[p], _peak(backend, capabilities, p, 1, pinned))
        if cores > 1:
            together = max(together, _peak(backend, capabilities, first, cores, pinned))
    efficiency = 1.0
    if cores > 1:
        efficiency = min(1.0, max(0.01, (together / one[first] - 1) / (cores - 1)))
    single, shared = (_bandwidth(backend, n, pinned) for n in (1, cores))
    return Ceilings(tuple(one.items()), single, max(single, shared), _overhead(backend, pinned), efficiency, cores)


def ceilings_of(ctx: Context) -> Ceilings | None:
    """Those of the run's engine on this machine: measured once, then from the store. None where nothing is timed."""
    if ctx.from_table or not ctx.capabilities.measures:
        return None
    where = {"backend": ctx.backend.name, "device": ctx.device_key, "threads": ctx.threads}
    key = digest({"ceilings": _VERSION, **where, **({"pinned": True} if ctx.cores else {})})
    found = ctx.store.get_json("network", key)
    if found is None:
        made = measure_ceilings(ctx.backend, ctx.threads, ctx.cores)
        found = asdict(made)
        if not made.doubtful:  # else the next run asks again
            ctx.store.put_json("network", key, found)
    return Ceilings(**{**found, "peaks": tuple((p, v) for p, v in found["peaks"])})


def _peak(backend: Backend, capabilities: Capabilities, precision: str, threads: int, pinned: tuple[int, ...]) -> float:
    """FLOP/s of the fastest of some convolutions."""
    best = 0.0
    for channels, size, kernel, copies in _PRODUCTS:
        model = _convolutions(channels, size, kernel, copies)
        if precision == "int8":
            quant = QuantSpec(reduce_range=capabilities.reduce_range, symmetric=capabilities.symmetric)
            model = quantize_for_timing(model, quant)
        elif precision == "fp16":
            model = to_fp16(model)
        elif precision == "bf16":
            model = in_bf16(model)
        flops = 2 * copies * (channels * kernel * size) ** 2
        best = max(best, flops / (1e-3 * _times(backend, [model], threads, pinned)[0]))
    return best


def _bandwidth(backend: Backend, threads: int, pinned: tuple[int, ...]) -> float:
    """Bytes/s through a row of element-wise operations, each of which reads and writes a mid-size tensor."""
    few, many = _times(backend, [_chain(_STREAM, _STEPS), _chain(_STREAM, 3 * _STEPS)], threads, pinned)
    moved = 2 * _STEPS * 2 * 4 * float(np.prod(_STREAM))
    return moved / (1e-3 * max(many - few, 1e-6))


def _overhead(backend: Backend, pinned: tuple[int, ...]) -> float:
    """Seconds that an operation takes which has next to nothing to do."""
    few, many = _times(backend, [_chain(_TINY, _TINY_STEPS), _chain(_TINY, 2 * _TINY_STEPS)], 1, pinned)
    return max(0.0, 1e-3 * (many - few) / _TINY_STEPS)


def _times(backend: Backend, models: Sequence[ModelProto], threads: int, pinned: tuple[int, ...]) -> list[float]:
    protocol = Protocol(threads, warmup=3, samples=15, min_sample_ms=6.0, cores=pinned[:threads])
    built = [backend.build(m, BuildSpec(threads)) for m in models]
    return [t.median_ms for t in backend.measure(built, protocol)]


def _convolutions(channels: int, size: int, kernel: int, copies: int) -> ModelProto:
    rng = np.random.default_rng(0)
    shape = (channels, channels, kernel, kernel)
    nodes, weights = [], []
    for i in range(copies):
        value = (rng.standard_normal(shape) / (kernel * channels**0.5)).astype(np.float32)
        weights.append(onnx.numpy_helper.from_array(value, f"w{i}"))
        pads = [kernel // 2] * 4
        nodes.append(helper.make_node("Conv", [f"t{i}", f"w{i}"], [f"t{i + 1}"], kernel_shape=[kernel] * 2, pads=pads))
    return _model(nodes, (channels, size, size), weights)


def _chain(shape: Shape, steps: int) -> ModelProto:
    """Abs and Neg in turn: no engine merges them."""
    kinds = ("Abs", "Neg")
    return _model([helper.make_node(kinds[i % 2], [f"t{i}"], [f"t{i + 1}"]) for i in range(steps)], shape, [])


def _model(nodes: Sequence[NodeProto], shape: Shape, weights: Sequence[TensorProto]) -> ModelProto:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", *shape]) for n in ("t0", f"t{len(nodes)}"))
    graph = helper.make_graph(list(nodes), "ceiling", [x], [y], list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
