"""Pointwise convolutions and means over windows, in the order that takes less arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import fx, nn

from hantc.dialect.conv import Conv
from hantc.dialect.graph import leaf_of
from hantc.dialect.pool import GlobalPool, Pool
from hantc.dialect.rewrites.base import Lazy, Log, Outcome, calls, sole_user, source

Mean = Pool | GlobalPool


class CommutePool:
    """1×1 convolution ↔ average pooling after or before it: both are linear, one in channels, one in positions.

    DenseNet's transitions convolve what they then pool; Inception's branches pool channels that a convolution then
    takes together."""

    name = "commute_pool"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Exchange every such pair that takes more arithmetic as it is."""
        log, lazy = Log(self.name), Lazy(gm)
        moved: set[fx.Node] = set()
        for first, leaf in calls(gm, nn.Module):
            second = sole_user(first) if first not in moved else None
            other = leaf_of(gm, second) if second is not None else None
            if second is None or not ((_means(leaf) and _points(other)) or (_points(leaf) and _means(other))):
                continue
            reason, note = _judge(leaf, other, [lazy.shape(n) for n in (source(first), first, second)])
            if reason:
                log.miss(reason, first, second)
                continue
            log.did(note, first, second)
            _exchange(first, second)
            moved |= {first, second}
            lazy = Lazy(gm)
        return log.finish(gm)


def _judge(first: object, second: object, shapes: Sequence[tuple[int, ...] | None]) -> tuple[str, str]:
    """(why the two stay as they are, what is gained): one of them "". `shapes`: before, between and after."""
    conv, mean = (first, second) if isinstance(first, Conv) else (second, first)
    assert isinstance(conv, Conv) and isinstance(mean, Mean)
    if reason := _why_not(conv, mean):
        return reason, ""
    known = [s for s in shapes if s is not None]
    if len(known) < len(shapes):
        return "sizes are unknown, so whether another order saves arithmetic is too", ""
    old, new = _work(conv, mean, known, pooled=first is mean)
    if new >= old:
        return f"the other order would take {new:,} multiplications and additions, this one {old:,}", ""
    return "", f"exchanged: {old:,} → {new:,} multiplications and additions"


def _exchange(first: fx.Node, second: fx.Node) -> None:
    """x → first → second becomes x → second → first."""
    second.replace_input_with(first, source(first))
    second.replace_all_uses_with(first)
    first.replace_input_with(source(first), second)
    second.append(first)


def _points(leaf: object) -> bool:
    return isinstance(leaf, Conv) and math.prod(leaf.kernel) == 1


def _means(leaf: object) -> bool:
    if isinstance(leaf, Pool):
        return leaf.op == "AveragePool"
    return isinstance(leaf, GlobalPool) and leaf.op == "GlobalAveragePool"


def _why_not(conv: Conv, mean: Mean) -> str:
    """Why a pointwise convolution and a mean cannot change places; "" if they can."""
    if any(s != 1 for s in conv.stride) or any(conv.pads):
        return "the pointwise convolution skips pixels or pads"
    if conv.groups != 1:
        return "a grouped convolution leaves the pooling's work as it is"
    biased = conv.bias is not None and bool(conv.bias.any())
    if isinstance(mean, Pool) and any(mean.pads) and mean.count_include_pad and biased:
        return "the pooling counts its padding, in which the bias would be missing or too much"
    return ""


def _work(conv: Conv, mean: Mean, shapes: Sequence[tuple[int, ...]], *, pooled: bool) -> tuple[int, int]:
    """(as it is, exchanged): the convolution's multiplications and the pooling's additions. `pooled`: the pooling
    comes first. `shapes`: before, between and after."""
    out, into = conv.weight.shape[:2]
    large, small = math.prod(shapes[0][2:]), math.prod(shapes[2][2:])
    window = math.prod(mean.kernel) if isinstance(mean, Pool) else large
    conv_first = large * into * out + small * window * out
    pool_first = small * window * into + small * into * out
    return (pool_first, conv_first) if pooled else (conv_first, pool_first)
