"""How each operator on quantised values becomes one on floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper

from hantc.core.errors import UnsupportedError
from hantc.dialect.dequantize_work import Work, scaled
from hantc.dialect.leaf import Array, attributes


def _name(node: NodeProto, i: int) -> str:
    return node.input[i] if 0 <= i < len(node.input) else ""


def _operand(node: NodeProto, i: int) -> tuple[str, str, str]:
    """A quantised input's name, its scale's and its zero point's."""
    return _name(node, i), _name(node, i + 1), _name(node, i + 2)


def _attrs(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _quantize(w: Work, node: NodeProto) -> None:
    value = node.input[0]
    if value in w.floated | w.sums or attributes(node).get("output_dtype", 2) != onnx.TensorProto.UINT8:
        raise UnsupportedError(f"{node.op_type} {node.name!r} computes with quantised values")
    w.leave(w.names.get(value, value), node.output[0], node.input[1], _name(node, 2))


def _dequantize(w: Work, node: NodeProto) -> None:
    value, scale, zero = (_name(node, i) for i in range(3))
    if attributes(node).get("block_size", 0):
        raise UnsupportedError("weights are quantised in blocks")
    if value in w.constants and scale in w.constants:
        w.become(node.output[0], w.floats(value, scale, zero, int(attributes(node).get("axis", 1))))
    elif value in w.floated:
        w.become(node.output[0], value)
    else:
        w.put(node)


def _first(w: Work, value: str, rank: int) -> str:
    """A value whose channels lie last, with them behind the batch."""
    made = f"{value}/channels_first"
    if made not in w.producers:
        w.add("Transpose", [value], made, perm=[0, rank - 1, *range(1, rank - 1)])
    return made


def _leave(w: Work, value: str, node: NodeProto, scale: str, zero: str, last: int = 0) -> None:
    """`Work.leave` for a node's output; `last`: the rank, where its channels lie last."""
    output = node.output[0]
    if last and output in w.kept:
        w.add("Transpose", [value], f"{value}/channels_last", perm=[0, *range(2, last), 1])
        w.leave(f"{value}/channels_last", output, scale, zero)
        return
    w.leave(value, output, scale, zero)
    if last:
        value = w.names[output]
        w.names[output] = f"{value}/channels_last"
        if w.names[output] not in w.producers:
            w.add("Transpose", [value], w.names[output], perm=[0, *range(2, last), 1])


def _bias(w: Work, node: NodeProto, name: str, scale: Array) -> str:
    floats = w.constants[name].astype(np.float64) * scale.reshape(-1)
    return w.constant(f"{node.output[0]}/bias", floats.astype(np.float32))


def _product(op: str, axis: int) -> Callable[[Work, NodeProto], None]:
    """QLinearConv and QLinearMatMul."""

    def rule(w: Work, node: NodeProto) -> None:
        x, xs, xz, k, ks, kz, ys, yz = node.input[:8]
        attrs = _attrs(node)
        value, last = w.floats(x, xs, xz), w.constants[k].ndim if attrs.pop("channels_last", 0) else 0
        inputs = [_first(w, value, last) if last else value, w.floats(k, ks, kz, axis)]
        if bias := _name(node, 8):
            scale = w.constants[xs].astype(np.float64) * w.constants[ks].astype(np.float64)
            inputs.append(_bias(w, node, bias, scale))
        made = f"{node.output[0]}/{op}"
        w.add(op, inputs, made, **attrs)
        w.ranks[node.output[0]] = last
        _leave(w, made, node, ys, yz, last)

    return rule


def _gemm(w: Work, node: NodeProto) -> None:
    x, xs, xz, k, ks, kz = node.input[:6]
    attrs = attributes(node)
    axis = 0 if attrs.get("transB", 0) else 1
    inputs = [w.floats(x, xs, xz), w.floats(k, ks, kz, axis)]
    if bias := _name(node, 6):
        scale = attrs.get("alpha", 1.0) * w.constants[xs].astype(np.float64) * w.constants[ks].astype(np.float64)
        inputs.append(_bias(w, node, bias, scale))
    if not _name(node, 7):
        w.add("Gemm", inputs, node.output[0], **attrs)
        return
    made = f"{node.output[0]}/Gemm"
    w.add("Gemm", inputs, made, **attrs)
    w.leave(made, node.output[0], node.input[7], _name(node, 8))


def _rank(w: Work, node: NodeProto, attrs: Mapping[str, Any]) -> int:
    """Of a value whose channels lie last; that of an image where nothing tells."""
    return len(attrs["kernel_shape"]) + 2 if "kernel_shape" in attrs else w.ranks.get(node.input[0], 0) or 4


def _pointwise(op: str, operands: int) -> Callable[[Work, NodeProto], None]:
    """Operators of so many quantised operands (tensor, scale, zero point each), then the result's scale and zero."""

    def rule(w: Work, node: NodeProto) -> None:
        inputs = [w.floats(*_operand(node, 3 * i)) for i in range(operands)]
        attrs = _attrs(node)
        attrs.pop("opset", None)
        last = _rank(w, node, attrs) if attrs.pop("channels_last", 0) else 0
        w.ranks[node.output[0]] = last or w.ranks.get(node.input[0], 0)
        if last:
            inputs = [_first(w, i, last) for i in inputs]
        made = f"{node.output[0]}/{op}"
        w.add(op, inputs, made, **attrs)
        _leave(w, made, node, _name(node, 3 * operands), _name(node, 3 * operands + 1), last)

    return rule


def _where(w: Work, node: NodeProto) -> None:
    made = f"{node.output[0]}/Where"
    values = [w.floats(*_operand(node, i)) for i in (1, 4)]
    w.add("Where", [node.input[0], *values], made)
    w.leave(made, node.output[0], _name(node, 7), _name(node, 8))


def _max_pool(w: Work, node: NodeProto) -> None:
    """NhwcMaxPool: of quantised values, with the channels last."""
    x, attrs = node.input[0], _attrs(node)
    if x not in w.floated or node.output[0] in w.kept:
        raise UnsupportedError(f"{node.op_type} {node.name!r} of integers")
    rank, made = _rank(w, node, attrs), f"{node.output[0]}/MaxPool"
    w.ranks[node.output[0]] = rank
    w.add("MaxPool", [_first(w, w.names.get(x, x), rank)], made, **attrs)
    w.floated.add(node.output[0])
    w.names[node.output[0]] = f"{made}/channels_last"
    w.add("Transpose", [made], f"{made}/channels_last", perm=[0, *range(2, rank), 1])


def pad(w: Work, node: NodeProto) -> None:
    """Of a quantised value: what it is padded with is quantised as the value is."""
    x, (made,) = node.input[0], node.output
    filler = list(node.input)
    if attributes(node).get("mode", "constant") == "constant":
        if w.opset < 11 or x not in w.ranges:
            raise UnsupportedError(f"{node.op_type} {node.name!r} of integers")
        scale, zero = w.ranges[x]
        value = (w.scalar(fill) if (fill := _name(node, 2)) else 0) - zero
        name = w.constant(f"{made}/filler", np.array(value * scale, np.float32))
        filler = [*filler[:2], name, *filler[3:]]
    w.put(helper.make_node("Pad", filler, [made], name=node.name, **attributes(node)))
    w.floated.add(made)
    if x in w.ranges:
        w.ranges[made] = w.ranges[x]


def _concat(w: Work, node: NodeProto) -> None:
    parts = [w.floats(*node.input[i : i + 3]) for i in range(2, len(node.input), 3)]
    made = f"{node.output[0]}/Concat"
    w.add("Concat", parts, made, axis=int(attributes(node)["axis"]))
    w.leave(made, node.output[0], node.input[0], node.input[1])


def _dynamic(w: Work, node: NodeProto) -> None:
    """The scale found at run time is one now: what multiplies by it later stays right."""
    value, (quantized, *facts) = node.input[0], node.output
    if w.kept & set(node.output) or not all(_rescales(w, reader, name) for name in facts for reader in w.read(name)):
        raise UnsupportedError(f"{node.op_type} {node.name!r} is read as a value")
    w.floated.add(quantized)
    w.names[quantized] = w.names.get(value, value)
    units: tuple[Array, Array] = np.ones((), np.float32), np.zeros((), np.uint8)
    for name, one in zip(facts, units, strict=False):
        w.constant(name, one)


_TAKES_SCALES = frozenset({"DequantizeLinear", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"})


def _rescales(w: Work, reader: NodeProto, name: str) -> bool:
    """Whether a node reads a scale or zero point found at run time to scale sums of products with it, as it is or times
    the weights' scale."""
    if reader.op_type in _TAKES_SCALES:
        return True
    others = [i for i in reader.input if i != name]
    if reader.op_type != "Mul" or len(others) != 1 or set(reader.output) & w.kept:
        return False
    if others[0] not in w.constants:
        return any(others[0] in n.output and n.op_type == "Cast" for n in w.model.graph.node)
    return all(_rescales(w, after, reader.output[0]) for after in w.read(reader.output[0]))


def _integers(op: str) -> Callable[[Work, NodeProto], None]:
    """ConvInteger and MatMulInteger: products whose scale is applied by nodes of its own."""

    def rule(w: Work, node: NodeProto) -> None:
        x, k, zero = node.input[0], node.input[1], _name(node, 3)
        if x not in w.floated or k not in w.constants:
            raise UnsupportedError(f"{node.op_type} {node.name!r} of something else than an activation and a constant")
        zeros = w.constants[zero] if zero else np.zeros((), np.int64)
        ones = np.ones(zeros.size if zeros.size > 1 else (), np.float32)
        weight = w.constant(f"{node.output[0]}/weight", scaled(w.constants[k], ones, zeros, 0 if op == "Conv" else -1))
        attrs = _attrs(node)
        w.add(op, [w.names.get(x, x), weight], node.output[0], **attrs)
        w.sums.add(node.output[0])

    return rule


def _to_floats(x: int, scales: Sequence[int], zeros: Sequence[int], bias: int) -> Callable[[Work, NodeProto], None]:
    """Products of an activation, at place `x`, and a constant behind it, with a float result: `scales` and `zeros` are
    the places of theirs, -1 for a float activation's."""

    def rule(w: Work, node: NodeProto) -> None:
        value = node.input[x]
        if scales[0] >= 0 and not (value in w.floated or value in w.constants):
            raise UnsupportedError(f"{node.op_type} {node.name!r} of integers")
        floats = w.names.get(value, value)
        if scales[0] >= 0:
            floats = w.floats(value, node.input[scales[0]], _name(node, zeros[0]))
        weight = w.floats(node.input[x + 1], node.input[scales[1]], _name(node, zeros[1]), -1)
        if not _name(node, bias):
            w.add("MatMul", [floats, weight], node.output[0])
            return
        w.add("MatMul", [floats, weight], f"{node.output[0]}/MatMul")
        w.add("Add", [f"{node.output[0]}/MatMul", node.input[bias]], node.output[0])

    return rule


def _attention(w: Work, node: NodeProto) -> None:
    """QAttention becomes the same in floats, which ONNX Runtime runs."""
    x, k, bias, xs, ks = node.input[:5]
    inputs = [w.floats(x, xs, _name(node, 6)), w.floats(k, ks, _name(node, 7), -1), bias, _name(node, 5)]
    if past := _name(node, 8):
        inputs += [past]
    while not inputs[-1]:
        inputs.pop()
    made = helper.make_node("Attention", inputs, list(node.output), domain=node.domain, **_attrs(node))
    w.put(made)


RULES: Mapping[str, Callable[[Work, NodeProto], None]] = MappingProxyType(
    {
        "QuantizeLinear": _quantize,
        "DequantizeLinear": _dequantize,
        "QLinearConv": _product("Conv", 0),
        "QLinearMatMul": _product("MatMul", -1),
        "QGemm": _gemm,
        "QLinearAdd": _pointwise("Add", 2),
        "QLinearMul": _pointwise("Mul", 2),
        "QLinearSigmoid": _pointwise("Sigmoid", 1),
        "QLinearLeakyRelu": _pointwise("LeakyRelu", 1),
        "QLinearAveragePool": _pointwise("AveragePool", 1),
        "QLinearGlobalAveragePool": _pointwise("GlobalAveragePool", 1),
        "QLinearSoftmax": _pointwise("Softmax", 1),
        "QLinearConcat": _concat,
        "QLinearWhere": _where,
        "NhwcMaxPool": _max_pool,
        "DynamicQuantizeMatMul": _to_floats(0, (-1, 2), (-1, 3), 4),
        "MatMulIntegerToFloat": _to_floats(0, (2, 3), (4, 5), 6),
        "QAttention": _attention,
        "DynamicQuantizeLinear": _dynamic,
        "ConvInteger": _integers("Conv"),
        "MatMulInteger": _integers("MatMul"),
    }
)
