"""Nodes that change nothing, removed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, fx, nn

from hantc.dialect.activation import Clip, Unary
from hantc.dialect.elementwise import Binary
from hantc.dialect.graph import leaf_of
from hantc.dialect.pool import GlobalPool, Pool, Reduce
from hantc.dialect.rewrites.base import Lazy, Log, Outcome, bypass, calls, constant_operand, keeps_batch, source, swap
from hantc.dialect.shape import Cast, Concat, Flatten, Pad, Reshape, Slice, Transpose


def _neutral(op: str, value: Tensor, constant_right: bool) -> bool:
    """Whether `x op value` (or `value op x`) is x, but for broadcasting."""
    if op == "Add" or (op == "Sub" and constant_right):
        return not bool(value.any())
    if op == "Mul" or (op in ("Div", "Pow") and constant_right):
        return bool((value == 1).all())
    return False


def _same_shape(node: fx.Node, x: fx.Node, lazy: Lazy) -> bool:
    before, after = lazy.shape(x), lazy.shape(node)
    return before is not None and before == after


def _off_batch(axes: Sequence[int], x: fx.Node, lazy: Lazy) -> bool:
    """Whether no axis is the batch, along which the example's size proves nothing."""
    shape = lazy.shape(x)
    return shape is not None and all(a % len(shape) for a in axes)


def _moves_nothing(leaf: nn.Module, node: fx.Node, x: fx.Node, lazy: Lazy) -> str:
    """Why a node that only moves values is a no-op; "" if it is none."""
    if isinstance(leaf, Transpose) and leaf.perm == tuple(range(len(leaf.perm))):
        return "transposed nothing"
    if isinstance(leaf, Pad) and not any(leaf.pads):
        return "padded by nothing"
    if isinstance(leaf, Concat) and len(node.args) == 1:
        return "joined one value"
    if isinstance(leaf, Reshape | Flatten) and keeps_batch(leaf) and _same_shape(node, x, lazy):
        return "reshaped to the same shape"
    if isinstance(leaf, Slice) and _same_shape(node, x, lazy) and _off_batch(leaf.axes, x, lazy):
        return "cut off nothing"
    if isinstance(leaf, Cast):
        known = lazy(x)
        return f"cast to {leaf.dtype} what was so already" if known and known.dtype == leaf.dtype else ""
    return ""


def _computes_nothing(gm: fx.GraphModule, leaf: nn.Module, node: fx.Node, x: fx.Node, lazy: Lazy) -> str:
    """Why a node that computes is a no-op; "" if it is none."""
    if isinstance(leaf, Clip) and leaf.low == -math.inf and leaf.high == math.inf:
        return "clipped at nothing"
    if isinstance(leaf, Unary) and leaf.op == "Relu":
        fed = leaf_of(gm, x)
        positive = isinstance(fed, Clip) and fed.low >= 0
        return "rectified what is not negative" if positive or (isinstance(fed, Unary) and fed.op == "Relu") else ""
    if isinstance(leaf, Pool) and math.prod(leaf.kernel) == math.prod(leaf.stride) == 1 and not any(leaf.pads):
        return "pooled single pixels"
    if isinstance(leaf, GlobalPool) and _same_shape(node, x, lazy):
        return "pooled a single pixel"
    if isinstance(leaf, Reduce) and _same_shape(node, x, lazy) and _off_batch(leaf.axes, x, lazy):
        return "reduced dims of size one"
    return ""


class DropNoops:
    """Reshape to the same shape, Transpose that cancels, Pad of 0, Mul by 1, Cast to the same dtype, … → nothing."""

    name = "drop_noops"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Remove every node that returns its input; merge Transposes in a row."""
        log, lazy = Log(self.name), Lazy(gm)
        for node, leaf in calls(gm, nn.Module):
            if len(node.all_input_nodes) == 1:
                x = source(node)
                note = _moves_nothing(leaf, node, x, lazy) or _computes_nothing(gm, leaf, node, x, lazy)
                if note:
                    log.did(note, node)
                    bypass(node, x)
            elif isinstance(leaf, Binary):
                self._binary(gm, log, lazy, node, leaf)
        for node, transpose in calls(gm, Transpose):
            self._transposes(gm, log, node, transpose)
        return log.finish(gm)

    def _binary(self, gm: fx.GraphModule, log: Log, lazy: Lazy, node: fx.Node, leaf: Binary) -> None:
        operand = constant_operand(gm, node)
        if operand is None or not _neutral(leaf.op, operand[1], operand[2]):
            return
        x, value, _ = operand
        shape = lazy.shape(x)
        if value.dim() and shape and value.dim() >= len(shape) and value.shape[0] != 1:
            log.miss("its constant changes no value, but fixes the batch", node)
        elif value.dim() == 0 or _same_shape(node, x, lazy):
            log.did(f"{leaf.op} changed nothing", node)
            bypass(node, x)
        elif shape is None:
            log.miss("its constant changes no value, but may broadcast (sizes are unknown)", node)

    def _transposes(self, gm: fx.GraphModule, log: Log, node: fx.Node, second: Transpose) -> None:
        inner = source(node)
        first = leaf_of(gm, inner)
        if not isinstance(first, Transpose):
            return
        perm = tuple(first.perm[p] for p in second.perm)
        if perm == tuple(range(len(perm))):
            log.did(f"cancelled with {inner.name}", node, inner)
            bypass(node, source(inner))
        elif len(inner.users) == 1:
            log.did(f"merged with {inner.name}", node, inner)
            swap(gm, node, Transpose(perm))
            node.args = (source(inner),)
        else:
            return
        if not inner.users:
            gm.graph.erase_node(inner)
