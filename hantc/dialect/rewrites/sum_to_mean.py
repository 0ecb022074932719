"""Means that a file writes as sums divided by how many they are of."""

from __future__ import annotations

import math

from torch import fx

from hantc.dialect.elementwise import Binary
from hantc.dialect.graph import leaf_of
from hantc.dialect.pool import Reduce
from hantc.dialect.rewrites.base import (
    Lazy,
    Log,
    Outcome,
    bypass,
    calls,
    constant_operand,
    shared,
    sizes_are_fixed,
    sole_user,
    source,
    swap,
)

_ROUNDING = 1e-6  # of the factor, as float32 holds 1/49


class SumToMean:
    """ReduceSum, then division by the number of summands (or the product with its inverse) → ReduceMean."""

    name = "sum_to_mean"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Rewrite every such pair whose summands are as many in every run."""
        log, lazy = Log(self.name), Lazy(gm)
        for node, binary in calls(gm, Binary):
            operand = constant_operand(gm, node) if binary.op in ("Mul", "Div") else None
            if operand is None or operand[1].numel() != 1 or operand[1].dim() > 1 or not operand[1].is_floating_point():
                continue
            origin, value, is_right = operand
            reduce = leaf_of(gm, origin)
            if not isinstance(reduce, Reduce) or reduce.op != "ReduceSum" or (binary.op == "Div" and not is_right):
                continue
            shape = lazy.shape(source(origin))
            if shape is None:
                continue
            axes = [a % len(shape) for a in reduce.axes]
            count, number = math.prod(shape[a] for a in axes), float(value)
            wanted = number if binary.op == "Div" else (1 / number if number else 0.0)
            if not count or not abs(wanted / count - 1) <= _ROUNDING:  # nor is it for nan
                continue
            if (
                0 in axes
                or not lazy.steady(source(origin), axes)
                or not sizes_are_fixed(gm)
                or sole_user(origin) is None
                or shared(gm, origin)
            ):
                log.miss("the sum is used elsewhere too, or its size is not the same in every run", origin, node)
                continue
            swap(gm, origin, Reduce("ReduceMean", reduce.axes, reduce.keepdims))
            log.did(f"a mean of {count} values", origin, node)
            bypass(node, origin)
        return log.finish(gm)
