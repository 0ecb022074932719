"""The network in floats that a quantised model is taken apart into, while that goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from hantc.core.errors import UnsupportedError
from hantc.dialect.leaf import Array
from hantc.dialect.opaque import captured, rename_captured

_RECTIFIED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Sum", "BatchNormalization"})
_MOVES = frozenset(
    """MaxPool Reshape Transpose Flatten Squeeze Unsqueeze Concat Slice Gather Identity Resize DepthToSpace SpaceToDepth
    Split Expand Tile Upsample""".split()  # noqa: SIM905
)
_SIX = (5.9, 6.05)  # where the upper end of a ReLU6's range lies


@dataclass
class Work:
    """Its nodes so far, and what the given model's tensors have become."""

    model: ModelProto
    constants: dict[str, Array] = field(default_factory=dict)
    nodes: list[NodeProto] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # tensors that became another's value
    floated: set[str] = field(default_factory=set)  # were integers, are floats
    sums: set[str] = field(default_factory=set)  # of products of integers, not scaled yet
    ranges: dict[str, tuple[float, int]] = field(default_factory=dict)
    producers: dict[str, str] = field(default_factory=dict)  # op types
    kept: set[str] = field(default_factory=set)  # names that may not vanish: graph outputs
    ranks: dict[str, int] = field(default_factory=dict)  # of tensors with the channels last
    readers: dict[str, list[NodeProto]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.constants = {i.name: numpy_helper.to_array(i) for i in self.model.graph.initializer}
        self.kept = {o.name for o in self.model.graph.output}
        for node in self.model.graph.node:
            for name in {*node.input, *captured(node)}:
                self.readers.setdefault(name, []).append(node)

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators."""
        return max(int(o.version) for o in self.model.opset_import if o.domain in ("", "ai.onnx"))

    def read(self, name: str) -> list[NodeProto]:
        """The given model's nodes that read a tensor."""
        return self.readers.get(name, [])

    def moves(self, node: NodeProto) -> bool:
        """Whether a node only moves values that were quantised."""
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
        made = f"{name}/{scale}/{zero}/{axis}/floats"
        if name in self.constants:
            if made not in self.constants:
                zeros = self.constants[zero] if zero else np.zeros((), np.int64)
                self.constants[made] = scaled(self.constants[name], self.constants[scale], zeros, axis)
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
        if made in self.producers:
            return made
        if self.opset >= 11 and _SIX[0] < high < _SIX[1]:
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


def scaled(value: Array, scale: Array, zero: Array, axis: int) -> Array:
    """Quantised constants in floats; scales of more than one element lie along `axis`."""
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
