"""Bounds on a value, made one Clip: what TensorFlow's exporters write as Max, Min and Relu in a row."""

from __future__ import annotations

import math

import numpy as np
from torch import fx

from hantc.dialect.activation import Clip, Unary
from hantc.dialect.graph import leaf_of
from hantc.dialect.rewrites.base import Log, Outcome, bypass, calls, sole_user, source, swap
from hantc.dialect.verbatim import Verbatim


def _bound(leaf: object) -> Clip | None:
    """Max or Min of a value and one number as the Clip that it is; None for anything else."""
    if not isinstance(leaf, Verbatim) or leaf.foreign or leaf.proto.domain not in ("", "ai.onnx"):
        return None
    held = leaf.held()
    if leaf.proto.op_type not in ("Max", "Min") or len(leaf.proto.input) != 2 or len(held) != 1:
        return None
    (value,) = (np.asarray(v) for v in held.values())
    # a number with dims of its own may give the result more of them
    if value.size != 1 or value.ndim > 0 or not np.isfinite(value):
        return None
    number = float(value)
    clip = Clip(low=number) if leaf.proto.op_type == "Max" else Clip(high=number)
    clip.dtype = value.dtype
    return clip


def _clip(leaf: object) -> tuple[float, float] | None:
    if isinstance(leaf, Clip):
        return leaf.low, leaf.high
    return (0.0, math.inf) if isinstance(leaf, Unary) and leaf.op == "Relu" else None


class MergeClips:
    """Max(x, c), Min(x, c) → Clip; Clip or Relu of a Clip or Relu → one Clip."""

    name = "merge_clips"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Make every bound a Clip, then every two in a row one."""
        log = Log(self.name)
        for node, leaf in calls(gm, Verbatim):
            clip = _bound(leaf)
            if clip is not None:
                log.did(f"{leaf.proto.op_type} with a number became Clip", node)
                swap(gm, node, clip)
        for kind in (Clip, Unary):
            for node, _ in calls(gm, kind):
                self._merge(gm, log, node)
        return log.finish(gm)

    def _merge(self, gm: fx.GraphModule, log: Log, node: fx.Node) -> None:
        inner = source(node)
        first, last = _clip(leaf_of(gm, inner)), _clip(leaf_of(gm, node))
        if first is None or last is None or first[0] > first[1] or last[0] > last[1]:
            return
        if sole_user(inner) is None:
            log.miss(f"{inner.name} is used elsewhere too", node)
            return
        low, high = (min(max(bound, last[0]), last[1]) for bound in first)
        merged = Clip(low, high)
        kept = next((leaf for n in (node, inner) if isinstance(leaf := leaf_of(gm, n), Clip)), None)
        merged.dtype = kept.dtype if kept is not None else merged.dtype
        log.did(f"with {inner.name} became one Clip", node, inner)
        swap(gm, node, merged if kept is not None else Unary("Relu"))
        bypass(inner, source(inner))
