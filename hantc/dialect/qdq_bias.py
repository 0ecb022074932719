"""Biases of quantised products, corrected by what rounding does to their outputs in the mean.

Empirical bias correction (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
§4.2 and appendix): rounded weights and activations shift the mean of a channel, and such shifts add up from layer to
layer. The means of calibration images, in floats and quantised, tell them, and a product's bias takes them back.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from hantc.core.backend_api import Feeds
from hantc.core.errors import HantcError
from hantc.dialect.front_to_back import FrontToBack, mean_nodes, start
from hantc.dialect.opaque import captured
from hantc.dialect.qdq_graph import opset_of

Array = np.ndarray[Any, Any]

_PREFIX = "hantc_mean_"
_MOST_BYTES = 64 << 20  # of the feeds: the tensors inside a network take several times as much
_OUTERMOST = 0.45  # of the images, at either end: what is left is the median, or nearly
_WITH_BIAS = frozenset({"Conv", "Gemm"})


@dataclass(frozen=True)
class _Product:
    """A node with a bias of its own. `scale`: of the bias's integers, (channels,) or (); None where it is in floats."""

    node: str
    rank: int  # of the output, channels in dimension 1
    bias: str
    scale: Array | None


def correct_biases(model: onnx.ModelProto, quantised: onnx.ModelProto, feeds: Sequence[Feeds]) -> None:
    """Change the biases of `quantised`, made from `model`, front to back, so that the channel means of its products'
    outputs are `model`'s, for half of the images a little more and for half a little less. 64 MB of feeds are enough.
    In place. HantcError if either does not run on a feed.

    One product after another: what is taken back in one changes all behind it. (Ten at a time made EfficientNet-B0 four
    times worse than it was, four at a time deeplabv3.) What few images lose by being cut off is not spread over all:
    the mean of all images' shifts made EfficientNet-B0 forty times worse on images of which a few go far. Convolutions
    and Gemms with a bias that nothing else reads, int32 or float; others are left as they are.
    """
    products = _correctable(model, quantised)
    if not products:
        return
    feeds = _few(feeds)
    biases = {i.name: i for i in quantised.graph.initializer}
    try:
        wanted = _means(model, products, feeds)
        walk = FrontToBack(quantised, feeds, [p.node for p in products])
        for p in products:
            bias = numpy_helper.to_array(biases[p.bias])
            moved = _moved(bias, _middle(wanted[p.node] - walk.next_means(p.rank)), p.scale)
            biases[p.bias].CopyFrom(numpy_helper.from_array(moved, p.bias))
    except Exception as e:  # onnxruntime's own exceptions share no base class
        raise HantcError(f"correcting biases fails: {type(e).__name__}: {e}") from e


def _few(feeds: Sequence[Feeds]) -> Sequence[Feeds]:
    """The first feeds, as many as fit into 64 MB, at least one."""
    sizes = itertools.accumulate(sum(a.nbytes for a in feed.values()) for feed in feeds)
    return feeds[: max(1, sum(size <= _MOST_BYTES for size in sizes))]


def _middle(shifts: Array) -> Array:
    """What images' shifts, (rows, C), have in common, (C,) in float64: the mean without the outermost."""
    cut = int(_OUTERMOST * len(shifts))
    return np.asarray(np.sort(shifts.astype(np.float64), axis=0)[cut : len(shifts) - cut].mean(axis=0))


def _moved(bias: Array, shift: Array, scale: Array | None) -> Array:
    """The bias with `shift` (float64) added, in its own type; channels whose mean is not finite stay."""
    shift = np.where(np.isfinite(shift), shift, 0.0)
    if scale is None:
        return (bias + shift).astype(bias.dtype)
    limits = np.iinfo(bias.dtype)
    return np.clip(np.rint(bias + shift / scale), limits.min, limits.max).astype(bias.dtype)


def _correctable(model: onnx.ModelProto, quantised: onnx.ModelProto) -> list[_Product]:
    """The quantised products of both models that have a bias of their own, in the order of the graph."""
    graph = quantised.graph
    constants = {i.name: i for i in graph.initializer}
    makers = {o: n for n in graph.node for o in n.output}
    read = [i for n in graph.node for i in [*n.input, *captured(n)]]
    names = {n.name for n in model.graph.node if n.op_type in _WITH_BIAS}
    found = []
    for node in graph.node:
        if node.name not in names or node.op_type not in _WITH_BIAS or len(node.input) < 3:
            continue
        if any(a.name == "beta" and a.f != 1 for a in node.attribute):
            continue
        weight = makers.get(node.input[1])
        if weight is None or weight.op_type != "DequantizeLinear" or weight.input[0] not in constants:
            continue
        rank = len(constants[weight.input[0]].dims)
        channels = constants[weight.input[0]].dims[_channel_axis(node)]
        bias = makers.get(node.input[2])
        if bias is not None and bias.op_type == "DequantizeLinear" and bias.input[0] in constants:
            name, scale = bias.input[0], numpy_helper.to_array(constants[bias.input[1]]).astype(np.float64)
        elif node.input[2] in constants and constants[node.input[2]].data_type == TensorProto.FLOAT:
            name, scale = node.input[2], None
        else:
            continue
        if read.count(name) == read.count(node.input[2]) == 1 and list(constants[name].dims) == [channels]:
            found.append(_Product(node.name, rank, name, scale))
    return found


def _channel_axis(node: NodeProto) -> int:
    """Which dimension of a product's weight its output channels are."""
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return 1 if node.op_type == "Gemm" and not transposed else 0


def _means(model: onnx.ModelProto, products: Sequence[_Product], feeds: Sequence[Feeds]) -> dict[str, Array]:
    """Each image's channel means of each product's output, (rows, C), in one run."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensors = {n.name: n.output[0] for n in model.graph.node}
    made = [f"{_PREFIX}{k}" for k in range(len(products))]
    for p, out in zip(products, made, strict=True):
        copy.graph.node.extend(mean_nodes(tensors[p.node], p.rank, opset_of(model), out))
        copy.graph.output.append(onnx.ValueInfoProto(name=out))
    session = start(copy)
    values = zip(*(session.run(made, dict(feed)) for feed in feeds), strict=True)
    return {p.node: np.concatenate(v) for p, v in zip(products, values, strict=True)}
