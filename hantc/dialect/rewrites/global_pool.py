"""Means and maxima over the whole map, made the global pooling that engines have fast (and INT8) kernels for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx, nn
from torch.nn import Identity

from hantc.dialect.graph import leaf_of
from hantc.dialect.pool import GlobalPool, Pool, Reduce
from hantc.dialect.rewrites.base import Lazy, Log, Outcome, calls, source, swap
from hantc.dialect.shape import Flatten, Reshape, Transpose

_GLOBAL = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}


@dataclass(frozen=True)
class _Map:
    """What a reduction reduces to single pixels: a value (N, C, …), and how the node before it had changed it."""

    value: fx.Node
    by: nn.Module | None = None
    note: str = ""


def _of_map(gm: fx.GraphModule, lazy: Lazy, node: fx.Node, reduce: Reduce) -> _Map | None:
    """The map that `node` reduces, over all its spatial dims and no other; None if it is none."""
    fed = source(node)
    shape = lazy.shape(fed)
    if shape is None:
        return None
    axes = sorted(a % len(shape) for a in reduce.axes)
    if len(shape) > 3 and axes == list(range(2, len(shape))):
        return _Map(fed)
    leaf, before = leaf_of(gm, fed), lazy.shape(source(fed)) if fed.all_input_nodes else None
    if before is None or len(before) < 4:
        return None
    spatial = list(range(2, len(before)))
    if isinstance(leaf, Transpose):
        left = [p for i, p in enumerate(leaf.perm) if i not in axes]
        if left != [0, 1] and not reduce.keepdims:  # images and channels change places
            return None
        return (
            _Map(source(fed), leaf, " of what was transposed")
            if sorted(leaf.perm[a] for a in axes) == spatial
            else None
        )
    if isinstance(leaf, Reshape | Flatten):
        flat = shape == (*before[:2], math.prod(before[2:])) and axes == [2]
        return _Map(source(fed), leaf, " of what was flattened") if flat else None
    if isinstance(leaf, Reduce) and leaf.op == reduce.op:
        first = {a % len(before) for a in leaf.axes}
        left = [a for a in range(len(before)) if leaf.keepdims or a not in first]
        both = sorted(first | {left[a] for a in axes})
        return _Map(source(fed), leaf, " in one step") if both == spatial else None
    return None


def _after(found: _Map, reduce: Reduce, channels: int) -> nn.Module | None:
    """What makes the reduction's own shape of (N, C, 1, …); None where that is more than one step."""
    if isinstance(found.by, Reduce) and found.by.keepdims != reduce.keepdims:
        return None
    if not reduce.keepdims:
        return Flatten()
    if isinstance(found.by, Transpose):
        return Transpose(found.by.perm)
    return Reshape((channels, 1), keep_batch=True) if isinstance(found.by, Reshape | Flatten) else Identity()


class MakeGlobalPool:
    """ReduceMean or ReduceMax over all spatial dims, or a pooling as large as the map → global pooling: also of a map
    that is transposed (channels last) or flattened before, and in two steps."""

    name = "global_pool"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Replace every such node; a reduction that drops its dims gets a Flatten after it."""
        log, lazy = Log(self.name), Lazy(gm)
        for node, reduce in calls(gm, Reduce):
            if reduce.op in _GLOBAL:
                self._reduce(gm, log, lazy, node, reduce)
        for node, pool in calls(gm, Pool):
            self._pool(gm, log, lazy, node, pool)
        return log.finish(gm)

    def _reduce(self, gm: fx.GraphModule, log: Log, lazy: Lazy, node: fx.Node, reduce: Reduce) -> None:
        known = lazy(source(node))
        if known is None:
            log.miss("the rank of its input is unknown", node)
            return
        found = _of_map(gm, lazy, node, reduce)
        shape = lazy.shape(found.value) if found else None
        # of three dims they are (N, tokens, features) more often than (N, C, L): left to be
        if found is None or shape is None or len(shape) < 4 or not known.dtype.is_floating_point:
            rank = len(known.shape)
            axes = sorted(a % rank for a in reduce.axes)
            if rank > 3 and any(a > 1 for a in axes):
                log.miss(f"it reduces dims {axes} of {rank}, not the spatial ones", node)
            return
        after = _after(found, reduce, shape[1])
        if after is None:
            log.miss("its first step keeps the dims, its second does not, or the other way round", node)
            return
        swap(gm, node, GlobalPool(_GLOBAL[reduce.op]))
        node.args = (found.value,)
        log.did(f"became {_GLOBAL[reduce.op]}{found.note}", node)
        if not isinstance(after, Identity):
            with gm.graph.inserting_after(node):
                target = f"{node.name}_flatten"
                gm.add_submodule(target, after)
                made = gm.graph.create_node("call_module", target, (node,), name=target)
            node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        gm.graph.eliminate_dead_code()

    def _pool(self, gm: fx.GraphModule, log: Log, lazy: Lazy, node: fx.Node, pool: Pool) -> None:
        before, after = lazy.shape(source(node)), lazy.shape(node)
        if before is None or after is None or any(d != 1 for d in after[2:]):
            return
        if before[2:] != pool.kernel or any(pool.pads) or any(d != 1 for d in pool.dilation):
            if any(d != 1 for d in before[2:]):
                log.miss(f"its window {list(pool.kernel)} is not the whole map {list(before[2:])}", node)
            return
        name = "GlobalAveragePool" if pool.op == "AveragePool" else "GlobalMaxPool"
        swap(gm, node, GlobalPool(name))
        log.did(f"became {name}", node)
