"""Shapes as the operators make them, not as the file claims."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx
import onnx.shape_inference
from onnx import GraphProto, ModelProto, TensorShapeProto, ValueInfoProto

from hantc.dialect.opaque import subgraphs

_SMALL = 64  # elements of a weight that may say what shape something has


def light(model: ModelProto) -> ModelProto:
    """The model with its large weights as inputs of their shapes: inference copies a model twice."""
    made = ModelProto(ir_version=model.ir_version)
    made.opset_import.extend(model.opset_import)
    made.functions.extend(model.functions)
    graph, own = made.graph, model.graph
    graph.name = own.name
    graph.node.extend(own.node)
    graph.input.extend(own.input)
    graph.output.extend(own.output)
    graph.value_info.extend(own.value_info)
    inputs = {i.name for i in own.input}
    for weight in own.initializer:
        if weight.data_type and all(d >= 0 for d in weight.dims) and math.prod(weight.dims) <= _SMALL:
            graph.initializer.append(weight)
        elif weight.data_type and weight.name not in inputs:
            graph.input.append(onnx.helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims)))
    return made


def infer(model: ModelProto) -> list[ValueInfoProto]:
    """The graph's inner tensors and outputs with the shapes that follow from the operators and from what the file
    declares; none where inference rejects the model, which may still run."""
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception:  # it raises many types
        return []
    return [*graph.value_info, *graph.output]


def with_inferred(model: ModelProto) -> ModelProto:
    """The model itself, its tensors' shapes filled in where they follow from what is known."""
    _declare(model, {v.name: v for v in infer(light(model))})
    return model


def without_claims(model: ModelProto) -> ModelProto:
    """The model with inner tensors' and outputs' shapes as the operators make them, whatever it declares, as in
    ONNX Runtime. Its declarations count where inference has nothing to say: behind custom operators, and for sizes
    that are computed."""
    bare = light(model)
    _forget(bare.graph)
    found = {v.name: v for v in infer(bare) if _shape(v) is not None}
    declared = [v for v in (*model.graph.value_info, *model.graph.output) if v.type.WhichOneof("value")]
    firsts = [s.dim[0] for i in model.graph.input if (s := _shape(i)) is not None and s.dim]
    batches = any(not d.HasField("dim_value") for d in firsts)
    merged = found | {v.name: _merged(found.get(v.name), v, batches=batches) for v in declared}
    if merged != found:  # what follows from those declarations
        _declare(bare, merged)
        merged = {v.name: _merged(found.get(v.name), v, batches=batches) for v in infer(bare)} or merged
    made = ModelProto()
    made.CopyFrom(model)
    for node in made.graph.node:
        for inner in subgraphs(node):
            _forget(inner)
    del made.graph.value_info[:]
    kept = {o.name: o for o in model.graph.output if o.name not in found or not _excludes(found[o.name], o)}
    _declare(made, merged | kept)
    return made


def _declare(model: ModelProto, values: Mapping[str, ValueInfoProto]) -> None:
    outputs = {o.name for o in model.graph.output}
    others = {v.name: v for v in model.graph.value_info} | dict(values)
    del model.graph.value_info[:]
    model.graph.value_info.extend(v for name, v in others.items() if name not in outputs)
    for out in model.graph.output:
        out.CopyFrom(values.get(out.name, out))


def _shape(value: ValueInfoProto) -> TensorShapeProto | None:
    """The shape of a tensor, where at least its rank is known."""
    known = value.type.WhichOneof("value") == "tensor_type" and value.type.tensor_type.HasField("shape")
    return value.type.tensor_type.shape if known else None


def _excludes(found: ValueInfoProto, declared: ValueInfoProto) -> bool:
    """Whether a tensor cannot have both shapes."""
    one, two = _shape(found), _shape(declared)
    if one is None or two is None:
        return False
    pairs = list(zip(one.dim, two.dim, strict=False))
    fixed = [(a.dim_value, b.dim_value) for a, b in pairs if a.HasField("dim_value") and b.HasField("dim_value")]
    return len(one.dim) != len(two.dim) or any(a != b for a, b in fixed)


def _forget(graph: GraphProto) -> None:
    """Take the declared shapes of inner tensors and outputs away, in subgraphs too."""
    del graph.value_info[:]
    for out in graph.output:
        if out.type.WhichOneof("value") == "tensor_type":
            out.type.tensor_type.ClearField("shape")
    for node in graph.node:
        for inner in subgraphs(node):
            _forget(inner)


def _merged(found: ValueInfoProto | None, declared: ValueInfoProto, *, batches: bool) -> ValueInfoProto:
    """What was found, with sizes that are declared alone; but for the first, where the batch is open (`batches`): files
    that were exported at one batch and opened later still declare that one inside."""
    if found is None:
        return declared
    made = ValueInfoProto()
    made.CopyFrom(found)
    one, two = _shape(made), _shape(declared)
    if one is not None and two is not None and len(one.dim) == len(two.dim):
        for k, (dim, claim) in enumerate(zip(one.dim, two.dim, strict=True)):
            named = dim.HasField("dim_param") and not dim.dim_param.startswith("unk__")  # inference's own names
            stale = k == 0 and batches and claim.HasField("dim_value")
            if not dim.HasField("dim_value") and not named and not stale:
                dim.CopyFrom(claim)
    return made
