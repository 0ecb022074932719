"""A model that is quantised already → the same network in floats, so that it can be a teacher.

Values keep what quantisation made of the weights; the activations' rounding goes, their ranges are recorded. Where the
range of a sum or product begins at zero, the quantiser had left a ReLU to it, which comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from hantc.core.errors import UnsupportedError
from hantc.dialect.leaf import Array, attributes
from hantc.dialect.opaque import captured, rename_captured

_RECTIFIED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Sum", "BatchNormalization"})
_MOVES = frozenset(
    """MaxPool Reshape Transpose Flatten Squeeze Unsqueeze Concat Slice Gather Identity Resize DepthToSpace SpaceToDepth
    Split Expand Tile Upsample""".split()  # noqa: SIM905
)
_SIX = (5.9, 6.05)  # where the upper end of a ReLU6's range lies


@dataclass(frozen=True)
class Dequantized:
    """`model`: in floats, or as it was where `reason` says why not. `ranges`: scale and zero point of each activation
    that had been quantised."""

    model: ModelProto
    ranges: Mapping[str, tuple[float, int]]
    reason: str = ""


def is_quantized(model: ModelProto) -> bool:
    """Whether anything in it computes on quantised values."""
    return any(n.op_type in _RULES for n in model.graph.node)


def dequantized(model: ModelProto) -> Dequantized:
    """`model` in floats, or itself where nothing in it is quantised. What cannot be taken apart (integers that are
    computed with) leaves the whole as it is."""
    if not is_quantized(model):
        return Dequantized(model, {})
    try:
        work = _Work(model)
        for node in model.graph.node:
            work.take(node)
    except UnsupportedError as error:
        return Dequantized(model, {}, error.message)
    # scales that are computed, inputs that are missing, broken weights (of which the import tells more)
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        return Dequantized(model, {}, f"its quantisation is of a kind that is not known: {error}")
    return Dequantized(work.finish(), work.ranges)


@dataclass
class _Work:
    model: ModelProto
    constants: dict[str, Array] = field(default_factory=dict)
    nodes: list[NodeProto] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # tensors that became another's value
    floated: set[str] = field(default_factory=set)  # were integers, are floats
    sums: set[str] = field(default_factory=set)  # of products of integers, not scaled yet
    ranges: dict[str, tuple[float, int]] = field(default_factory=dict)
    producers: dict[str, str] = field(default_factory=dict)  # op types
    kept: set[str] = field(default_factory=set)  # names that may not vanish: graph outputs

    def __post_init__(self) -> None:
        self.constants = {i.name: numpy_helper.to_array(i) for i in self.model.graph.initializer}
        self.kept = {o.name for o in self.model.graph.output}

    def take(self, node: NodeProto) -> None:
        """One node, in floats."""
        if node.op_type == "Constant" and (value := attributes(node).get("value")) is not None:
            self.constants[node.output[0]] = numpy_helper.to_array(value)
            return
        read = {*node.input, *captured(node)}
        if node.op_type in _RULES:
            _RULES[node.op_type](self, node)
        elif node.op_type == "Cast" and node.input[0] in self.sums:
            self.become(node.output[0], node.input[0])
        elif read & self.sums or (read & self.floated and not self._moves(node)):
            raise UnsupportedError(f"{node.op_type} {node.name!r} computes with quantised values")
        else:
            self.floated.update(node.output if read & self.floated else ())
            self.put(node)

    def _moves(self, node: NodeProto) -> bool:
        data = list(node.input) if node.op_type == "Concat" else [node.input[0]]
        return node.op_type in _MOVES and all(name in self.floated for name in data)

    def put(self, node: NodeProto) -> None:
        """Keep a node, reading what its inputs have become."""
        made = NodeProto()
        made.CopyFrom(node)
        made.input[:] = [self.names.get(i, i) for i in node.input]
        rename_captured(made, self.names)
        self.nodes.append(made)
        self.producers.update(dict.fromkeys(node.output, node.op_type))

    def add(self, op: str, inputs: Sequence[str], output: str, **attrs: Any) -> None:
        """A new node."""
        self.put(helper.make_node(op, list(inputs), [output], name=f"{output}/{op}", **attrs))

    def become(self, name: str, other: str) -> None:
        """Make `name` another name of a value."""
        source = self.names.get(other, other)
        if name in self.kept:
            self.add("Identity", [source], name)
        else:
            self.names[name] = source

    def constant(self, name: str, value: Array) -> str:
        """A new constant's name."""
        self.constants[name] = value
        return name

    def scalar(self, name: str) -> float:
        """A constant of one element."""
        if name not in self.constants or self.constants[name].size != 1:
            raise UnsupportedError(f"{name!r} is no single constant")
        return float(self.constants[name].reshape(()))

    def floats(self, name: str, scale: str, zero: str, axis: int = 1) -> str:
        """The float value of a quantised tensor, by name."""
        if name in self.floated:
            return self.names.get(name, name)
        made = f"{name}/{scale}/floats"
        if name in self.constants:
            if made not in self.constants:
                zeros = self.constants[zero] if zero else np.zeros((), np.int64)
                self.constants[made] = _scaled(self.constants[name], self.constants[scale], zeros, axis)
        elif made not in self.producers:
            self.add("DequantizeLinear", [name, scale, *([zero] if zero else [])], made)
        return made

    def leave(self, value: str, output: str, scale: str, zero: str) -> None:
        """`output` was the float `value`, quantised: now it is that value, rectified where the range did it. Without
        a zero point it is that of bytes without a sign."""
        if scale not in self.constants or (zero and zero not in self.constants):
            raise UnsupportedError(f"the scale of {output!r} is computed")
        if output in self.kept:
            self.add("QuantizeLinear", [value, scale, *([zero] if zero else [])], output)
            return
        at = self.constants[zero] if zero else np.zeros((), np.uint8)
        if at.dtype.kind not in "iu":
            raise UnsupportedError(f"{output!r} is quantised to {at.dtype}")
        if self.constants[scale].size == at.size == 1:
            zero_point, limits = int(at.reshape(())), np.iinfo(at.dtype)
            self.ranges[output] = (self.scalar(scale), zero_point)
            if zero_point == limits.min and self.producers.get(value) in _RECTIFIED:
                value = self._rectified(value, (limits.max - limits.min) * self.scalar(scale))
        self.floated.add(output)
        self.names[output] = value

    def _rectified(self, value: str, high: float) -> str:
        made = f"{value}/rectified"
        opset = max(o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx"))
        if made in self.producers:
            return made
        if opset >= 11 and _SIX[0] < high < _SIX[1]:
            ends = [self.constant(f"{made}/{n}", np.array(n, np.float32)) for n in (0, 6)]
            self.add("Clip", [value, *ends], made)
        else:
            self.add("Relu", [value], made)
        return made

    def finish(self) -> ModelProto:
        """The model of the nodes so far, without what nothing reads."""
        made = ModelProto()
        made.CopyFrom(self.model)
        graph = made.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        needed, alive = set(self.kept), list[NodeProto]()
        for node in reversed(self.nodes):
            if needed & set(node.output):
                alive.append(node)
                needed |= {*node.input, *captured(node)}
        graph.node.extend(reversed(alive))
        graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in self.constants.items() if k in needed)
        inputs = [i for i in graph.input if i.name in needed or i.name not in self.constants]
        del graph.input[:]
        graph.input.extend(inputs)
        return made


