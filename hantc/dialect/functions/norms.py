"""Normalisations other than the batch norm in evaluation, which has a leaf of its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hantc.core.errors import UnsupportedError
from hantc.dialect.leaf import OnnxNode
from hantc.dialect.verbatim import Function


def _channels(value: Tensor, rank: int) -> Tensor:
    """(C,) → (C, 1, …), to scale channels of a value of `rank` dims."""
    return value.reshape(-1, *(1,) * (rank - 2))


def _instance(n: OnnxNode, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    eps = n.attrs.get("epsilon", 1e-5)
    dims = tuple(range(2, x.dim()))
    mean, variance = x.mean(dims, keepdim=True), x.var(dims, keepdim=True, correction=0)
    unit = (x - mean) * torch.rsqrt(variance + eps)
    return unit * _channels(scale, x.dim()) + _channels(bias, x.dim())


def _stash(n: OnnxNode, x: Tensor) -> Tensor:
    """The value in the type that the first stage computes in; float32 unless told otherwise."""
    kind = n.attrs.get("stash_type", 1)
    if kind != 1:
        raise UnsupportedError(f"{n.op} with stash_type {kind}")
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _layer(n: OnnxNode, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    axis = n.attrs.get("axis", -1) % x.dim()
    dims = tuple(range(axis, x.dim()))
    value = _stash(n, x)
    mean = value.mean(dims, keepdim=True)
    scatter = torch.rsqrt((value - mean).square().mean(dims, keepdim=True) + n.attrs.get("epsilon", 1e-5))
    out = ((value - mean) * scatter).to(x.dtype) * scale
    return out if bias is None else out + bias, mean, scatter


def _rms(n: OnnxNode, x: Tensor, scale: Tensor) -> Tensor:
    axis = n.attrs.get("axis", -1) % x.dim()
    value = _stash(n, x)
    power = value.square().mean(tuple(range(axis, x.dim())), keepdim=True)
    return (value * torch.rsqrt(power + n.attrs.get("epsilon", 1e-5))).to(x.dtype) * scale


def _group(n: OnnxNode, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups, channels = int(n.attrs["num_groups"]), x.shape[1]
    if scale.numel() == groups != channels:  # opset 18 had one for each group
        scale, bias = (v.repeat_interleave(channels // groups) for v in (scale, bias))
    value = F.group_norm(_stash(n, x), groups, eps=n.attrs.get("epsilon", 1e-5)).to(x.dtype)
    return value * _channels(scale, x.dim()) + _channels(bias, x.dim())


def _lp(n: OnnxNode, x: Tensor) -> Tensor:
    axis, p = n.attrs.get("axis", -1), int(n.attrs.get("p", 2))
    size = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(size == 0, torch.zeros_like(x), x / size.clamp_min(torch.finfo(x.dtype).tiny))


def _mean_variance(n: OnnxNode, x: Tensor) -> Tensor:
    dims = tuple(n.attrs.get("axes", (0, 2, 3)))
    centred = x - x.mean(dims, keepdim=True)
    # as the standard's function body: the small number is added to the deviation
    count = math.prod(x.shape[d] for d in dims)
    deviation: Tensor = torch.linalg.vector_norm(centred, 2, dims, keepdim=True) / math.sqrt(count)
    return centred / (deviation + 1e-9)


def _local_response(n: OnnxNode, x: Tensor) -> Tensor:
    size = int(n.attrs["size"])
    squares = x.square().reshape(x.shape[0], 1, x.shape[1], -1)
    around = F.pad(squares, (0, 0, (size - 1) // 2, size // 2))
    mean = F.avg_pool2d(around, (size, 1), 1).reshape(x.shape)
    power: float = n.attrs.get("beta", 0.75)
    below: Tensor = (n.attrs.get("bias", 1.0) + n.attrs.get("alpha", 1e-4) * mean) ** power
    return x / below


def _batch(n: OnnxNode, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
    """Batch normalisation as files state it, in training mode too: then running statistics come out beside it."""
    eps, momentum = n.attrs.get("epsilon", 1e-5), n.attrs.get("momentum", 0.9)
    if not n.attrs.get("spatial", 1):
        raise UnsupportedError("BatchNormalization with a scale for every pixel (spatial=0)")
    if not n.attrs.get("training_mode", 0):
        return (F.batch_norm(x, mean, variance, scale, bias, False, 0.0, eps),)
    dims = (0, *range(2, x.dim()))
    now = x.mean(dims), x.var(dims, correction=0)
    out = F.batch_norm(x, *now, scale, bias, False, 0.0, eps)
    return out, mean * momentum + now[0] * (1 - momentum), variance * momentum + now[1] * (1 - momentum)


FUNCTIONS: dict[str, Function] = {
    "InstanceNormalization": Function(_instance, weights=(1, 2)),
    "LayerNormalization": Function(_layer, weights=(1, 2)),
    "RMSNormalization": Function(_rms, weights=(1,)),
    "GroupNormalization": Function(_group, weights=(1, 2)),
    "LpNormalization": Function(_lp),
    "MeanVarianceNormalization": Function(_mean_variance),
    "LRN": Function(_local_response),
    "BatchNormalization": Function(_batch, weights=(1, 2)),
}
