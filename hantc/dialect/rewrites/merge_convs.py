"""Two convolutions or matrix products in a row without an activation between, merged into one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from hantc.dialect.conv import Conv
from hantc.dialect.graph import leaf_of
from hantc.dialect.linear import Linear
from hantc.dialect.rewrites.base import Lazy, Log, Outcome, calls, shared, sole_user, swap
from hantc.dialect.rewrites.fold_norm import rebuilt

_TOO_LARGE = "the weights would be too large for their type"


def _finite(leaf: nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in leaf.parameters())


def _pointwise(conv: Conv) -> bool:
    return math.prod(conv.kernel) == 1


def _plain_first(first: Conv, second: Conv, *, structural: bool) -> str:
    """Why pointwise `first` and `second` cannot become one; "" if they can. `structural`: whatever their values are."""
    if any(s != 1 for s in first.stride):
        return "the pointwise convolution skips pixels"
    if any(first.pads):
        return "the pointwise convolution pads"
    if any(second.pads) and first.bias is not None and (structural or bool(first.bias.any())):
        return "the second pads with zeros, where the first would give its bias"
    return ""


def _why_not(gm: fx.GraphModule, a: fx.Node, b: fx.Node, first: Conv, second: Conv, *, grouped: bool) -> str:
    if len(a.users) > 1:
        return f"the value of {a.name} is used elsewhere too"
    if shared(gm, a) or shared(gm, b):
        return "their weights are used elsewhere too"
    if not grouped and (first.groups != 1 or second.groups != 1):
        return "a grouped convolution would lose its groups"
    if _pointwise(second) and not any(second.pads):
        return ""
    if _pointwise(first):
        return _plain_first(first, second, structural=grouped)
    return "neither is a plain pointwise convolution"


def _merged(first: Conv, second: Conv) -> Conv:
    """One convolution for both (which `_why_not` has let pass)."""
    first, second = (c if c.groups == 1 else c.with_groups(1) for c in (first, second))
    w1, w2 = first.weight.detach().double(), second.weight.detach().double()
    bias: Tensor | None = None
    if first.bias is not None or second.bias is not None:
        b1 = first.bias.detach().double() if first.bias is not None else w1.new_zeros(w1.shape[0])
        b2 = second.bias.detach().double() if second.bias is not None else w2.new_zeros(w2.shape[0])
        bias = b2 + w2.flatten(2).sum(2) @ b1
    if _pointwise(second) and not any(second.pads):
        weight = torch.einsum("om,mi...->oi...", w2.flatten(1), w1)
        stride = tuple(s1 * s2 for s1, s2 in zip(first.stride, second.stride, strict=True))
        made = rebuilt(first, weight, bias, stride=stride)
    else:
        weight = torch.einsum("om...,mi->oi...", w2, w1.flatten(1))
        made = rebuilt(second, weight, bias)
    assert isinstance(made, Conv)
    return made


def _size(first: Conv, second: Conv) -> int:
    """Weights of the one convolution for both."""
    kernel = first.kernel if _pointwise(second) and not any(second.pads) else second.kernel
    return second.weight.shape[0] * first.weight.shape[1] * first.groups * math.prod(kernel)


class MergeConvs:
    """k×k and 1×1 convolutions (either order) → one k×k, where that takes no more arithmetic. With `growth`: grouped
    ones too, where it takes no more than so many times as much, and only what their structure alone allows."""

    name = "merge_convs"

    def __init__(self, growth: float | None = None) -> None:
        self.growth = growth

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Merge every such pair, first ones first."""
        log, lazy = Log(self.name), Lazy(gm)
        for a, _ in calls(gm, Conv):
            b = sole_user(a) or next((u for u in a.users if isinstance(leaf_of(gm, u), Conv)), None)
            first, second = leaf_of(gm, a), leaf_of(gm, b) if b is not None else None
            if b is None or not isinstance(first, Conv) or not isinstance(second, Conv):
                continue
            reason = _why_not(gm, a, b, first, second, grouped=self.growth is not None)
            if reason:
                log.miss(reason, a, b)
                continue
            before, after = lazy.shape(a), lazy.shape(b)
            if before is None or after is None:
                log.miss("sizes are unknown, so whether merging saves arithmetic is too", a, b)
                continue
            old = math.prod(before[2:]) * first.weight.numel() + math.prod(after[2:]) * second.weight.numel()
            new = math.prod(after[2:]) * _size(first, second)
            if new > (self.growth or 1.0) * old:
                log.miss(f"one convolution would take {new:,} multiply-accumulates, the two take {old:,}", a, b)
                continue
            made = _merged(first, second)
            if not _finite(made):
                log.miss(_TOO_LARGE, a, b)
                continue
            log.did(f"merged into {b.name}: {old:,} → {new:,} multiply-accumulates", a, b)
            swap(gm, b, made)
            b.args = a.args
            gm.graph.erase_node(a)
        return log.finish(gm)


class MergeLinears:
    """Two matrix products by weights in a row → one, where that takes no more arithmetic."""

    name = "merge_linears"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Merge every such pair, first ones first."""
        log = Log(self.name)
        for a, first in calls(gm, Linear):
            b = next((u for u in a.users if isinstance(leaf_of(gm, u), Linear)), None)
            second = leaf_of(gm, b) if b is not None else None
            if b is None or not isinstance(second, Linear):
                continue
            old = first.weight.numel() + second.weight.numel()
            new = first.weight.shape[1] * second.weight.shape[0]
            if len(a.users) > 1 or shared(gm, a) or shared(gm, b):
                log.miss(f"the value of {a.name} or the weights of one of them are used elsewhere too", a, b)
            elif new > old:
                log.miss(f"one product would take {new:,} multiply-accumulates, the two take {old:,}", a, b)
            elif not _finite(made := _product(first, second)):
                log.miss(_TOO_LARGE, a, b)
            else:
                log.did(f"merged into {b.name}: {old:,} → {new:,} multiply-accumulates", a, b)
                swap(gm, b, made)
                b.args = a.args
                gm.graph.erase_node(a)
        return log.finish(gm)


def _product(first: Linear, second: Linear) -> Linear:
    """One product for both."""
    w1, w2 = first.weight.detach().double(), second.weight.detach().double()
    bias = second.bias.detach().double() if second.bias is not None else w2.new_zeros(w2.shape[0])
    if first.bias is not None:
        bias = bias + w2 @ first.bias.detach().double()
    biased = first.bias is not None or second.bias is not None
    # what Gemm takes or gives has two dims, so both have
    made = rebuilt(first if first.gemm else second, w2 @ w1, bias if biased else None)
    assert isinstance(made, Linear)
    return made
