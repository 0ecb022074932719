"""INT8 quantisation of an ONNX model in QDQ form, with onnxruntime.quantization.

Weights are symmetric int8 per output channel, activations asymmetric uint8 per tensor, biases int32: what ONNX
Runtime's x86 kernels are made for. `QuantSpec.symmetric` is TensorRT's scheme instead. Three entry points:

- `quantize`: the named nodes, ranges from data. Q/DQ appear only where a quantised part meets a float one.
- `quantize_for_timing`: the same graph with invented ranges, in milliseconds.
- `quantize_whole`: the whole model the way onnxruntime's documentation tells its users to: the baseline.

Importing this module does not import onnxruntime.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx

from hantc.core.backend_api import Feeds
from hantc.core.errors import HantcError
from hantc.dialect import qdq_graph as edit

MIN_OPSET = 13  # first with per-channel (axis) Quantize/DequantizeLinear

# invented for timing, where only the kernels matter
_TIMING_LOW, _TIMING_HIGH = -4.0, 4.0


Calibration = Literal["robust", "minmax", "percentile", "entropy"]


@dataclass(frozen=True)
class QuantSpec:
    """How to quantise. `reduce_range`: weights keep to 7 bits, needed on x86 without VNNI, whose kernels add
    8-bit products in saturating 16 bits (see `Capabilities.reduce_range`). `symmetric`: activations are int8 around
    zero, biases stay floats, and what an engine computes in a product's own kernel (an activation, a residual sum)
    follows it unrounded, as TensorRT asks for. `calibration`: how a tensor's range
    follows from data; `robust` cuts off what only a few images reach (`ranges.robust_range`); `percentile`
    (99.999 %) and `entropy`, onnxruntime's own, cut off single values, and cost more memory and time.
    `correct_biases`: what rounding does to products' outputs in the mean is taken back (`qdq_bias`)."""

    reduce_range: bool
    per_channel: bool = True
    calibration: Calibration = "minmax"
    symmetric: bool = False
    correct_biases: bool = False


def quantize(
    model: onnx.ModelProto, nodes: Collection[str] | None, calibration: Sequence[Feeds], spec: QuantSpec
) -> onnx.ModelProto:
    """Quantise the nodes named in `nodes` (None: all) as far as ONNX Runtime has fast INT8 kernels for them.

    `calibration`: feeds of the float model, arrays by input name, any batch. Norms should be folded before: a
    BatchNormalization stays float, and so do nodes of other types among `nodes` (see `qdq_graph.select_nodes`).
    `model` is not changed; names, metadata and opset survive. HantcError if the opset is below 13, a name is
    unknown, there is no calibration data, or a range is not finite.
    """
    from hantc.dialect import qdq_bias, qdq_ort, qdq_ranges

    work, selected = _start(model, nodes, spec)
    if not selected:
        return work
    _need_data(calibration)
    if spec.calibration == "robust":
        ranges = qdq_ranges.image_ranges(work, selected, calibration)
    else:
        ranges = qdq_ort.calibrated_ranges(work, selected, calibration, spec.calibration)
    named = onnx.ModelProto()
    named.CopyFrom(work)
    made = _finish(model, work, selected, ranges, spec)
    if spec.correct_biases:
        qdq_bias.correct_biases(named, made, calibration)
    return made


def quantize_for_timing(
    model: onnx.ModelProto, spec: QuantSpec, nodes: Collection[str] | None = None
) -> onnx.ModelProto:
    """`quantize` with invented ranges: the graph and so the latency are right, the numbers are not.

    Runs no inference and touches no file: 3 to 25 ms of CPU for a candidate block, most of it onnxruntime's
    quantiser. HantcError as for `quantize`.
    """
    work, selected = _start(model, nodes, spec)
    if not selected:
        return work
    low, high = np.array(_TIMING_LOW, dtype=np.float32), np.array(_TIMING_HIGH, dtype=np.float32)
    ranges = {v.name: (low, high) for v in [*work.graph.input, *work.graph.output, *work.graph.value_info]}
    return _finish(model, work, selected, ranges, spec)


def quantize_whole(model: onnx.ModelProto, calibration: Sequence[Feeds], spec: QuantSpec) -> onnx.ModelProto:
    """The whole model through onnxruntime's own `quant_pre_process` and `quantize_static`, with their defaults
    but for what their documentation recommends on x86: QDQ, uint8 activations, int8 weights per channel.

    A model below opset 13 is converted first. HantcError if onnxruntime's tools fail on the model.
    """
    from hantc.dialect import qdq_ort

    _need_data(calibration)
    if edit.opset_of(model) < MIN_OPSET:
        try:
            model = onnx.version_converter.convert_version(model, MIN_OPSET)
        except Exception as e:  # the converter raises RuntimeError and others
            raise HantcError(f"the model cannot be converted to opset {MIN_OPSET}: {e}") from e
    return qdq_ort.quantize_static_as_documented(
        model, calibration, spec.calibration, per_channel=spec.per_channel, reduce_range=spec.reduce_range
    )


def _start(model: onnx.ModelProto, nodes: Collection[str] | None, spec: QuantSpec) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of the model that is ready for the quantiser, and the names of the nodes to quantise in it."""
    opset = edit.opset_of(model)
    if opset < MIN_OPSET:
        raise HantcError(
            f"a model of opset {opset} cannot be quantised per channel: QDQ needs opset {MIN_OPSET} or later",
            hint="convert it with onnx.version_converter",
        )
    if nodes is not None:
        unknown = sorted(set(nodes) - {n.name for n in model.graph.node})
        if unknown:
            raise HantcError(f"nodes to quantise are not in the graph: {', '.join(unknown[:5])}")
    work = onnx.ModelProto()
    work.CopyFrom(model)
    edit.name_nodes(work.graph)
    edit.lift_constants(work.graph)
    edit.infer_types(work)
    edit.pool_means(work)
    followers = edit.FUSED_FOLLOWERS if spec.symmetric else edit.FOLLOWERS
    selected = edit.select_nodes(work, None if nodes is None else set(nodes), followers)
    edit.unshare_initializers(work.graph, set(selected))
    return work, selected


def _finish(
    model: onnx.ModelProto,
    work: onnx.ModelProto,
    selected: list[str],
    ranges: dict[str, tuple[np.ndarray, np.ndarray]],
    spec: QuantSpec,
) -> onnx.ModelProto:
    """Insert Q/DQ with onnxruntime's quantiser, then move them to where they belong."""
    from hantc.dialect import qdq_ort

    activations = {o for n in work.graph.node if n.name in selected and n.op_type in edit.ABSORBED for o in n.output}
    work = qdq_ort.insert_qdq(
        work,
        selected,
        ranges,
        per_channel=spec.per_channel,
        reduce_range=spec.reduce_range,
        symmetric=spec.symmetric,
    )
    edit.fold_quantised_constants(work.graph)
    absorbed = activations - {o for n in work.graph.node if n.op_type in edit.ABSORBED for o in n.output}
    floats = edit.FUSED_WITH_FLOAT_RESULT if spec.symmetric else edit.WITH_FLOAT_RESULT
    edit.tidy_borders(work.graph, set(selected), absorbed, floats)
    if spec.symmetric:
        edit.fuse_behind_products(work.graph)
    edit.drop_unread(work.graph)
    edit.restore_header(work, model)
    return work


def _need_data(calibration: Sequence[Feeds]) -> None:
    if not calibration:
        raise HantcError("INT8 needs calibration data, but none was given", hint="pass at least a few inputs")
