"""Files that take the same time: what a file computes, but for its names and the values of its weights."""

from __future__ import annotations

import math

from onnx import ModelProto, NodeProto, TensorProto

from hantc.core.types import digest

_SMALL = 8  # numbers: tensors of no more say what to compute (bounds, scales, paddings), except to these
_WEIGHTED = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "PRelu"))
_DATA = frozenset(("Compress", "NonMaxSuppression", "NonZero", "Unique"))  # how much they do hangs on values
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def work_digest(model: ModelProto) -> str:
    """Digest of a file's operations, their settings, shapes and types. Two files that differ in nothing but names and
    the values of floating-point weights (of products and norms, and all of more than `_SMALL` numbers) share it: an
    engine takes as long over one as over the other. A file with functions, subgraphs or operators whose work hangs on
    values has its own."""
    graph = model.graph
    if model.functions or graph.sparse_initializer or any(_own(n) for n in graph.node):
        return digest(model.SerializeToString(deterministic=True).hex())
    weights = {w.name: w for w in graph.initializer}
    telling = {name for n in graph.node if n.op_type not in _WEIGHTED for name in n.input}
    seen: dict[str, int] = {"": -1}  # an input that is left out

    def index(name: str) -> object:
        new = name not in seen
        at = seen.setdefault(name, len(seen))
        return [at, _facts(weights[name], name in telling)] if new and name in weights else at

    rows: list[object] = [[index(v.name), v.type.SerializeToString().hex()] for v in graph.input]
    for node in graph.node:
        settings = sorted((a.name, a.SerializeToString(deterministic=True).hex()) for a in node.attribute)
        used = [index(name) for name in node.input]
        rows.append([node.domain, node.op_type, settings, used, [index(name) for name in node.output]])
    rows += [[index(v.name), v.type.SerializeToString().hex()] for v in graph.output]
    return digest([rows, sorted((o.domain, o.version) for o in model.opset_import)])


def _facts(weight: TensorProto, telling: bool) -> list[object]:
    facts: list[object] = [weight.data_type, list(weight.dims)]
    if weight.data_type in _FLOATS and not (telling and math.prod(weight.dims) <= _SMALL):
        return facts
    unnamed = TensorProto()
    unnamed.CopyFrom(weight)
    unnamed.ClearField("name")
    return [*facts, unnamed.SerializeToString(deterministic=True).hex()]


def _own(node: NodeProto) -> bool:
    return node.op_type in _DATA or any(a.HasField("g") or a.graphs for a in node.attribute)
