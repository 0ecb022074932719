"""Graph edits around onnxruntime's quantiser: what to quantise, and where Q/DQ belong. All work in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

Array = np.ndarray[Any, Any]

# Quantised wherever named: the products, for which INT8 pays.
PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
# Quantised where an input is quantised already, so that a chain of INT8 nodes is not broken; ONNX Runtime's CPU
# provider has an INT8 kernel for each, or moves the bytes as they are.
FOLLOWERS = frozenset(
    {
        "Add", "Mul", "Concat", "Relu", "Clip", "LeakyRelu", "Sigmoid", "MaxPool", "AveragePool",
        "GlobalAveragePool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad",
    }
)  # fmt: skip
# The same for engines that compute activations in the kernel of the product before them: these round nothing then, and
# neither does a mean, whose few values are cheap in floats. Concat: ONNX Runtime makes a form of it that refuses FP16.
FUSED_FOLLOWERS = FOLLOWERS - {"Mul", "Sigmoid", "GlobalAveragePool", "Concat"}
# What has INT8 kernels that give floats: in ONNX Runtime, and in engines that compute sums and activations so
WITH_FLOAT_RESULT = frozenset({"Gemm", "MatMul"})
FUSED_WITH_FLOAT_RESULT = PRODUCTS | {"Add", "Relu", "Clip", "LeakyRelu"}
# forms of a Constant node that hold numbers; None: as a tensor
_CONSTANTS: dict[str, Any] = {
    **{"value": None, "value_float": np.float32, "value_floats": np.float32},
    **{"value_int": np.int64, "value_ints": np.int64},
}
# Followers that onnxruntime's quantiser drops: the limits of the uint8 range do their work.
ABSORBED = frozenset({"Relu", "Clip"})
_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu"})


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the default operator domain; 0 if the model imports none."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every unnamed node a unique name: the quantiser selects by name."""
    used = {n.name for n in graph.node}
    for k, node in enumerate(graph.node):
        if not node.name:
            name = f"{node.op_type}_{k}"
            while name in used:
                name += "_"
            used.add(name)
            node.name = name


def lift_constants(graph: onnx.GraphProto) -> None:
    """Turn Constant nodes into initializers: the quantiser, and the converter to FP16, see weights only there."""
    lifted = set()
    for k, node in enumerate(graph.node):
        if node.op_type != "Constant" or node.attribute[0].name not in _CONSTANTS:
            continue
        value = onnx.helper.get_attribute_value(node.attribute[0])
        dtype = _CONSTANTS[node.attribute[0].name]
        tensor = graph.initializer.add()
        tensor.CopyFrom(value if dtype is None else numpy_helper.from_array(np.asarray(value, dtype)))
        tensor.name = node.output[0]
        lifted.add(k)
    _drop(graph, lifted)


def pool_means(model: onnx.ModelProto) -> None:
    """Rewrite ReduceMean over all spatial dims as the same GlobalAveragePool. From opset 18 on, ONNX Runtime
    has no INT8 form of the former; with it EfficientNet-B0 is a tenth faster. Needs inferred types."""
    graph = model.graph
    constants = {i.name: i for i in graph.initializer}
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in [*graph.input, *graph.value_info]}
    for node in graph.node:
        rank = ranks.get(node.input[0], 0) if node.op_type == "ReduceMean" else 0
        if rank < 3:
            continue
        attributes = {a.name: a for a in node.attribute}
        if "keepdims" in attributes and attributes["keepdims"].i == 0:
            continue
        if len(node.input) > 1 and node.input[1] in constants:
            axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
        else:
            axes = list(attributes["axes"].ints) if "axes" in attributes else []
        if sorted(a % rank for a in axes) == list(range(2, rank)):
            node.op_type = "GlobalAveragePool"
            del node.input[1:]
            del node.attribute[:]


def select_nodes(model: onnx.ModelProto, names: set[str] | None, followers: Collection[str] = FOLLOWERS) -> list[str]:
    """Names of the nodes to quantise, in graph order, out of `names` (None: all).

    Products of float32 tensors whose weight is a constant (for MatMul: of any), and followers with a quantised
    input, except: an Add of a constant behind a MatMul, which would cost the MatMul its float result and the bias its
    precision; and a Clip whose interval leaves out zero, which no uint8 range can stand for.
    """
    graph = model.graph
    constants = {i.name: i for i in graph.initializer}
    makers = {o: n for n in graph.node for o in n.output}
    values = [*graph.input, *graph.value_info, *graph.output]
    floats = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats |= {i.name for i in graph.initializer if i.data_type == TensorProto.FLOAT}
    quantised: set[str] = set()
    selected = []
    for node in graph.node:
        if node.domain not in ("", "ai.onnx") or (names is not None and node.name not in names):
            continue
        if node.op_type in PRODUCTS:
            ok = {*node.input[:2], *node.output} <= floats and (node.op_type == "MatMul" or node.input[1] in constants)
        elif node.op_type in followers:
            ok = any(i in quantised for i in node.input) and set(node.output) <= floats
            ok = ok and _worth_following(node, constants, makers)
        else:
            ok = False
        if ok:
            selected.append(node.name)
            quantised.update(node.output)
    return selected


