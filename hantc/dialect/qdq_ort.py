"""onnxruntime.quantization behind three functions, quiet and without leftovers. Imported on first use only."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.base_quantizer import QuantizationParams
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata, get_qmin_qmax_for_qType
from onnxruntime.quantization.shape_inference import quant_pre_process

from hantc.core.backend_api import Feeds
from hantc.core.errors import HantcError

Array = np.ndarray[Any, Any]
Ranges = dict[str, tuple[Array, Array]]

_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}


class _Reader:
    """A CalibrationDataReader over feeds."""

    def __init__(self, feeds: Sequence[Feeds]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        feed = next(self._feeds, None)
        return None if feed is None else dict(feed)


class _Quantizer(QDQQuantizer):  # type: ignore[misc]  # onnxruntime is untyped
    """QDQQuantizer that computes per-channel scales for all channels at once: onnxruntime's loop over channels
    takes 60 µs each, half a second for one wide candidate. The values are the same."""

    tensors_to_quantize: dict[str, Any]

    def adjust_tensor_ranges(self) -> None:
        """A range that holds nothing below zero lets the rounding do a ReLU's work, but not on what the network hands
        out before it, too."""
        outputs = [o.name for o in self.model.graph().output if o.name in self.tensors_range]
        kept = {name: self.tensors_range[name] for name in outputs}
        super().adjust_tensor_ranges()
        for name, values in kept.items():
            self.tensors_range[name] = values

    def _calc_initializer_quant_params(self) -> dict[str, Any]:
        every = self.tensors_to_quantize
        constants = {i.name: i for i in self.model.initializer()}
        channelwise = {n: t for n, t in every.items() if t.axis is not None and n in constants}
        self.tensors_to_quantize = {n: t for n, t in every.items() if n not in channelwise}
        params: dict[str, Any] = super()._calc_initializer_quant_params()
        self.tensors_to_quantize = every
        qmin, qmax = get_qmin_qmax_for_qType(self.weight_qType, self.reduce_range, symmetric=True)
        for name, info in channelwise.items():
            weight = numpy_helper.to_array(constants[name])
            axis = info.axis % weight.ndim
            others = tuple(a for a in range(weight.ndim) if a != axis)
            scale = 2 * np.abs(weight).max(axis=others).astype(np.float64) / (float(qmax) - float(qmin))
            scale = np.where(scale < np.finfo(np.float32).tiny, 1.0, scale).astype(np.float32)
            zero = np.zeros(scale.shape, dtype=np.int8)
            params[name] = QuantizationParams(zero_point=zero, scale=scale, quant_type=self.weight_qType, axis=axis)
        return params


def insert_qdq(
    model: onnx.ModelProto,
    selected: Sequence[str],
    ranges: Ranges,
    *,
    per_channel: bool,
    reduce_range: bool,
    symmetric: bool = False,
) -> onnx.ModelProto:
    """Insert Q/DQ around the selected nodes, in place. Constants keep their float value and get a Q/DQ pair.
    `symmetric`: activations in int8 around zero, biases left in floats.

    `model` has the type of every tensor in its value_info; `ranges` covers every float tensor that a selected
    node touches. HantcError if onnxruntime's quantiser fails.
    """
    types = {n.op_type for n in model.graph.node if n.name in set(selected)}
    add_infer_metadata(model)  # else the quantiser writes the model to disk to infer the types again
    with _quiet():
        try:
            quantizer = _Quantizer(
                model,
                per_channel,
                reduce_range,
                QuantType.QInt8,
                QuantType.QInt8 if symmetric else QuantType.QUInt8,
                TensorsData(CalibrationMethod.MinMax, ranges),
                list(selected),
                [],
                sorted(types),
                {"AddQDQPairToWeight": True, "ActivationSymmetric": symmetric, "QuantizeBias": not symmetric},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        except Exception as e:  # the quantiser raises whatever it runs into
            raise HantcError(f"onnxruntime cannot quantise the model: {type(e).__name__}: {e}") from e
    quantised: onnx.ModelProto = quantizer.model.model
    return quantised


def calibrated_ranges(
    model: onnx.ModelProto, selected: Collection[str], feeds: Sequence[Feeds], method: str, *, check: bool = True
) -> Ranges:
    """(lowest, highest) of every float tensor that a selected node touches, over all feeds.

    Memory stays that of one feed. HantcError if the model does not run on a feed, or (`check`) a range is not finite.
    """
    types = sorted({n.op_type for n in model.graph.node if n.name in selected})
    touched = {t for n in model.graph.node if n.name in selected for t in [*n.input, *n.output]}
    with tempfile.TemporaryDirectory(prefix="hantc-calibrate-") as folder, _quiet():
        source, augmented = Path(folder) / "float.onnx", Path(folder) / "augmented.onnx"
        onnx.save(model, source)
        options = {} if method == "minmax" else {"symmetric": False}
        try:
            calibrator = create_calibrator(source, types, str(augmented), _METHODS[method], extra_options=options)
            for feed in feeds:
                calibrator.collect_data(_Reader([feed]))
            found = calibrator.compute_data()
        except Exception as e:  # onnxruntime's own exceptions share no base class
            raise HantcError(f"calibration fails: {type(e).__name__}: {e}") from e
    ranges: Ranges = {}
    for name in found:
        low, high = (np.asarray(v, dtype=np.float32).reshape(()) for v in found[name].range_value)
        if check and name in touched:
            check_range(name, float(low), float(high))
        ranges[name] = (low, high)
    return ranges


def check_range(name: str, low: float, high: float) -> None:
    """HantcError if a tensor's range is not finite."""
    if not (np.isfinite(low) and np.isfinite(high)):
        raise HantcError(
            f"the tensor {name!r} reaches {low} to {high} on the calibration data",
            hint="check the preprocessing, or leave this part in fp32",
        )


def quantize_static_as_documented(
    model: onnx.ModelProto, feeds: Sequence[Feeds], method: str, *, per_channel: bool, reduce_range: bool
) -> onnx.ModelProto:
    """`quant_pre_process`, then `quantize_static`. HantcError if either fails."""
    with tempfile.TemporaryDirectory(prefix="hantc-int8-") as folder, _quiet():
        source, prepared, result = (Path(folder) / f"{n}.onnx" for n in ("source", "prepared", "result"))
        try:
            onnx.save(model, source)
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                result,
                _Reader(feeds),
                quant_format=QuantFormat.QDQ,
                per_channel=per_channel,
                reduce_range=reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=_METHODS[method],
            )
            return onnx.load(result)
        except Exception as e:  # the tools raise whatever they run into
            raise HantcError(f"onnxruntime cannot quantise the whole model: {type(e).__name__}: {e}") from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what onnxruntime.quantization logs through the root logger, prints and warns, and nothing else."""

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return "onnxruntime" not in record.pathname

    root, handler = logging.getLogger(), logging.NullHandler()
    root.addFilter(from_elsewhere)
    root.addHandler(handler)  # else logging.warning() would install a handler for good
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"onnxruntime\.")
            yield
    finally:
        root.removeHandler(handler)
        root.removeFilter(from_elsewhere)
