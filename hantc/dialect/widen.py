"""Models in half precision as the same in FP32: what CPUs compute fast, and what training needs.

FP16 files are made for GPUs; on a CPU an engine casts to FP32 and back around most operators. Every number of such a
file is one of FP32's, so that what is computed stays the same but for rounding, which becomes finer.
"""

from __future__ import annotations

import itertools

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from hantc.dialect.opaque import inner_names, subgraphs

_HALF, _FULL = TensorProto.FLOAT16, TensorProto.FLOAT
_TYPES = frozenset({"to", "dtype", "output_dtype"})  # attributes that name an element type


def is_half(model: ModelProto) -> bool:
    """Whether any weight is in FP16."""
    graph = model.graph
    held = [*graph.initializer, *(a.t for n in graph.node for a in n.attribute if a.HasField("t"))]
    return any(t.data_type == _HALF and np.prod(t.dims) > 1 for t in held)


def widened(model: ModelProto) -> ModelProto:
    """The same in FP32; inputs and outputs keep their types."""
    made = ModelProto()
    made.CopyFrom(model)
    names = {n for node in model.graph.node for n in (*node.input, *node.output, *inner_names(node))}
    names |= {v.name for v in (*model.graph.input, *model.graph.output)}
    _widen(made.graph)
    held = {i.name for i in made.graph.initializer}
    before, behind = list[NodeProto](), list[NodeProto]()
    for value in made.graph.input:
        if value.type.tensor_type.elem_type == _HALF and value.name not in held:
            inner = _fresh(names, value.name)
            before.append(helper.make_node("Cast", [value.name], [inner], name=inner, to=_FULL))
            _rename(made.graph, value.name, inner)
        elif value.type.tensor_type.elem_type == _HALF:
            value.type.tensor_type.elem_type = _FULL
    for value in made.graph.output:
        if value.type.tensor_type.elem_type == _HALF:
            inner = _fresh(names, value.name)
            _rename(made.graph, value.name, inner)
            behind.append(helper.make_node("Cast", [inner], [value.name], name=f"{inner}/cast", to=_HALF))
    nodes = [*before, *made.graph.node, *behind]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made


def _fresh(names: set[str], stem: str) -> str:
    name = next(n for i in itertools.count() if (n := f"{stem}/float_{i}") not in names)
    names.add(name)
    return name


def _widen(graph: GraphProto) -> None:
    """Weights, constants and named types of a graph and those within it; declared types of values go."""
    for tensor in graph.initializer:
        _full(tensor)
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _full(attribute.t)
            if attribute.name in _TYPES and attribute.i == _HALF:
                attribute.i = _FULL
        for inner in subgraphs(node):
            _widen(inner)
            for value in (*inner.input, *inner.output):
                if value.type.tensor_type.elem_type == _HALF:
                    value.type.tensor_type.elem_type = _FULL


def _full(tensor: TensorProto) -> None:
    if tensor.data_type == _HALF:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def _rename(graph: GraphProto, old: str, new: str) -> None:
    """What a tensor of the graph is called, wherever it is made or read; its inputs and outputs keep their names."""
    for node in graph.node:
        for names in (node.input, node.output):
            for k, name in enumerate(names):
                if name == old:
                    names[k] = new
        for inner in subgraphs(node):
            if old not in {v.name for v in inner.input}:
                _rename(inner, old, new)
                for value in inner.output:
                    if value.name == old:
                        value.name = new
