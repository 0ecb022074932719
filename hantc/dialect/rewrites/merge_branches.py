"""Parallel convolutions of one input whose results are added, merged into one (RepVGG's deployment form)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Binary
from hantc.dialect.graph import leaf_of
from hantc.dialect.norm import BatchNorm
from hantc.dialect.rewrites.base import Lazy, Log, Outcome, calls, shared, source, swap
from hantc.dialect.rewrites.fold_norm import rebuilt


@dataclass(frozen=True)
class _Branch:
    """One summand: a convolution of `entry`, a norm of it, or (None) `entry` itself."""

    node: fx.Node
    entry: fx.Node
    leaf: Conv | BatchNorm | None


class MergeBranches:
    """k×k convolution + 1×1 convolution or norm of the same input, or that input → one k×k convolution; in groups too,
    depthwise ones among them (MobileOne's, and the position encodings of vision transformers)."""

    name = "merge_branches"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Merge pairs until none is left; sums of three are pairs of pairs."""
        log, lazy = Log(self.name), Lazy(gm)
        for node, leaf in calls(gm, Binary):
            if leaf.op != "Add" or len(node.args) != 2 or node.args[0] is node.args[1]:
                continue
            pair = _pair(gm, *node.args)
            if pair is None:
                continue
            big, small = sorted(pair, key=_reach, reverse=True)
            reason = _why_not(gm, big, small, lazy)
            if reason:
                log.miss(reason, big.node, small.node, node)
                continue
            assert isinstance(big.leaf, Conv)
            merged = _merged(big.leaf, small.leaf)
            log.did(f"merged into {node.name}", big.node, small.node)
            swap(gm, node, merged)
            node.args = (big.entry,)
            for branch in (big, small):
                if branch.leaf is not None:
                    gm.graph.erase_node(branch.node)
        return log.finish(gm)


def _pair(gm: fx.GraphModule, left: object, right: object) -> tuple[_Branch, _Branch] | None:
    """The two summands, if both are branches of one value."""
    a, b = _branch(gm, left), _branch(gm, right)
    if a is not None and a.entry is right:
        b = _Branch(a.entry, a.entry, None)
    elif b is not None and b.entry is left:
        a = _Branch(b.entry, b.entry, None)
    return (a, b) if a is not None and b is not None and a.entry is b.entry else None


def _branch(gm: fx.GraphModule, arg: object) -> _Branch | None:
    leaf = leaf_of(gm, arg) if isinstance(arg, fx.Node) else None
    if isinstance(arg, fx.Node) and isinstance(leaf, (Conv, BatchNorm)):
        return _Branch(arg, source(arg), leaf)
    return None


def _reach(branch: _Branch) -> int:
    return branch.leaf.weight[0, 0].numel() if isinstance(branch.leaf, Conv) else 0


def _why_not(gm: fx.GraphModule, big: _Branch, small: _Branch, lazy: Lazy) -> str:
    if any(len(branch.node.users) > 1 for branch in (big, small) if branch.leaf is not None):
        return "a branch's value is used elsewhere too"
    if any(shared(gm, branch.node) for branch in (big, small) if branch.leaf is not None):
        return "a branch's weights are used elsewhere too"
    if not isinstance(big.leaf, Conv):
        return "two norms of one value"
    shape, other = lazy.shape(big.node), lazy.shape(small.node)
    if shape is None or shape != other:
        return "sizes are unknown or differ"
    conv = big.leaf
    if set(conv.dilation) != {1}:
        return "a dilated convolution"
    if not isinstance(small.leaf, Conv):
        centred = set(conv.stride) == {1} and all(p < k for p, k in zip(conv.pads, conv.kernel, strict=False))
        if not centred or conv.weight.shape[0] != conv.weight.shape[1] * conv.groups:
            return "the branch without a convolution does not meet the kernel"
        return ""
    if small.leaf.groups != conv.groups or set(small.leaf.dilation) != {1} or small.leaf.stride != conv.stride:
        return "the convolutions have other groups, strides or dilations"
    offsets = _offsets(conv, small.leaf)
    inside = all(o >= 0 and o + s <= k for o, s, k in zip(offsets, small.leaf.kernel, conv.kernel, strict=True))
    return "" if inside else "the smaller kernel lies outside the larger"


def _offsets(big: Conv, small: Conv) -> list[int]:
    """Where the small kernel's first tap lies in the big kernel, by dim."""
    n = len(big.kernel)
    return [b - s for b, s in zip(big.pads[:n], small.pads[:n], strict=True)]


def _merged(big: Conv, small: Conv | BatchNorm | None) -> Conv:
    weight = big.weight.detach().double().clone()
    bias = _bias(big)
    if not isinstance(small, Conv):
        one = torch.ones(weight.shape[0], dtype=torch.float64)
        scale, shift = (t.detach().double() for t in small.scale_shift()) if small else (one, 0 * one)
        at = tuple(big.pads[: len(big.kernel)])
        for channel in range(weight.shape[0]):  # of its group it is the channel of the same number
            weight[(channel, channel % weight.shape[1], *at)] += scale[channel]
        bias = bias + shift
    else:
        window = tuple(slice(o, o + k) for o, k in zip(_offsets(big, small), small.kernel, strict=True))
        weight[(slice(None), slice(None), *window)] += small.weight.detach().double()
        bias = bias + _bias(small)
    made = rebuilt(big, weight, bias)
    assert isinstance(made, Conv)
    return made


def _bias(conv: Conv) -> Tensor:
    if conv.bias is None:
        return torch.zeros(conv.weight.shape[0], dtype=torch.float64)
    return conv.bias.detach().double()
