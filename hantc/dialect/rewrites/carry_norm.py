"""Norms (and scalings) that stand apart from any convolution, carried to where one takes them in.

An affine map per channel changes places with whatever treats channels alike: means over windows, maxima if it keeps
the order, flattening, joining, adding. ArcFace's heads (norm, Flatten, Gemm), NASNet's and PeleeNet's joins, and
norms of single pixels behind a global pooling have this form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx, nn

from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Binary
from hantc.dialect.graph import leaf_of
from hantc.dialect.linear import Linear
from hantc.dialect.norm import BatchNorm
from hantc.dialect.pool import GlobalPool, Pool
from hantc.dialect.rewrites.base import Lazy, Log, Outcome, bypass, calls, keeps_batch, source, swap
from hantc.dialect.rewrites.fold_norm import Affine, after, before, channel_map, norm_map, why_not_after, why_not_before
from hantc.dialect.shape import Concat, Flatten, Reshape, Squeeze
from hantc.dialect.verbatim import Verbatim

_Taker = Conv | Linear | BatchNorm
_NOTHING = "nothing stands between"
_BETWEEN = (Pool, GlobalPool, Concat, Flatten, Reshape, Squeeze, Binary)


@dataclass(frozen=True)
class _Share:
    """One node that takes the map (or its part of it) into its parameters."""

    node: fx.Node
    affine: Affine


@dataclass(frozen=True)
class _Way:
    """All that take a map in: those it comes from or those it goes to. `reason`: why it cannot be."""

    shares: tuple[_Share, ...] = ()
    reason: str = ""


class CarryNorm:
    """BatchNorm or constant scaling → convolutions, products or norms, past poolings, joins, sums and flattening."""

    name = "carry_norm"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Carry every map that ends in parameters, backward where that is possible, else forward."""
        log, lazy = Log(self.name), Lazy(gm)
        for node, leaf in calls(gm, nn.Module):
            found = _map_of(gm, node, leaf, lazy)
            if found is None:
                continue
            origin, affine = found
            back = _backward(gm, origin, affine, lazy) if _carries(gm, origin) else _Way(reason=_NOTHING)
            way = _forward(gm, node, affine, lazy) if back.reason and _precedes(gm, node) else back
            made = [] if way.reason else [_taken(gm, share, back is way) for share in way.shares]
            if way.reason or not all(torch.isfinite(p).all() for m in made for p in m.parameters()):
                reason = "the weights would be too large for their type" if made else back.reason
                if isinstance(leaf, BatchNorm) and _carries(gm, origin):
                    log.miss(reason, node)
                continue
            for share, taker in zip(way.shares, made, strict=True):
                swap(gm, share.node, taker)
            log.did(f"taken into {', '.join(s.node.name for s in way.shares)}", node, *(s.node for s in way.shares))
            bypass(node, origin)
        return log.finish(gm)


def _map_of(gm: fx.GraphModule, node: fx.Node, leaf: nn.Module, lazy: Lazy) -> tuple[fx.Node, Affine] | None:
    """(what the node scales and shifts channel by channel, how), if it does nothing else and stands apart from what
    `FoldNorm` would fold it into."""
    if not isinstance(leaf, BatchNorm | Binary) or not any(
        _carries(gm, n) for n in (*node.all_input_nodes, *node.users)
    ):
        return None
    norm = isinstance(leaf, BatchNorm)
    found = (source(node), norm_map(leaf)) if isinstance(leaf, BatchNorm) else channel_map(gm, node, leaf, lazy)
    if found is None or not found[1].finite or (norm and lazy(node) is None):
        return None
    direct = leaf_of(gm, found[0])
    folds = isinstance(direct, Conv | Linear) and not why_not_after(gm, found[0])
    return None if folds or isinstance(direct, Verbatim) else found


def _precedes(gm: fx.GraphModule, node: fx.Node) -> bool:
    return any(isinstance(leaf_of(gm, u), Pool | GlobalPool | Flatten | Reshape | Squeeze) for u in node.users)


