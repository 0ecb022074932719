"""Small models put together, so that one's latency can be told from a session's overhead and from its borders'."""

from __future__ import annotations

from onnx import ModelProto, NodeProto


def replicate(
    model: ModelProto, copies: int, *, chain: bool, head: ModelProto | None = None, tail: ModelProto | None = None
) -> ModelProto:
    """`copies` of a one-input one-output model: in a chain (output feeds the next input; shapes must agree) or side by
    side on one input. Weights are copied too, so that caches see as much memory as in a real network.

    `head` comes first, once; a `tail` stands behind each loose end, and each is an output of its own. All parts have
    one input and one output and are written in the same opsets (the model's are kept)."""
    made = _Row(model)
    start = made.add(head, "h_", None) if head is not None else None
    ends = [start]
    for i in range(copies):
        if chain:
            ends = [made.add(model, f"c{i}_", ends[0])]
        else:
            ends = [*(ends if i else []), made.add(model, f"c{i}_", start)]
    made.finish([made.add(tail, f"t{i}_", end) if tail is not None else end for i, end in enumerate(ends)])
    return made.proto


class _Row:
    """A model that grows. Values are known by their names; None is the model's own input."""

    def __init__(self, model: ModelProto) -> None:
        self.proto = ModelProto()
        self.proto.CopyFrom(model)
        graph = self.proto.graph
        del graph.node[:], graph.initializer[:], graph.input[:], graph.output[:], graph.value_info[:]
        self.made_by: dict[str, ModelProto] = {}

    def add(self, part: ModelProto, prefix: str, source: str | None) -> str:
        """A copy of `part` that reads `source`; the name of its output."""
        x, y = part.graph.input[0].name, part.graph.output[0].name
        if source is None and not self.proto.graph.input:
            self.proto.graph.input.append(part.graph.input[0])
        entry: str = source or self.proto.graph.input[0].name
        rename = {x: entry, y: prefix + y}
        self.proto.graph.node.extend(_copy_node(n, rename, prefix) for n in part.graph.node)
        for tensor in part.graph.initializer:
            copy = self.proto.graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = prefix + tensor.name
        end: str = prefix + y
        self.made_by[end] = part
        return end

    def finish(self, ends: list[str | None]) -> None:
        for end in ends:
            if end is not None:
                made = self.proto.graph.output.add()
                made.CopyFrom(self.made_by[end].graph.output[0])
                made.name = end


def _copy_node(node: NodeProto, rename: dict[str, str], prefix: str) -> NodeProto:
    made = NodeProto()
    made.CopyFrom(node)
    made.name = prefix + node.name
    made.input[:] = [rename.get(i, prefix + i) if i else "" for i in node.input]
    made.output[:] = [rename.get(o, prefix + o) if o else "" for o in node.output]
    return made