def _scaled(value: Array, scale: Array, zero: Array, axis: int) -> Array:
    if scale.size > 1:
        if scale.ndim != 1 or value.shape[axis % value.ndim] != scale.size:
            raise UnsupportedError("weights are quantised in blocks")
        shape = [1] * value.ndim
        shape[axis % value.ndim] = -1
        scale = scale.reshape(shape)
        zero = zero.reshape(shape) if zero.size > 1 else zero
    exact = (value.astype(np.int64) - zero.astype(np.int64)).astype(np.float64) * scale.astype(np.float64)
    made: Array = exact.astype(scale.dtype)
    return made


def _name(node: NodeProto, i: int) -> str:
    return node.input[i] if i < len(node.input) else ""


def _quantize(w: _Work, node: NodeProto) -> None:
    value = node.input[0]
    if value in w.floated | w.sums or attributes(node).get("output_dtype", 2) != onnx.TensorProto.UINT8:
        raise UnsupportedError(f"{node.op_type} {node.name!r} computes with quantised values")
    w.leave(w.names.get(value, value), node.output[0], node.input[1], _name(node, 2))


def _dequantize(w: _Work, node: NodeProto) -> None:
    value, scale, zero = (_name(node, i) for i in range(3))
    if attributes(node).get("block_size", 0):
        raise UnsupportedError("weights are quantised in blocks")
    if value in w.constants and scale in w.constants:
        w.become(node.output[0], w.floats(value, scale, zero, int(attributes(node).get("axis", 1))))
    elif value in w.floated:
        w.become(node.output[0], value)
    else:
        w.put(node)


