"""Explicit padding, taken in by the convolution or pooling after it."""

from __future__ import annotations

import numpy as np
from torch import fx

from hantc.dialect.activation import Clip, Unary
from hantc.dialect.conv import Conv
from hantc.dialect.graph import leaf_of
from hantc.dialect.pool import Pool
from hantc.dialect.rewrites.base import Log, Outcome, bypass, calls, shared, source, swap
from hantc.dialect.rewrites.fold_norm import rebuilt
from hantc.dialect.shape import Pad


def _sum(pads: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(pads, more, strict=True))


def _spatial(pad: Pad) -> tuple[int, ...]:
    """The pad's begins and ends without batch and channels."""
    n = len(pad.pads) // 2
    return pad.pads[2:n] + pad.pads[n + 2 :]


def _non_negative(gm: fx.GraphModule, node: fx.Node) -> bool:
    leaf = leaf_of(gm, node)
    return (isinstance(leaf, Unary) and leaf.op in ("Relu", "Sigmoid")) or (isinstance(leaf, Clip) and leaf.low >= 0)


def _lowest(pad: Pad) -> bool:
    """Whether it pads with what no finite value of its type lies below, as exporters write "same" padding of maxima."""
    kind = pad.dtype if pad.dtype is not None and pad.dtype.kind == "f" else np.dtype(np.float32)
    return pad.value <= float(np.finfo(kind).min)


def _why_not_pool(gm: fx.GraphModule, pool: Pool, pad: Pad, x: fx.Node) -> str:
    more = _spatial(pad)
    if pool.ceil_mode:
        return "the pooling rounds its size up, which padding would change"
    if any(p >= k for p, k in zip(_sum(pool.pads, more), pool.kernel * 2, strict=True)):
        return "the pooling would be padded by a whole window"
    if pool.op == "AveragePool" and any(pool.pads) and not pool.count_include_pad:
        return "the pooling leaves its own padding out of the mean"
    if _lowest(pad) and (pool.op != "MaxPool" or pad.mode != "constant"):
        return f"it pads with {pad.value:g}, which is no value"
    if pool.op == "MaxPool" and not _lowest(pad) and not _non_negative(gm, x):
        return "the maximum of negative values would no longer be the zero of the padding"
    if pool.op == "MaxPool" and any(d != 1 for d in pool.dilation):
        return "a dilated window may see nothing but padding"
    return ""


def _why_not(gm: fx.GraphModule, user: fx.Node, pad: Pad, x: fx.Node) -> str:
    leaf = leaf_of(gm, user)
    if not isinstance(leaf, Conv | Pool):
        return "its value goes into something other than a convolution or pooling"
    if shared(gm, user):
        return f"the module of {user.name} is used elsewhere too"
    if len(_spatial(pad)) != len(leaf.pads):
        return f"{user.name} has other dims"
    if isinstance(leaf, Pool):
        return _why_not_pool(gm, leaf, pad, x)
    return f"it pads with {pad.value:g}, not zeros" if pad.value else ""


def _unsuited(pad: Pad) -> str:
    n = len(pad.pads) // 2
    if pad.mode != "constant" or not (pad.value == 0 or _lowest(pad)):
        return f"it pads with {pad.mode if pad.mode != 'constant' else f'{pad.value:g}'}, not zeros"
    if any(pad.pads[:2]) or any(pad.pads[n : n + 2]):
        return "it pads batch or channels"
    return "it cuts (negative padding)" if min(pad.pads) < 0 else ""


class FoldPad:
    """Pad with zeros → the convolutions and poolings after it (a maximum only of values that are ≥ 0); with −∞ → the
    maxima after it."""

    name = "fold_pad"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Fold every such Pad all of whose users can take it."""
        log = Log(self.name)
        for node, pad in calls(gm, Pad):
            if not any(pad.pads) or not node.users:
                continue
            x, users, more = source(node), list(node.users), _spatial(pad)
            reason = _unsuited(pad) or next((r for u in users if (r := _why_not(gm, u, pad, x))), "")
            if reason:
                log.miss(reason, node)
                continue
            for user in users:
                leaf = leaf_of(gm, user)
                if isinstance(leaf, Conv):
                    swap(gm, user, rebuilt(leaf, leaf.weight.detach(), leaf.bias, pads=_sum(leaf.pads, more)))
                elif isinstance(leaf, Pool):
                    swap(gm, user, _padded(leaf, _sum(leaf.pads, more)))
            log.did(f"folded into {', '.join(u.name for u in users)}", node, *users)
            bypass(node, x)
        return log.finish(gm)


def _padded(pool: Pool, pads: tuple[int, ...]) -> Pool:
    return Pool(
        pool.op,
        pool.kernel,
        pool.stride,
        pads,
        dilation=pool.dilation,
        ceil_mode=pool.ceil_mode,
        count_include_pad=pool.op == "AveragePool",  # the zeros were part of its input
    )
