"""Batch normalisation and constant arithmetic, folded into the convolution or matrix product beside it.

Both are an affine map y = scale·x + shift, per channel or for all; a linear operation takes it in exactly,
after itself always, before itself only where no zero padding stands between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from onnx import NodeProto
from torch import Tensor, fx, nn

from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Binary
from hantc.dialect.graph import leaf_of
from hantc.dialect.leaf import array
from hantc.dialect.linear import Linear
from hantc.dialect.norm import BatchNorm
from hantc.dialect.rewrites.base import Lazy, Log, Outcome, bypass, calls, constant_operand, shared, source, swap
from hantc.dialect.verbatim import Verbatim


@dataclass(frozen=True)
class Affine:
    """scale and shift in float64, with one element (for all) or one per channel."""

    scale: Tensor
    shift: Tensor

    @property
    def finite(self) -> bool:
        """Whether folding keeps every weight a number."""
        return bool(torch.isfinite(self.scale).all() and torch.isfinite(self.shift).all())


Product = Conv | Linear


def rebuilt(
    leaf: Product,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    dilation: tuple[int, ...] | None = None,
) -> Product:
    """A leaf like `leaf` with other parameters (in the dtype that its weight has) and geometry."""
    dtype = leaf.weight.dtype
    new: Product
    with torch.device("meta"):  # no weights are drawn that the given ones would replace
        if isinstance(leaf, Conv):
            new = Conv(
                weight.shape[1] * leaf.groups,
                weight.shape[0],
                tuple(weight.shape[2:]),
                stride or leaf.stride,
                groups=leaf.groups,
                dilation=dilation or leaf.dilation,
                pads=pads or leaf.pads,
            )
        else:
            new = Linear(weight.shape[1], weight.shape[0], gemm=leaf.gemm)
    new.weight = nn.Parameter(weight.detach().to(dtype).clone())
    new.bias = nn.Parameter(bias.detach().to(dtype).clone()) if bias is not None else None
    return new


def _columns(weight: Tensor) -> tuple[int, ...]:
    return (-1,) + (1,) * (weight.dim() - 1)


def norm_map(norm: BatchNorm) -> Affine:
    """What a norm does to its channels in evaluation mode."""
    scale = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return Affine(scale, norm.bias.detach().double() - norm.running_mean.double() * scale)


def after(leaf: Product, affine: Affine) -> Product:
    """`leaf` followed by `affine` on its output channels, as one leaf."""
    weight = leaf.weight.detach().double()
    zero = weight.new_zeros(weight.shape[0])
    bias = leaf.bias.detach().double() if leaf.bias is not None else zero
    scale, shift = affine.scale + zero, affine.shift + zero
    new_bias = bias * scale + shift
    keep = leaf.bias is not None or bool(shift.any())
    return rebuilt(leaf, weight * scale.reshape(_columns(weight)), new_bias if keep else None)


def before(leaf: Product, affine: Affine) -> Product:
    """`affine` on the input channels followed by `leaf`, as one leaf (exact without padding or shift)."""
    weight = leaf.weight.detach().double()
    groups = leaf.groups if isinstance(leaf, Conv) else 1
    zero = weight.new_zeros(weight.shape[1] * groups)
    # row o of a grouped weight sees the input channels of o's group only
    scale, shift = ((v + zero).reshape(groups, 1, -1) for v in (affine.scale, affine.shift))
    by_group = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    extra = (by_group.sum(-1) * shift).sum(-1).reshape(-1)
    bias = leaf.bias.detach().double() if leaf.bias is not None else torch.zeros_like(extra)
    scaled = (by_group * scale.unsqueeze(-1)).reshape(weight.shape)
    keep = leaf.bias is not None or bool(extra.any())
    return rebuilt(leaf, scaled, bias + extra if keep else None)


def why_not_after(gm: fx.GraphModule, node: fx.Node) -> str:
    """Why a map of `node`'s value cannot go into its parameters; "" if it can."""
    if len(node.users) > 1:
        return f"the value of {node.name} is used elsewhere too"
    return f"the weights of {node.name} are used elsewhere too" if shared(gm, node) else ""


def why_not_before(gm: fx.GraphModule, user: fx.Node, leaf: object, affine: Affine) -> str:
    """Why a map of what `user` (which calls `leaf`) reads cannot go into its parameters; "" if it can."""
    if not isinstance(leaf, Conv | Linear):
        return "no convolution or matrix product right before or after it"
    if shared(gm, user):
        return f"the weights of {user.name} are used elsewhere too"
    if isinstance(leaf, Conv) and any(leaf.pads) and bool(affine.shift.any()):
        return f"{user.name} pads with zeros, which the shift would not reach"
    return ""


