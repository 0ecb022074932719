"""Means and maxima over the whole map, made the global pooling that engines have fast (and INT8) kernels for."""

from __future__ import annotations

from torch import fx

from hantc.dialect.pool import GlobalPool, Pool, Reduce
from hantc.dialect.rewrites.base import Lazy, Log, Outcome, calls, source, swap
from hantc.dialect.shape import Flatten

_GLOBAL = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}


class MakeGlobalPool:
    """ReduceMean or ReduceMax over all spatial dims, or a pooling as large as the map → global pooling."""

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
        rank = len(known.shape)
        axes = sorted(a % rank for a in reduce.axes)
        # of three dims they are (N, tokens, features) more often than (N, C, L): left to be
        if rank < 4 or not known.dtype.is_floating_point or axes != list(range(2, rank)):
            if rank > 3 and any(a > 1 for a in axes):
                log.miss(f"it reduces dims {axes} of {rank}, not the spatial ones", node)
            return
        swap(gm, node, GlobalPool(_GLOBAL[reduce.op]))
        log.did(f"became {_GLOBAL[reduce.op]}", node)
        if not reduce.keepdims:
            with gm.graph.inserting_after(node):
                target = f"{node.name}_flatten"
                gm.add_submodule(target, Flatten())
                flat = gm.graph.create_node("call_module", target, (node,), name=target)
            node.replace_all_uses_with(flat, delete_user_cb=lambda user: user is not flat)

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