def _carries(gm: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(leaf_of(gm, node), (*_BETWEEN, BatchNorm))


def _taken(gm: fx.GraphModule, share: _Share, backward: bool) -> _Taker:
    """The leaf of the share's node with the map in its parameters."""
    leaf = leaf_of(gm, share.node)
    if isinstance(leaf, BatchNorm):
        made = BatchNorm(leaf.weight.numel(), eps=leaf.eps, momentum=leaf.momentum).to(leaf.weight.dtype)
        made.running_mean, made.running_var = leaf.running_mean.clone(), leaf.running_var.clone()
        scale, shift = share.affine.scale, share.affine.shift
        made.weight = nn.Parameter((leaf.weight.detach().double() * scale).to(leaf.weight.dtype))
        made.bias = nn.Parameter((leaf.bias.detach().double() * scale + shift).to(leaf.weight.dtype))
        return made
    assert isinstance(leaf, Conv | Linear)
    return after(leaf, share.affine) if backward else before(leaf, share.affine)


def _through(gm: fx.GraphModule, node: fx.Node, affine: Affine, lazy: Lazy) -> str:
    """Why a map does not change places with this node of one operand; "" if it does."""
    leaf = leaf_of(gm, node)
    maximum = isinstance(leaf, Pool | GlobalPool) and leaf.op in ("MaxPool", "GlobalMaxPool")
    if maximum and bool((affine.scale < 0).any()):
        return f"it turns values round, of which {node.name} takes the largest"
    if isinstance(leaf, Pool) and leaf.op == "AveragePool" and any(leaf.pads) and leaf.count_include_pad:
        return f"{node.name} counts zeros of padding, which the shift would not reach" if affine.shift.any() else ""
    if isinstance(leaf, Flatten | Reshape | Squeeze):
        old, new = lazy.shape(source(node)), lazy.shape(node)
        kept = keeps_batch(leaf) and old is not None and new is not None and len(new) > 1 and old[:2] == new[:2]
        return "" if kept else f"{node.name} moves values between channels"
    return "" if isinstance(leaf, Pool | GlobalPool) else f"{node.name} is no convolution, matrix product or norm"


def _backward(gm: fx.GraphModule, node: fx.Node, affine: Affine, lazy: Lazy) -> _Way:
    """Who takes in a map of `node`'s value."""
    shares, todo = list[_Share](), [(node, affine)]
    while todo:
        at, part = todo.pop()
        leaf = leaf_of(gm, at)
        if isinstance(leaf, Conv | Linear | BatchNorm):
            wide = isinstance(leaf, Linear) and len(lazy.shape(at) or ()) != 2
            if reason := f"{at.name} works along another dim than the norm" if wide else why_not_after(gm, at):
                return _Way(reason=reason)
            shares.append(_Share(at, part))
        elif len(at.users) > 1:
            return _Way(reason=f"the value of {at.name} is used elsewhere too")
        elif isinstance(leaf, Concat | Binary):
            parts = _parts(leaf, at, part, lazy)
            if isinstance(parts, str):
                return _Way(reason=parts)
            todo += reversed(parts)
        elif reason := _through(gm, at, part, lazy):
            return _Way(reason=reason)
        else:
            todo.append((source(at), part))
    return _Way(tuple(shares))


def _parts(leaf: Concat | Binary, node: fx.Node, affine: Affine, lazy: Lazy) -> list[tuple[fx.Node, Affine]] | str:
    """The operands of a join or sum, each with its part of the map; or why there are none."""
    args = [a for a in node.args if isinstance(a, fx.Node)]
    shapes = [lazy.shape(a) for a in args]
    whole = lazy.shape(node)
    if whole is None or any(s is None for s in shapes) or len(set(args)) < len(args):
        return f"{node.name} takes one value twice, or sizes are unknown"
    zero = affine.scale.new_zeros(whole[1])
    scale, shift = affine.scale + zero, affine.shift + zero
    if isinstance(leaf, Binary):
        if leaf.op != "Add" or any(s != whole for s in shapes):
            return f"{node.name} is no sum of values of one shape"
        return [(args[0], Affine(scale, shift)), (args[1], Affine(scale, zero))]
    if leaf.axis % len(whole) != 1:
        return f"{node.name} joins along another dim than channels"
    sizes = [s[1] for s in shapes if s is not None]
    return [(a, Affine(k, b)) for a, k, b in zip(args, scale.split(sizes), shift.split(sizes), strict=True)]


def _forward(gm: fx.GraphModule, node: fx.Node, affine: Affine, lazy: Lazy) -> _Way:
    """Who takes in a map of what all readers of `node` read."""
    shares, todo = list[_Share](), [(node, affine)]
    while todo:
        at, part = todo.pop()
        if not at.users:
            return _Way(reason=f"{at.name} is an output")
        for user in at.users:
            leaf = leaf_of(gm, user)
            if isinstance(leaf, Conv | Linear):
                wide = isinstance(leaf, Linear) and len(lazy.shape(at) or ()) != 2
                reason = f"{user.name} works along another dim than the norm" if wide else ""
                if reason := reason or why_not_before(gm, user, leaf, part):
                    return _Way(reason=reason)
                shares.append(_Share(user, part))
                continue
            spread = _spread(gm, user, part, lazy) if isinstance(leaf, Flatten | Reshape) else None
            if spread is None and (reason := _through(gm, user, part, lazy)):
                return _Way(reason=reason)
            todo.append((user, spread or part))
    return _Way(tuple(shares))


def _spread(gm: fx.GraphModule, node: fx.Node, affine: Affine, lazy: Lazy) -> Affine | None:
    """The map per feature behind a flattening of (N, C, …) to (N, features); None for other reshaping."""
    old, new = lazy.shape(source(node)), lazy.shape(node)
    if (
        not keeps_batch(leaf_of(gm, node))
        or old is None
        or new is None
        or len(new) != 2
        or old[0] != new[0]
        or len(old) < 2
        or not math.prod(old[1:])
    ):
        return None
    zero, pixels = affine.scale.new_zeros(old[1]), math.prod(old[2:])
    return Affine(*((v + zero).repeat_interleave(pixels) for v in (affine.scale, affine.shift)))