def _fold(gm: fx.GraphModule, log: Log, node: fx.Node, origin: fx.Node, affine: Affine, *, forward: bool) -> bool:
    """Fold `node`, an affine map of `origin`, backward, else (if `forward`) forward; False with a reason."""
    leaf = leaf_of(gm, origin)
    if not affine.finite:
        log.miss("its constants are not finite", node)
        return False
    reason = ""
    if isinstance(leaf, Conv | Linear):
        reason = why_not_after(gm, origin)
        made = after(leaf, affine)
        if not all(torch.isfinite(p).all() for p in made.parameters()):
            reason = "the weights would be too large for their type"
        if not reason:
            swap(gm, origin, made)
            log.did(f"folded into {origin.name}", origin, node)
            bypass(node, origin)
            return True
    if not forward:
        log.miss(reason or "no convolution or matrix product right before it", node)
        return False
    users = list(node.users)
    leaves = [leaf_of(gm, u) for u in users]
    ahead = next((r for u, v in zip(users, leaves, strict=True) if (r := why_not_before(gm, u, v, affine))), "")
    if ahead or not users:
        log.miss(reason or ahead, node)
        return False
    folded = [before(product, affine) for product in leaves if isinstance(product, Conv | Linear)]
    if not all(torch.isfinite(p).all() for leaf in folded for p in leaf.parameters()):
        log.miss("the weights would be too large for their type", node)
        return False
    for user, product in zip(users, folded, strict=True):
        swap(gm, user, product)
    log.did(f"folded into {', '.join(u.name for u in users)}", node, *users)
    bypass(node, origin)
    return True


def _transposed(gm: fx.GraphModule, log: Log, node: fx.Node, origin: fx.Node, affine: Affine) -> bool:
    """Fold `node` into the transposed convolution `origin`; False where that is none, or with a reason."""
    leaf = leaf_of(gm, origin)
    if (
        not isinstance(leaf, Verbatim)
        or leaf.proto.op_type != "ConvTranspose"
        or leaf.proto.domain not in ("", "ai.onnx")
    ):
        return False
    held, names = leaf.held(), list(leaf.proto.input)
    bias = names[2] if len(names) > 2 else ""
    reason = "" if affine.finite else "its constants are not finite"
    reason = reason or why_not_after(gm, origin)
    if names[1] not in held or (bias and bias not in held):
        reason = f"the weights of {origin.name} are computed"
    if reason:
        log.miss(reason, node)
        return False
    weight = torch.as_tensor(held[names[1]])  # (C, C' / groups, …)
    groups = int(leaf.view.attrs.get("group", 1))
    zero = weight.new_zeros(weight.shape[1] * groups, dtype=torch.float64)
    scale, shift = affine.scale + zero, affine.shift + zero
    by_group = weight.double().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    scaled = (by_group * scale.reshape(groups, 1, -1, 1)).reshape(weight.shape)
    old = torch.as_tensor(held[bias]).double() if bias else zero
    proto = NodeProto()
    proto.CopyFrom(leaf.proto)
    fresh = f"{names[1]}_bias"
    while fresh in names:
        fresh += "_"
    proto.input[:] = [*names[:2], bias or fresh]
    constants = {
        names[1]: array(scaled.to(weight.dtype)),
        proto.input[2]: array((old * scale + shift).to(weight.dtype)),
    }
    swap(gm, origin, Verbatim(proto, leaf.names, constants, leaf.opsets, leaf.function))
    log.did(f"folded into {origin.name}", origin, node)
    bypass(node, origin)
    return True


def _touches_wide_linear(gm: fx.GraphModule, node: fx.Node, lazy: Lazy) -> bool:
    """Whether a `Linear` beside `node` works on another dim than 1, where a norm's channels are."""
    beside = [source(node), *node.users]
    linear = [leaf_of(gm, n) for n in beside if isinstance(leaf_of(gm, n), Linear)]
    if all(isinstance(leaf, Linear) and leaf.gemm for leaf in linear):
        return False
    shape = lazy.shape(source(node))
    return shape is None or len(shape) != 2


