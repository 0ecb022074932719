"""Small models put together, so that one's latency can be told from a session's overhead and from its borders'."""

from __future__ import annotations

from typing import Literal

from onnx import ModelProto, NodeProto

Layout = Literal["chain", "lanes", "fan"]


def replicate(
    model: ModelProto, copies: int, layout: Layout, *, head: ModelProto | None = None, tail: ModelProto | None = None
) -> ModelProto:
    """`copies` of a one-input one-output model in one. Weights are copied too, so that caches see as much memory as in
    a real network.

    - `chain`: each output feeds the next copy (shapes must agree); `head` before the first, `tail` behind the last.
    - `lanes`: each copy has an input of its own, between a head and a tail of its own. On one input, engines would
      compute what copies without weights have in common only once.
    - `fan`: all copies read one head's output, with a tail behind each; no two of them may be the same.

    Each loose end is an output. All parts have one input and one output and are written in the same opsets (the
    model's are kept)."""
    made, ends = _Row(model), list[str | None]()
    start = made.add(head, "h0_", None) if head is not None and layout != "lanes" else None
    for i in range(copies):
        if layout == "lanes":
            start = made.open(head or model, f"x{i}_")
            start = made.add(head, f"h{i}_", start) if head is not None else start
        end = made.add(model, f"c{i}_", start)
        if layout == "chain":
            start, ends = end, [end]
        else:
            ends.append(end)
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

    def open(self, part: ModelProto, prefix: str) -> str:
        """A further input, as `part` has it; its name."""
        made = self.proto.graph.input.add()
        made.CopyFrom(part.graph.input[0])
        made.name = prefix + made.name
        return str(made.name)

    def add(self, part: ModelProto, prefix: str, source: str | None) -> str:
        """A copy of `part` that reads `source`; the name of its output."""
        x, y = part.graph.input[0].name, part.graph.output[0].name
        entry = source or (self.proto.graph.input[0].name if self.proto.graph.input else self.open(part, ""))
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