def _product(op: str, axis: int) -> Callable[[_Work, NodeProto], None]:
    """QLinearConv and QLinearMatMul."""

    def rule(w: _Work, node: NodeProto) -> None:
        x, xs, xz, k, ks, kz, ys, yz = node.input[:8]
        inputs = [w.floats(x, xs, xz), w.floats(k, ks, kz, axis)]
        if bias := _name(node, 8):
            scale = w.constants[xs].astype(np.float64) * w.constants[ks].astype(np.float64).reshape(-1)
            floats = w.constants[bias].astype(np.float64) * scale
            inputs.append(w.constant(f"{node.output[0]}/bias", floats.astype(np.float32)))
        made = f"{node.output[0]}/{op}"
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if attrs.pop("channels_last", 0):
            raise UnsupportedError(f"{node.op_type} with the channels last")
        w.add(op, inputs, made, **attrs)
        w.leave(made, node.output[0], ys, yz)

    return rule


def _gemm(w: _Work, node: NodeProto) -> None:
    x, xs, xz, k, ks, kz = node.input[:6]
    attrs = attributes(node)
    axis = 0 if attrs.get("transB", 0) else 1
    inputs = [w.floats(x, xs, xz), w.floats(k, ks, kz, axis)]
    if bias := _name(node, 6):
        scale = attrs.get("alpha", 1.0) * w.constants[xs].astype(np.float64) * w.constants[ks].astype(np.float64)
        floats = w.constants[bias].astype(np.float64) * scale
        inputs.append(w.constant(f"{node.output[0]}/bias", floats.astype(np.float32)))
    if not _name(node, 7):
        w.add("Gemm", inputs, node.output[0], **attrs)
        return
    made = f"{node.output[0]}/Gemm"
    w.add("Gemm", inputs, made, **attrs)
    w.leave(made, node.output[0], node.input[7], _name(node, 8))


def _pointwise(op: str, operands: int) -> Callable[[_Work, NodeProto], None]:
    """Operators of so many quantised operands (tensor, scale, zero point each), then the result's scale and zero."""

    def rule(w: _Work, node: NodeProto) -> None:
        inputs = [w.floats(*node.input[3 * i : 3 * i + 3]) for i in range(operands)]
        made = f"{node.output[0]}/{op}"
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name not in ("opset",)}
        if attrs.pop("channels_last", 0):
            raise UnsupportedError(f"{node.op_type} with the channels last")
        w.add(op, inputs, made, **attrs)
        w.leave(made, node.output[0], _name(node, 3 * operands), _name(node, 3 * operands + 1))

    return rule


def _concat(w: _Work, node: NodeProto) -> None:
    parts = [w.floats(*node.input[i : i + 3]) for i in range(2, len(node.input), 3)]
    made = f"{node.output[0]}/Concat"
    w.add("Concat", parts, made, axis=int(attributes(node)["axis"]))
    w.leave(made, node.output[0], node.input[0], node.input[1])


def _dynamic(w: _Work, node: NodeProto) -> None:
    """The scale found at run time is one now: what multiplies by it later stays right."""
    value, (quantized, *facts) = node.input[0], node.output
    w.floated.add(quantized)
    w.names[quantized] = w.names.get(value, value)
    units: tuple[Array, Array] = np.ones((), np.float32), np.zeros((), np.uint8)
    for name, one in zip(facts, units, strict=False):
        w.constant(name, one)


def _integers(op: str) -> Callable[[_Work, NodeProto], None]:
    """ConvInteger and MatMulInteger: products whose scale is applied by nodes of its own."""

    def rule(w: _Work, node: NodeProto) -> None:
        x, k, zero = node.input[0], node.input[1], _name(node, 3)
        if x not in w.floated or k not in w.constants:
            raise UnsupportedError(f"{node.op_type} {node.name!r} of something else than an activation and a constant")
        zeros = w.constants[zero] if zero else np.zeros((), np.int64)
        ones = np.ones(zeros.size if zeros.size > 1 else (), np.float32)
        weight = w.constant(f"{node.output[0]}/weight", _scaled(w.constants[k], ones, zeros, 0 if op == "Conv" else -1))
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        w.add(op, [w.names.get(x, x), weight], node.output[0], **attrs)
        w.sums.add(node.output[0])

    return rule


_RULES: Mapping[str, Callable[[_Work, NodeProto], None]] = MappingProxyType(
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
        "DynamicQuantizeLinear": _dynamic,
        "ConvInteger": _integers("Conv"),
        "MatMulInteger": _integers("MatMul"),
    }
)