class FoldNorm:
    """BatchNorm → the convolution (transposed ones too) or matrix product before it, else the ones after it."""

    name = "fold_norm"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Fold every batch norm that can be; the others stay, each with its reason."""
        log, lazy = Log(self.name), Lazy(gm)
        for node, norm in calls(gm, BatchNorm):
            if _touches_wide_linear(gm, node, lazy):
                log.miss("the matrix product beside it may run along another dim than the norm", node)
                continue
            affine = norm_map(norm)
            if not _transposed(gm, log, node, source(node), affine):
                _fold(gm, log, node, source(node), affine, forward=True)
        return log.finish(gm)


def _affine(op: str, value: Tensor, constant_right: bool) -> Affine | None:
    """`x op value` (or `value op x`) as an affine map of x; None where it is not one."""
    c = value.detach().double().reshape(-1)
    one, zero = torch.ones_like(c), torch.zeros_like(c)
    if op == "Mul":
        return Affine(c, zero)
    if op == "Add":
        return Affine(one, c)
    if op == "Sub":
        return Affine(one, -c) if constant_right else Affine(-one, c)
    if op == "Div" and constant_right and bool(c.all()):
        return Affine(1 / c, zero)
    return None


def channel_map(gm: fx.GraphModule, node: fx.Node, leaf: Binary, lazy: Lazy) -> tuple[fx.Node, Affine] | None:
    """(what a node of constant arithmetic scales or shifts channel by channel, how); None where it does otherwise."""
    operand = constant_operand(gm, node)
    if operand is None or not operand[1].is_floating_point():
        return None
    origin, value, is_right = operand
    shape = lazy.shape(node)
    if shape is None or len(shape) < 2 or shape != lazy.shape(origin) or value.dim() > len(shape):
        return None
    full = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    along = all(d == 1 for i, d in enumerate(full) if i != 1) and full[1] in (1, shape[1])
    affine = _affine(leaf.op, value, is_right) if along else None
    return (origin, affine) if affine is not None else None


def _why_not_channels(leaf: Product, value: Tensor, lazy: Lazy, node: fx.Node) -> str:
    """Why a constant beside `leaf`'s output does not act channel by channel; "" if it does."""
    if isinstance(leaf, Conv):
        rank, channel, count = leaf.weight.dim(), 1, leaf.weight.shape[0]
    else:
        shape = lazy.shape(node)
        rank = len(shape) if shape else (2 if leaf.gemm else 1)
        channel, count = rank - 1, leaf.weight.shape[0]
    if value.dim() > rank:
        return "the constant has more dims than the value"
    full = (1,) * (rank - value.dim()) + tuple(value.shape)
    if any(d != 1 for i, d in enumerate(full) if i != channel) or full[channel] not in (1, count):
        return f"the constant of shape {list(value.shape)} varies along more than the channels"
    return ""


def _convolved(gm: fx.GraphModule, node: fx.Node, origin: fx.Node, value: Tensor, lazy: Lazy) -> bool:
    """Whether all that reads `node` are convolutions of as many channels as the constant varies along, which widens
    nothing."""
    leaves = [leaf_of(gm, user) for user in node.users]
    shape = lazy.shape(node)
    widens = shape is None or shape != lazy.shape(origin)
    if not leaves or shape is None or widens or not all(isinstance(leaf, Conv) for leaf in leaves):
        return False
    full = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    return len(full) == len(shape) and all(d == 1 for i, d in enumerate(full) if i != 1) and full[1] in (1, shape[1])


class FoldAffine:
    """Mul, Add, Sub or Div by a constant per channel → the convolution or matrix product before it, else the
    convolutions after it (as where a file begins with its own preprocessing)."""

    name = "fold_affine"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Fold every such node that stands beside a convolution or matrix product."""
        log, lazy = Log(self.name), Lazy(gm)
        for node, binary in calls(gm, Binary):
            operand = constant_operand(gm, node)
            if operand is None:
                continue
            origin, value, is_right = operand
            leaf = leaf_of(gm, origin)
            product = leaf if isinstance(leaf, Conv | Linear) else None
            if not value.is_floating_point() or not (product or _convolved(gm, node, origin, value, lazy)):
                continue
            affine = _affine(binary.op, value, is_right)
            if affine is None:
                log.miss(f"{binary.op} with this constant is no scaling or shift", node)
                continue
            reason = _why_not_channels(product, value, lazy, origin) if product else ""
            if reason:
                log.miss(reason, node)
                continue
            _fold(gm, log, node, origin, affine, forward=product is None)
        return log.finish(gm)
