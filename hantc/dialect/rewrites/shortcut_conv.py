"""Shortcuts without weights (every second pixel, further channels of zeros) written as the convolution that they are.

He et al., "Deep Residual Learning" (2015), option A. Engines keep activations between convolutions in a layout of their
own. A Slice and a Pad break it, and not just there: the sum behind them is in the plain layout, so every residual block
that follows in the stage goes to and fro, and its sum is no longer computed by the convolution before it. In ONNX
Runtime on a CPU with AVX-512 that was an eighth of ResNet-56's time. The convolution multiplies by ones and zeros, so
that finite values stay the same to the last bit.
"""

from __future__ import annotations

import torch
from torch import fx

from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Binary
from hantc.dialect.graph import leaf_of
from hantc.dialect.rewrites.base import (
    Lazy,
    Log,
    Outcome,
    calls,
    pixel_steps,
    sizes_are_fixed,
    sole_user,
    source,
    swap,
)
from hantc.dialect.shape import Pad, Slice

_CHANNELS, _RANK = 1, 4


class ShortcutConv:
    """Slice of every n-th pixel and Pad of channels with zeros, before an Add → a 1×1 convolution of ones and zeros."""

    name = "shortcut_conv"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Rewrite every such shortcut of a residual sum."""
        log, lazy = Log(self.name), Lazy(gm)
        fixed = sizes_are_fixed(gm)
        for node, pad in calls(gm, Pad):
            before, known = _channel_pads(pad), lazy(source(node))
            if before is None or not any(_adds(gm, u) for u in node.users):
                continue
            if known is None or len(known.shape) != _RANK or not known.dtype.is_floating_point:
                log.miss("the size or type of its input is unknown", node)
                continue
            cuts, stride = _cuts(gm, lazy, node, fixed=fixed)
            first = source(cuts[-1]) if cuts else source(node)
            channels, total = known.shape[1], known.shape[1] + sum(before)
            conv = Conv(channels, total, 1, stride, bias=False, pads=[0] * 4).to(known.dtype)
            with torch.no_grad():
                conv.weight.zero_()
                conv.weight[before[0] : before[0] + channels, :, 0, 0] = torch.eye(channels, dtype=known.dtype)
            log.did(f"became a 1×1 convolution, stride {list(stride)}, of ones and zeros", *reversed(cuts), node)
            swap(gm, node, conv)
            node.args = (first,)
            for cut in cuts:
                gm.graph.erase_node(cut)
        return log.finish(gm)


def _cuts(gm: fx.GraphModule, lazy: Lazy, node: fx.Node, *, fixed: bool) -> tuple[list[fx.Node], tuple[int, int]]:
    """The Slices straight before `node` that only skip pixels, last one first, and their steps together."""
    found: list[fx.Node] = []
    stride = [1, 1]
    at = source(node)
    while isinstance(leaf := leaf_of(gm, at), Slice) and sole_user(at) is not None:
        steps = pixel_steps(leaf, lazy.shape(source(at)), fixed=fixed)
        if steps is None:
            break
        found.append(at)
        stride = [a * b for a, b in zip(stride, steps, strict=True)]
        at = source(at)
    return found, (stride[0], stride[1])


def _channel_pads(pad: Pad) -> tuple[int, int] | None:
    """Channels of zeros before and behind, if a Pad adds nothing else."""
    n = len(pad.pads) // 2
    others = [p for i, p in enumerate(pad.pads) if i % n != _CHANNELS] if n == _RANK else [1]
    if pad.mode != "constant" or pad.value != 0 or any(others):
        return None
    before, behind = pad.pads[_CHANNELS], pad.pads[n + _CHANNELS]
    return (before, behind) if min(before, behind) >= 0 else None


def _adds(gm: fx.GraphModule, node: fx.Node) -> bool:
    leaf = leaf_of(gm, node)
    return isinstance(leaf, Binary) and leaf.op == "Add"
