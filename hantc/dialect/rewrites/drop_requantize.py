"""Quantised again by what it was dequantised by: nothing happens to the value."""

from __future__ import annotations

import numpy as np
from torch import fx

from hantc.dialect.graph import leaf_of
from hantc.dialect.leaf import Array
from hantc.dialect.rewrites.base import Log, Outcome, bypass, calls, source
from hantc.dialect.verbatim import Verbatim

_SCALES = (2.0**-100, 2.0**100)  # times 16 bits these are normal float32 numbers
_GRID = ("axis", "block_size")  # attributes that say what a scale is for


class DropRequantize:
    """DequantizeLinear → QuantizeLinear with the same scale and zero point → the quantised value itself.

    Exact: n·s/s rounds to n for every integer of 8 or 16 bits in float32, where neither leaves its normal range."""

    name = "drop_requantize"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Remove every such pair; other readers of the dequantised value keep it."""
        log = Log(self.name)
        for node, second in calls(gm, Verbatim):
            if second.proto.op_type != "QuantizeLinear" or len(node.all_input_nodes) != 1:
                continue
            inner = source(node)
            first = leaf_of(gm, inner)
            if not isinstance(first, Verbatim) or first.proto.op_type != "DequantizeLinear":
                continue
            one, two = _grid(first), _grid(second)
            if one is None or two is None or len(inner.all_input_nodes) != 1:
                log.miss("a scale or zero point is computed, or left out", inner, node)
            elif not _same(one, two):
                log.miss("the scales or zero points differ", inner, node)
            else:
                log.did(f"undid {inner.name}", node, inner)
                bypass(node, source(inner))
                if not inner.users:
                    gm.graph.erase_node(inner)
        return log.finish(gm)


def _grid(leaf: Verbatim) -> tuple[Array, Array, tuple[object, ...]] | None:
    """Scale, zero point, and what they are for, where both are constants."""
    names = [n for n in leaf.proto.input if n]
    held = leaf.held()
    if len(names) != 3 or names[1] not in held or names[2] not in held:
        return None
    return held[names[1]], held[names[2]], tuple(leaf.view.attrs.get(a) for a in _GRID)


def _same(one: tuple[Array, Array, tuple[object, ...]], two: tuple[Array, Array, tuple[object, ...]]) -> bool:
    least, most = _SCALES
    usual = bool(((one[0] >= least) & (one[0] <= most)).all())
    exact = usual and one[0].dtype == np.float32 and one[1].dtype.itemsize <= 2
    pairs = zip(one[:2], two[:2], strict=True)
    return exact and one[2] == two[2] and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
