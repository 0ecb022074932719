"""Frames: what stands around a small model while it is timed, so that its borders cost what they cost in a network.

Engines keep activations in layouts of their own between convolutions (ONNX Runtime: blocks of channels for floats,
channels last for INT8), and a model on its own pays for getting there and back. In a network of such convolutions it
does not. So a part is timed between two cheap convolutions of its precision, and what these take is taken off:

- `chain` (equal shapes): head, copies of the part in a row, tail; less head and tail.
- else: copies in lanes of their own: an input, a head, the copy, a tail; less as many empty lanes, but for the tails,
  which read another shape there. A tail's cost on a tensor is that of one more of them on the same tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from hantc.core.types import Shape
from hantc.dialect.qdq import MIN_OPSET, QuantSpec, quantize_for_timing
from hantc.dialect.replicate import replicate

_LEAST_CHANNELS = 8  # with fewer there is no blocked layout to keep
_TAIL_CHANNELS = 16
_MOST_CHANNELS = 512  # of a pointwise head: a megabyte of weights
_TAILS = 5
_BETWEEN = 12  # convolutions in floats between two borders
_SHORT, _LONG = 5, 9  # convolutions in INT8


@dataclass(frozen=True)
class Frame:
    """What stands before and behind copies of a part; None where it stands alone."""

    head: ModelProto | None
    tail: ModelProto | None

    def around(self, model: ModelProto, copies: int, *, chain: bool) -> ModelProto:
        """The model that is timed for a part."""
        return replicate(model, copies, "chain" if chain else "lanes", head=self.head, tail=self.tail)


def frame(in_shape: Shape, out_shape: Shape, quant: QuantSpec | None, opset: int) -> Frame:
    """The frame of a part from `in_shape` to `out_shape` (without batch), in INT8 with `quant`."""
    if quant is not None and opset < MIN_OPSET:
        return Frame(None, None)
    head = _head(in_shape, quant, opset) if _blocked(in_shape) else None
    tail = _pointwise(out_shape, _TAIL_CHANNELS, quant, opset) if len(out_shape) == 3 else None
    return Frame(head, tail)


def empty(shape: Shape, quant: QuantSpec | None, opset: int, lanes: int = 1) -> ModelProto:
    """A frame with nothing in it, or so many of them: what is taken off a part whose input is of `shape`."""
    around = frame(shape, shape, quant, opset)
    inside = handed_through(shape) if around.tail is None else around.tail
    return replicate(inside, lanes, "lanes", head=around.head)


def tails(shape: Shape, quant: QuantSpec | None, opset: int) -> tuple[ModelProto, ModelProto, int] | None:
    """Two models, the second of which has so many more tails on one tensor of `shape`; None where none stand there."""
    around = frame(shape, shape, quant, opset)
    if around.tail is None:
        return None
    one, many = (replicate(around.tail, n, "fan", head=around.head) for n in (1, _TAILS))
    return one, many, _TAILS - 1


@dataclass(frozen=True)
class BorderRows:
    """Rows of cheap convolutions on one tensor's shape. `plain`: floats alone; `mixed`: as many, two of them in INT8,
    far from each other; `rounded`: two rows of different lengths in INT8 alone."""

    plain: ModelProto
    mixed: ModelProto
    rounded: tuple[ModelProto, ModelProto]

    def pair(self, plain: float, mixed: float, short: float, long: float) -> float:
        """What going to INT8 and back takes, of what the rows take (`short` and `long`: those in INT8)."""
        each = plain / (3 * _BETWEEN + 2)
        in_int8 = (long - short) / (_LONG - _SHORT)
        return max(0.0, (mixed - 3 * _BETWEEN * each - 2 * in_int8) / 2)


def borders(shape: Shape, quant: QuantSpec) -> BorderRows | None:
    """Rows that tell what a border costs; None where a tensor of `shape` is none of a convolution's. Many floats stand
    between two borders, as in a network: one that follows soon on another finds the other precision's kernels at hand.
    With 1 convolution between them a pair on 112×4×4 took 3 µs here, with 4 it took 6, with 16 13, with 40 17."""
    if not _blocked(shape):
        return None
    rounded = quantize_for_timing(_depthwise(shape), quant)
    plain = _depthwise(shape, kept=True)
    some = replicate(plain, _BETWEEN, "chain")
    mixed = replicate(replicate(rounded, 1, "chain", head=some), 2, "chain", tail=some)
    short, long = (replicate(rounded, n, "chain") for n in (_SHORT, _LONG))
    return BorderRows(replicate(plain, 3 * _BETWEEN + 2, "chain"), mixed, (short, long))


def handed_through(shape: Shape) -> ModelProto:
    """The least a session can do with a tensor of `shape`."""
    return _model([helper.make_node("Identity", ["x"], ["y"], name="same")], shape, shape, [], 17)


def _blocked(shape: Shape) -> bool:
    return len(shape) == 3 and shape[0] >= _LEAST_CHANNELS


def _pointwise(shape: Shape, channels: int, quant: QuantSpec | None, opset: int) -> ModelProto:
    return _convolution(shape, (channels, shape[0], 1, 1), 1, quant, opset)


def _head(shape: Shape, quant: QuantSpec | None, opset: int) -> ModelProto:
    """A depthwise one where many channels would make it dear: behind a pointwise convolution of 1280 channels (1.5 ms,
    6.6 MB) MobileNetV2's classifier took 0.27 ms, and by itself 0.08: the caches no longer held its weights."""
    if shape[0] <= _MOST_CHANNELS:
        return _pointwise(shape, shape[0], quant, opset)
    return _convolution(shape, (shape[0], 1, 3, 3), shape[0], quant, opset)


def _depthwise(shape: Shape, *, kept: bool = False) -> ModelProto:
    """A cheap convolution; `kept`: followed by a Sigmoid, so that the engine does not quantise it between others."""
    made = ModelProto()
    made.CopyFrom(_convolution(shape, (shape[0], 1, 3, 3), shape[0], None, 17))
    if kept:
        made.graph.node[0].output[0] = "c"
        made.graph.node.append(helper.make_node("Sigmoid", ["c"], ["y"], name="sigmoid"))
    return made


@cache
def _convolution(
    shape: Shape, weight: tuple[int, int, int, int], groups: int, quant: QuantSpec | None, opset: int
) -> ModelProto:
    rng = np.random.default_rng(0)
    value = (rng.standard_normal(weight) / np.prod(weight[1:]) ** 0.5).astype(np.float32)
    pads = [weight[2] // 2] * 4
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", kernel_shape=weight[2:], pads=pads, group=groups)
    tensor = onnx.numpy_helper.from_array(value, "w")
    made = _model([node], shape, (weight[0], *shape[1:]), [tensor], opset)
    return made if quant is None else quantize_for_timing(made, quant)


def _model(
    nodes: list[onnx.NodeProto], in_shape: Shape, out_shape: Shape, weights: list[TensorProto], opset: int
) -> ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *in_shape])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", *out_shape])
    graph = helper.make_graph(nodes, "frame", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