def _worth_following(node: NodeProto, constants: dict[str, TensorProto], makers: dict[str, NodeProto]) -> bool:
    if node.op_type in ("Add", "Mul") and any(i in constants for i in node.input):
        return not any(i in makers and makers[i].op_type == "MatMul" for i in node.input)
    if node.op_type == "Clip":
        limits = [numpy_helper.to_array(constants[i]) if i in constants else None for i in node.input[1:] if i]
        if any(limit is None for limit in limits):
            return False
        low = limits[0] if len(node.input) > 1 and node.input[1] else None
        high = limits[-1] if len(node.input) > 2 and node.input[2] else None
        return (low is None or float(low) <= 0) and (high is None or float(high) >= 0)
    return True


def unshare_initializers(graph: onnx.GraphProto, selected: set[str]) -> None:
    """Give quantised nodes their own copy of a float constant that float nodes read too: the quantiser would
    hand the rounded one to both."""
    shared = {i for n in graph.node if n.name not in selected for i in n.input}
    shared |= {o.name for o in graph.output}
    constants = {i.name: i for i in graph.initializer if i.data_type == TensorProto.FLOAT and i.name in shared}
    copies: dict[str, str] = {}
    for node in graph.node:
        if node.name not in selected:
            continue
        for k, name in enumerate(node.input):
            if name not in constants:
                continue
            if name not in copies:
                copies[name] = f"{name}_for_int8"
                tensor = graph.initializer.add()
                tensor.CopyFrom(constants[name])
                tensor.name = copies[name]
            node.input[k] = copies[name]


def infer_types(model: onnx.ModelProto) -> None:
    """Note the type of every tensor in value_info, which the quantiser needs.

    Weights are replaced by their shapes while ONNX infers: it copies the whole model twice.
    """
    light = onnx.ModelProto()
    light.CopyFrom(model)
    for tensor in light.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            light.graph.input.append(value)
    others = [t for t in light.graph.initializer if t.data_type != TensorProto.FLOAT]
    del light.graph.initializer[:]
    light.graph.initializer.extend(others)
    inferred = onnx.shape_inference.infer_shapes(light)
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred.graph.value_info)


def fold_quantised_constants(graph: onnx.GraphProto) -> None:
    """Replace QuantizeLinear of a constant by the int8 or uint8 constant."""
    constants = {i.name: i for i in graph.initializer}
    folded = set()
    for k, node in enumerate(graph.node):
        if node.op_type != "QuantizeLinear" or node.input[0] not in constants:
            continue
        value, scale, zero = (numpy_helper.to_array(constants[i]) for i in node.input)
        if scale.ndim:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            along = [1] * value.ndim
            along[axis] = -1
            scale, zero = scale.reshape(along), zero.reshape(along)
        limits = np.iinfo(zero.dtype)
        rounded = np.round(value / scale) + zero.astype(np.float32)
        small = np.clip(rounded, limits.min, limits.max).astype(zero.dtype)
        graph.initializer.append(numpy_helper.from_array(small, node.output[0]))
        folded.add(k)
    _drop(graph, folded)
    drop_unread(graph)


def drop_unread(graph: onnx.GraphProto) -> None:
    """Remove the initializers that nothing reads."""
    read = _read_in(graph)
    kept = [i for i in graph.initializer if i.name in read]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)


