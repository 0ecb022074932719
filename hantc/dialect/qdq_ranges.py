"""Activation ranges of an ONNX model from what each calibration image needs. Imports onnxruntime on first use."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from hantc.core.backend_api import Feeds
from hantc.core.errors import HantcError
from hantc.dialect.front_to_back import start
from hantc.dialect.qdq_graph import opset_of
from hantc.dialect.qdq_ort import Ranges, check_range
from hantc.dialect.ranges import robust_range

_PREFIX = "hantc_range_"
_FIGURES = ("lowest", "highest", "mean", "square")


def image_ranges(model: onnx.ModelProto, selected: Collection[str], feeds: Sequence[Feeds]) -> Ranges:
    """`robust_range` of every float tensor that a selected node touches, over the images of all feeds.

    The graph itself is made to say each image's figures, so that memory stays that of one feed. HantcError if the
    model does not run on a feed, or a range is not finite.
    """
    names = _touched(model, selected)
    watched, made = _watched(model, names)
    found: dict[str, list[Any]] = {m: [] for m in made}
    try:
        session = start(watched)
        for feed in feeds:
            size = max((a.shape[0] for a in feed.values() if a.ndim), default=1)
            values = dict(zip(made, session.run(made, dict(feed)), strict=True))
            for name, value in values.items():
                flat = np.asarray(value, dtype=np.float64).reshape(-1)
                found[name].append(_by_image(name, flat, size))
    except Exception as e:  # onnxruntime's own exceptions share no base class
        raise HantcError(f"calibration fails: {type(e).__name__}: {e}") from e
    ranges: Ranges = {}
    for k, name in enumerate(names):
        low, high, mean, square = (np.concatenate(found[f"{_PREFIX}{figure}_{k}"]) for figure in _FIGURES)
        sound = bool(np.isfinite(mean).all())  # NaN is passed over by lowest and highest
        check_range(name, float(low.min()) if sound else float("nan"), float(high.max()))
        lowest, highest = robust_range(low, high, np.maximum(square - mean**2, 0.0))
        ranges[name] = (np.asarray(lowest, dtype=np.float32), np.asarray(highest, dtype=np.float32))
    return ranges


def _by_image(name: str, values: np.ndarray[Any, Any], images: int) -> np.ndarray[Any, Any]:
    """A figure of each row as one of each image: windows or tokens may lie in the first dimension beside the
    images. One for all where it is something else."""
    how = {"lowest": np.min, "highest": np.max}.get(name.removeprefix(_PREFIX).split("_")[0], np.mean)
    rows = values.reshape(images if values.size % images == 0 else 1, -1)
    return np.asarray(how(rows, axis=1))


def _touched(model: onnx.ModelProto, selected: Collection[str]) -> list[str]:
    """Float tensors, other than constants, that the selected nodes read or make."""
    constants = {i.name for i in model.graph.initializer}
    typed = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    floats = {v.name for v in typed if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    touched = [t for n in model.graph.node if n.name in selected for t in [*n.input, *n.output]]
    return list(dict.fromkeys(t for t in touched if t in floats and t not in constants))


def _watched(model: onnx.ModelProto, names: Sequence[str]) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of the model with four more outputs for each tensor, one figure per image in each; their names."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph, made = copy.graph, list[str]()
    old = opset_of(model) < 18
    if not old:
        graph.initializer.append(helper.make_tensor(f"{_PREFIX}axes", TensorProto.INT64, [1], [1]))
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in [*graph.value_info, *graph.input, *graph.output]}
    for k, name in enumerate(names):
        rows, squares = f"{_PREFIX}rows_{k}", f"{_PREFIX}squares_{k}"
        graph.node.append(helper.make_node("Flatten", [name], [rows], axis=int(ranks[name] > 1)))
        graph.node.append(helper.make_node("Mul", [rows, rows], [squares]))
        for figure, op, source in zip(
            _FIGURES, ("ReduceMin", "ReduceMax", "ReduceMean", "ReduceMean"), (rows, rows, rows, squares), strict=True
        ):
            out = f"{_PREFIX}{figure}_{k}"
            node = helper.make_node(op, [source] if old else [source, f"{_PREFIX}axes"], [out], keepdims=0)
            node.attribute.extend([helper.make_attribute("axes", [1])] if old else [])
            graph.node.append(node)
            graph.output.append(helper.make_tensor_value_info(out, TensorProto.FLOAT, None))
            made.append(out)
    return copy, made
