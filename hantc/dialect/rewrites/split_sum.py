"""Sums of any number of values, written as additions of two, which engines fuse and quantise."""

from __future__ import annotations

from torch import fx

from hantc.dialect.elementwise import Add
from hantc.dialect.rewrites.base import Log, Outcome, bypass, calls, swap
from hantc.dialect.verbatim import Verbatim


class SplitSum:
    """Sum(a, b, c, …) → Add(Add(a, b), c) …; Sum(a) → a."""

    name = "split_sum"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Write every sum of computed values so."""
        log = Log(self.name)
        for node, leaf in calls(gm, Verbatim):
            if leaf.proto.op_type != "Sum" or leaf.proto.domain not in ("", "ai.onnx") or leaf.foreign:
                continue
            operands = [a for a in node.args if isinstance(a, fx.Node)]
            if leaf.held() or len(operands) != len(node.args):
                log.miss("it adds constants", node)
                continue
            log.did(f"of {len(operands)} became additions", node)
            if len(operands) == 1:
                bypass(node, operands[0])
                continue
            *first, last = operands
            at = first[0]
            for k, operand in enumerate(first[1:]):
                target = f"{str(node.target).replace('.', '_')}_part{k}"
                gm.add_submodule(target, Add())
                with gm.graph.inserting_before(node):
                    at = gm.graph.create_node("call_module", target, (at, operand), name=target)
            swap(gm, node, Add())
            node.args = (at, last)
        return log.finish(gm)
