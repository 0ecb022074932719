"""Anchors: depthwise 1×1 convolutions of ones that put a tensor into the layout that an engine computes in.

ONNX Runtime on x86 keeps activations in blocks of 8 or 16 channels between convolutions and pools, and sums and
concatenates them in that layout, if every operand has it. One operand that lacks it (it comes out of INT8, or of a
Pad) costs far more than its own change of layout: the sum is computed in the plain one, is not merged into the
convolution before it, and all further sums of a residual stream, and concatenations of a dense block, go the same way.
Behind an anchor the operand has the layout. On students of ResNet-56 with INT8 regions two or three of them took 7 to
10 % off the latency.

A MaxPool before a QuantizeLinear is held apart from it likewise: ONNX Runtime swaps the two, and its pool of bytes in
the plain layout takes thirty times the blocked one of floats (a seventh of a DenseNet-121 with an INT8 block there).

Multiplying finite numbers by one is exact.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

_HELD = frozenset({"Relu", "Sigmoid", "Tanh", "Clip", "LeakyRelu", "HardSigmoid", "Elu", "BatchNormalization"})
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_JOINS = frozenset({"Add", "Sum", "Concat"})
_DOMAINS = ("", "ai.onnx")
_RANK = 4


def anchored(model: ModelProto, block: int) -> tuple[ModelProto, tuple[str, ...]]:
    """The model with anchors where they pay, for an engine with blocks of so many channels, and the names of the
    tensors that got one. The model itself is not changed; without such a tensor it is returned as it is."""
    flow = _Flow(model, block)
    for node in flow.nodes:
        flow.visit(node)
    if not flow.wanted:
        return model, ()
    made = ModelProto()
    made.CopyFrom(model)
    nodes, names = list(made.graph.node), _names(made.graph)
    del made.graph.node[:]
    behind: dict[str, str] = {}
    for node in nodes:
        for k, name in enumerate(node.input):
            if name in behind and (node.op_type == "QuantizeLinear" or flow.wanted[name]):
                node.input[k] = behind[name]
        made.graph.node.append(node)
        for output in node.output:
            if output in flow.wanted:
                label = _unused(f"anchor_{len(behind)}", names)
                anchor, weight = _anchor(output, label, flow.shapes[output][1])
                made.graph.node.append(anchor)
                made.graph.initializer.append(weight)
                behind[output] = anchor.output[0]
    return made, tuple(behind)


class _Flow:
    """Which tensors an engine holds in blocks, found from front to back, and which it should."""

    def __init__(self, model: ModelProto, block: int) -> None:
        self.nodes, self.block = list(model.graph.node), block
        self.constants = {i.name for i in model.graph.initializer}
        self.outputs = {o.name for o in model.graph.output}
        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = [*inferred.input, *inferred.value_info, *inferred.output]
        # the batch may be free: 0 there
        self.shapes = {
            v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
            for v in values
            if v.type.tensor_type.elem_type == TensorProto.FLOAT
        }
        self.maker = {o: n for n in self.nodes for o in n.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for n in self.nodes:
            for i in n.input:
                self.readers[i].append(n)
        self.blocked: set[str] = set()
        self.wanted: dict[str, bool] = {}  # tensor: whether for all who read it, not for a QuantizeLinear alone

    def visit(self, node: NodeProto) -> None:
        """Note whether the node's output is held in blocks, or will be behind an anchor."""
        if not node.input or not node.output or node.domain not in _DOMAINS:
            return
        out, kind = node.output[0], node.op_type
        if kind == "Conv" or kind in _POOLS:
            if self._fits(out) and not self._rounded(node):
                self.blocked.add(out)
        elif kind in _HELD:
            if node.input[0] in self.blocked:
                self.blocked.add(out)
        elif kind in _JOINS:
            self._join(node)
        elif kind == "QuantizeLinear":
            pool = self.maker.get(node.input[0])
            if pool is not None and pool.op_type == "MaxPool" and node.input[0] in self.blocked:
                self.wanted.setdefault(node.input[0], False)

    def _join(self, node: NodeProto) -> None:
        out, operands = node.output[0], list(dict.fromkeys(node.input))
        if any(not self._fits(i) or i in self.constants for i in operands):
            return
        if node.op_type == "Concat" and helper.get_node_attr_value(node, "axis") not in (1, 1 - _RANK):
            return
        if node.op_type != "Concat" and len({self.shapes[i][1:] for i in operands}) > 1:
            return
        loose = [i for i in operands if i not in self.blocked]
        if loose and (len(loose) == len(operands) or not self._goes_on(out)):
            return
        for i in loose:
            self.wanted[i] = True
        self.blocked.update(operands, (out,))

    def _goes_on(self, name: str) -> bool:
        """Whether what is made of the tensor in floats is used in blocks again: else an anchor only moves the change
        of layout to the other side of the sum."""
        return any(self._blocks(r, name) for r in self.readers[name])

    def _blocks(self, reader: NodeProto, name: str) -> bool:
        if reader.domain not in _DOMAINS:
            return False
        if reader.op_type in _HELD:
            return self._goes_on(reader.output[0])
        if reader.op_type == "Conv":
            return str(reader.input[0]) == name
        return reader.op_type in _JOINS or reader.op_type in _POOLS

    def _fits(self, name: str) -> bool:
        shape = self.shapes.get(name, ())
        return len(shape) == _RANK and shape[1] > 0 and shape[1] % self.block == 0 and min(shape[2:]) > 0

    def _rounded(self, node: NodeProto) -> bool:
        """Whether the node runs in INT8: its input comes out of it, and its output goes there."""
        source, out = self.maker.get(node.input[0]), node.output[0]
        readers = self.readers[out]
        comes = source is not None and source.op_type == "DequantizeLinear"
        return comes and out not in self.outputs and all(r.op_type == "QuantizeLinear" for r in readers)


def _anchor(name: str, label: str, channels: int) -> tuple[NodeProto, TensorProto]:
    weight = numpy_helper.from_array(np.ones((channels, 1, 1, 1), np.float32), f"{label}.weight")
    node = helper.make_node(
        "Conv", [name, weight.name], [f"{label}.out"], name=label, kernel_shape=[1, 1], group=channels
    )
    return node, weight


def _names(graph: GraphProto) -> set[str]:
    """Every name in a graph and the graphs within: of nodes, tensors and weights."""
    values = (*graph.input, *graph.output, *graph.initializer, *graph.value_info)
    found = {v.name for v in values} | {i.values.name for i in graph.sparse_initializer}
    for node in graph.node:
        found.update((node.name, *node.input, *node.output))
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                found |= _names(inner)
    return found


def _unused(label: str, names: set[str]) -> str:
    """`label`, or one like it, of which neither it nor what is called after it is among `names`, which it joins."""
    while names & {label, f"{label}.out", f"{label}.weight"}:
        label += "_"
    names.update((label, f"{label}.out", f"{label}.weight"))
    return label
