"""Several copies of a small model in one, so that its latency can be told from a session's overhead."""

from __future__ import annotations

from onnx import ModelProto, NodeProto, ValueInfoProto


def _copy_node(node: NodeProto, rename: dict[str, str], prefix: str) -> NodeProto:
    made = NodeProto()
    made.CopyFrom(node)
    made.name = prefix + node.name
    made.input[:] = [rename.get(i, prefix + i) if i else "" for i in node.input]
    made.output[:] = [rename.get(o, prefix + o) if o else "" for o in node.output]
    return made


def replicate(model: ModelProto, copies: int, *, chain: bool) -> ModelProto:
    """`copies` of a one-input one-output model: in a chain (output feeds the next input; shapes must agree)
    or side by side on one input, each with an output of its own. Weights are copied too, so that caches
    see as much memory as in a real network."""
    x, y = model.graph.input[0].name, model.graph.output[0].name
    made = ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:], made.graph.initializer[:], made.graph.output[:], made.graph.value_info[:]
    source = x
    for i in range(copies):
        prefix = f"c{i}_"
        rename = {x: source, y: prefix + y}
        made.graph.node.extend(_copy_node(n, rename, prefix) for n in model.graph.node)
        for tensor in model.graph.initializer:
            copy = made.graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = prefix + tensor.name
        if chain:
            source = prefix + y
        if not chain or i == copies - 1:
            out = ValueInfoProto()
            out.CopyFrom(model.graph.output[0])
            out.name = prefix + y
            made.graph.output.append(out)
    return made
