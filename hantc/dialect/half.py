"""FP16 form of an ONNX model for engines that take precision from the file (TensorRT's strongly typed networks).

Inputs and outputs stay float32, with a Cast behind and before them. What would overflow stays float32 inside:
`overflowing` finds it on real activations. Importing this module does not import onnxruntime.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from hantc.core.backend_api import Feeds
from hantc.core.errors import ModelError
from hantc.dialect import qdq_graph as edit

LARGEST = 65504.0  # of FP16
_NO_FP16 = ("EyeLike", "Range", "NonMaxSuppression")
_SCALES_IN_FP16 = 19  # first opset in which Quantize/DequantizeLinear take them
HEADROOM = 4.0  # values seen on some images are this far below it at least: others may be larger


def to_fp16(model: onnx.ModelProto, *, keep: Collection[str] = ()) -> onnx.ModelProto:
    """The model with every float32 weight and value in FP16, but for operators that have no FP16 form and the nodes
    named in `keep`, which get Casts around them; float32 at its inputs and outputs. `model` is not changed. ModelError
    if it cannot be converted."""
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    work = onnx.ModelProto()
    work.CopyFrom(model)
    edit.name_nodes(work.graph)
    edit.lift_constants(work.graph)  # the converter changes weights alone
    del work.graph.value_info[:]  # inferred anew: files may declare other types than their nodes make
    blocked = [*DEFAULT_OP_BLOCK_LIST, *_NO_FP16]
    rounded = any(n.op_type in ("QuantizeLinear", "DequantizeLinear") for n in work.graph.node)
    try:
        if rounded and edit.opset_of(work) < _SCALES_IN_FP16:
            work = onnx.version_converter.convert_version(work, _SCALES_IN_FP16)
        half = convert_float_to_float16(work, keep_io_types=True, op_block_list=blocked, node_block_list=sorted(keep))
        del half.graph.value_info[:]
        _drop_twins(half.graph)
        _join_kept(half.graph)
        ONNXModel(half).topological_sort()  # its Casts stand at the end
        onnx.checker.check_model(half, full_check=True)
    except Exception as e:  # the converter's own errors share no base class
        reason = (str(e).strip().splitlines() or [""])[0]
        raise ModelError(f"the model cannot be converted to FP16: {type(e).__name__}: {reason}") from e
    made: onnx.ModelProto = half
    return made


def _drop_twins(graph: onnx.GraphProto) -> None:
    """A value that several kept nodes read gets as many Casts from the converter, all of one name. In place."""
    seen: set[tuple[str, ...]] = set()
    for node in list(graph.node):
        if node.op_type == "Cast":
            what = (*node.input, *node.output)
            if what in seen:
                graph.node.remove(node)
            seen.add(what)


def _join_kept(graph: onnx.GraphProto) -> None:
    """Between two kept nodes, and between one and the output, the converter goes down to FP16 and up again, which is
    where the values overflow: read the float32 value itself. In place."""
    casts = {n.output[0]: (n, next(a.i for a in n.attribute if a.name == "to")) for n in graph.node if _is_cast(n)}
    for node, to in casts.values():
        below = casts.get(node.input[0])
        # by name: a Cast of the model's own rounds on purpose
        if to != TensorProto.FLOAT or below is None or not _made_by_converter(node) or not _made_by_converter(below[0]):
            continue
        node.input[0] = below[0].input[0]  # from float32 to float32: nothing
    used = {i for n in graph.node for i in n.input} | {o.name for o in graph.output}
    while idle := [n for n in graph.node if _is_cast(n) and _made_by_converter(n) and n.output[0] not in used]:
        for node in idle:
            graph.node.remove(node)
        used = {i for n in graph.node for i in n.input} | {o.name for o in graph.output}


def _is_cast(node: NodeProto) -> bool:
    return node.op_type == "Cast"


def _made_by_converter(node: NodeProto) -> bool:
    ends, begins = ("_cast_to_fp32_node", "_cast_to_fp16_node"), ("graph_input_cast", "graph_output_cast")
    return node.name.endswith(ends) or node.name.startswith(begins)


def overflowing(model: onnx.ModelProto, feeds: Sequence[Feeds]) -> tuple[str, ...]:
    """Names of the nodes of `model` (of unnamed ones those that `to_fp16` gives them) that read or make finite values
    beyond LARGEST / HEADROOM on `feeds`, or have such weights: what FP16 could not hold. Without feeds the weights
    alone are looked at. HantcError if the model does not run on them."""
    from hantc.dialect import qdq_ort

    work = onnx.shape_inference.infer_shapes(model)
    edit.name_nodes(work.graph)
    edit.lift_constants(work.graph)
    names = [n.name for n in work.graph.node]
    ranges = qdq_ort.calibrated_ranges(work, names, feeds, "minmax", check=False) if feeds else {}
    large = {t for t, ends in ranges.items() if any(_too_large(float(end)) for end in ends)}
    constants = {i.name: i for i in work.graph.initializer}

    def touches(node: NodeProto) -> bool:
        if any(t in large for t in [*node.input, *node.output]):
            return True
        weights = (constants[i] for i in node.input if i in constants and constants[i].data_type == TensorProto.FLOAT)
        return any(_too_large(float(np.abs(onnx.numpy_helper.to_array(w)).max(initial=0))) for w in weights)

    return tuple(n.name for n in work.graph.node if touches(n))


def _too_large(value: float) -> bool:
    return math.isfinite(value) and abs(value) > LARGEST / HEADROOM  # FP16 has infinities of its own: masks are made so
