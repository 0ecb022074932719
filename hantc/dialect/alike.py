"""Files that take the same time: what a file computes, but for its names and the values of its weights."""

from __future__ import annotations

from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from hantc.core.types import digest

_SMALL = 8  # numbers: tensors of no more say what to compute (bounds, scales, paddings), except to these
_WEIGHTED = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "PRelu"))
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def work_digest(model: ModelProto) -> str:
    """Digest of a file's operations, their settings, shapes and types. Two files that differ in nothing but names and
    the values of floating-point weights (of products and norms, and all of more than `_SMALL` numbers) share it: an
    engine takes as long over one as over the other. A file with functions or subgraphs has its own."""
    graph = model.graph
    if model.functions or graph.sparse_initializer or any(_has_graph(n) for n in graph.node):
        return digest(model.SerializeToString().hex())
    weights = {w.name: w for w in graph.initializer}
    seen: dict[str, int] = {"": -1}  # an input that is left out

    def index(name: str, user: str = "") -> object:
        new = name not in seen
        at = seen.setdefault(name, len(seen))
        return [at, _facts(weights[name], user)] if new and name in weights else at

    rows: list[object] = [[index(v.name), v.type.SerializeToString().hex()] for v in graph.input]
    for node in graph.node:
        settings = sorted((a.name, a.SerializeToString(deterministic=True).hex()) for a in node.attribute)
        used = [index(name, node.op_type) for name in node.input]
        rows.append([node.domain, node.op_type, settings, used, [index(name) for name in node.output]])
    rows += [[index(v.name), v.type.SerializeToString().hex()] for v in graph.output]
    return digest([rows, sorted((o.domain, o.version) for o in model.opset_import)])


def _facts(weight: TensorProto, user: str) -> list[object]:
    value = numpy_helper.to_array(weight)
    told = weight.data_type not in _FLOATS or (value.size <= _SMALL and user not in _WEIGHTED)
    return [weight.data_type, list(weight.dims), value.tobytes().hex() if told else ""]


def _has_graph(node: NodeProto) -> bool:
    return any(a.HasField("g") or a.graphs for a in node.attribute)