def tidy_borders(
    graph: onnx.GraphProto,
    selected: set[str],
    absorbed: set[str],
    with_float_result: Collection[str] = WITH_FLOAT_RESULT,
) -> None:
    """Leave Q/DQ only where they are needed.

    A float tensor that both float and quantised nodes read: float nodes get it unrounded. What a node of the types
    `with_float_result` makes and only float nodes read: no Q/DQ, the INT8 kernels give floats. `absorbed`: outputs of
    the activations that the quantiser dropped, whose Q/DQ do the clipping and must stay.
    """
    makers, readers, outputs = _wires(graph)
    dead: set[str] = set()
    for q in [n for n in graph.node if n.op_type == "QuantizeLinear"]:
        pair = readers[q.output[0]]
        if len(pair) != 1 or pair[0].op_type != "DequantizeLinear":
            continue
        source, dequantised, maker = q.input[0], pair[0].output[0], makers.get(q.input[0])
        in_int8 = [n for n in readers[dequantised] if n.name in selected or n.op_type in _QDQ]
        in_float = [n for n in readers[dequantised] if not (n.name in selected or n.op_type in _QDQ)]
        if maker is None or maker.name not in selected:
            if dequantised in outputs and maker is not None:
                # the quantiser renamed the maker's output; the graph output gets it back, unrounded
                _rename(maker.output, source, dequantised)
                q.input[0], pair[0].output[0] = dequantised, f"{dequantised}_DequantizeLinear_Output"
                for node in in_int8:
                    _rename(node.input, dequantised, pair[0].output[0])
            else:
                for node in in_float:
                    _rename(node.input, dequantised, source)
        elif maker.op_type in with_float_result and not in_int8 and not {source, dequantised} & absorbed:
            if dequantised in outputs:
                _rename(maker.output, source, dequantised)
            for node in in_float:
                _rename(node.input, dequantised, source)
            dead |= {q.output[0], dequantised}
    _drop(graph, {k for k, n in enumerate(graph.node) if n.op_type in _QDQ and n.output[0] in dead})


def fuse_behind_products(graph: onnx.GraphProto) -> None:
    """Drop the rounding between a product and what engines compute in its kernel: an activation that alone reads it,
    or a sum with something else that is rounded, and the activation behind that sum."""
    makers, readers, outputs = _wires(graph)
    dead: set[str] = set()

    def unrounded(node: NodeProto, place: int, before: Collection[str]) -> bool:
        """Whether `node` now reads at `place` what one of the kinds `before` makes for it alone, as it is made."""
        dq = makers.get(node.input[place])
        q = makers.get(dq.input[0]) if dq is not None and dq.op_type == "DequantizeLinear" else None
        maker = makers.get(q.input[0]) if q is not None and q.op_type == "QuantizeLinear" else None
        if dq is None or q is None or maker is None or maker.op_type not in before:
            return False
        way = (q.input[0], q.output[0], dq.output[0])
        if outputs & set(way) or any(len(readers[t]) > 1 for t in way):
            return False
        dead.update(way[1:])
        node.input[place] = way[0]
        return True

    for node in graph.node:
        if node.op_type in _ACTIVATIONS:
            unrounded(node, 0, (*PRODUCTS, "Add"))
        elif node.op_type == "Add":
            any(unrounded(node, place, PRODUCTS) for place in range(2))  # one of them: the other stays rounded
    _drop(graph, {k for k, n in enumerate(graph.node) if n.op_type in _QDQ and n.output[0] in dead})


def restore_header(model: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Put back producer, metadata, opsets and the tensor types that still hold."""
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    del model.metadata_props[:]
    model.metadata_props.extend(original.metadata_props)
    del model.opset_import[:]
    model.opset_import.extend(original.opset_import)
    made = {o for n in model.graph.node for o in n.output}
    del model.graph.value_info[:]
    model.graph.value_info.extend(v for v in original.graph.value_info if v.name in made)


def _wires(graph: onnx.GraphProto) -> tuple[dict[str, NodeProto], dict[str, list[NodeProto]], set[str]]:
    """Who makes each tensor, who reads it, and the graph's outputs."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for i in node.input:
            readers[i].append(node)
    return {o: n for n in graph.node for o in n.output}, readers, {o.name for o in graph.output}


def _read_in(graph: onnx.GraphProto) -> set[str]:
    """Names that nodes read, those of subgraphs among them, and the outputs."""
    found = {i for n in graph.node for i in n.input} | {o.name for o in graph.output}
    for inner in (a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH):
        found |= _read_in(inner)
    return found


def _drop(graph: onnx.GraphProto, positions: set[int]) -> None:
    """Remove nodes by position (protobuf's own remove compares every node's content)."""
    if positions:
        kept = [n for k, n in enumerate(graph.node) if k not in positions]
        del graph.node[:]
        graph.node.extend(kept)


def _rename(names: Any, old: str, new: str) -> None:
    """Replace `old` by `new` in a node's repeated field of tensor names."""
    for k, name in enumerate(names):
        if name == old:
            names[k] = new
