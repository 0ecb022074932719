"""FP16 form of an ONNX model for engines that take precision from the file (TensorRT's strongly typed networks).

Inputs and outputs stay float32, with a Cast behind and before them. What would overflow stays float32 inside:
`overflowing` finds it on real activations. Importing this module does not import onnxruntime.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from hantc.core.backend_api import Feeds
from hantc.core.errors import HantcError
from hantc.dialect import qdq_graph as edit

LARGEST = 65504.0  # of FP16
HEADROOM = 4.0  # values seen on some images are this far below it at least: others may be larger


def to_fp16(model: onnx.ModelProto, *, keep: Collection[str] = ()) -> onnx.ModelProto:
    """The model with every float32 weight and value in FP16, but for the nodes named in `keep`, which get Casts
    around them; float32 at its inputs and outputs. `model` is not changed. HantcError if it cannot be converted."""
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    work = onnx.ModelProto()
    work.CopyFrom(model)
    edit.name_nodes(work.graph)
    del work.graph.value_info[:]  # inferred anew: files may declare other types than their nodes make
    try:
        half = convert_float_to_float16(work, keep_io_types=True, op_block_list=[], node_block_list=sorted(keep))
    except Exception as e:  # the converter's own errors share no base class
        raise HantcError(f"the model cannot be converted to FP16: {type(e).__name__}: {e}") from e
    del half.graph.value_info[:]
    _drop_twins(half.graph)
    _join_kept(half.graph)
    ONNXModel(half).topological_sort()  # its Casts stand at the end
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
    """Between two kept nodes the converter goes down to FP16 and up again, which is where the values overflow: read
    the float32 value itself. In place."""
    casts = {n.output[0]: (n, n.attribute[0].i) for n in graph.node if n.op_type == "Cast"}
    direct: dict[str, str] = {}
    for out, (node, to) in casts.items():
        below = casts.get(node.input[0])
        # by name: a Cast of the model's own rounds on purpose
        if to != TensorProto.FLOAT or below is None or not node.name.endswith("_cast_to_fp32_node"):
            continue
        if below[0].name.endswith("_cast_to_fp16_node") or below[0].name.startswith("graph_input_cast"):
            direct[out] = below[0].input[0]
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in direct:
                node.input[i] = direct[name]
    used = {i for n in graph.node for i in n.input} | {o.name for o in graph.output}
    while idle := [n for n in graph.node if n.op_type == "Cast" and n.output[0] not in used]:
        for node in idle:
            graph.node.remove(node)
        used = {i for n in graph.node for i in n.input} | {o.name for o in graph.output}


def overflowing(model: onnx.ModelProto, feeds: Sequence[Feeds]) -> tuple[str, ...]:
    """Names of the nodes of `model` (float32, named nodes) that read or make values beyond LARGEST / HEADROOM on
    `feeds`: what FP16 could not hold. HantcError if the model does not run on them."""
    from hantc.dialect import qdq_ort

    work = onnx.shape_inference.infer_shapes(model)
    edit.name_nodes(work.graph)
    names = [n.name for n in work.graph.node]
    ranges = qdq_ort.calibrated_ranges(work, names, feeds, "minmax")
    large = {t for t, (low, high) in ranges.items() if max(abs(float(low)), abs(float(high))) > LARGEST / HEADROOM}
    constants = {i.name: i for i in work.graph.initializer}

    def touches(node: NodeProto) -> bool:
        if any(t in large for t in [*node.input, *node.output]):
            return True
        weights = (constants[i] for i in node.input if i in constants and constants[i].data_type == TensorProto.FLOAT)
        return any(np.abs(onnx.numpy_helper.to_array(w)).max(initial=0) > LARGEST / HEADROOM for w in weights)

    return tuple(n.name for n in work.graph.node if touches(n))
