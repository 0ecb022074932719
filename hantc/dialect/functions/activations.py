"""Element-wise functions of one operand, with their attributes; softmaxes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hantc.core.errors import UnsupportedError
from hantc.dialect.leaf import OnnxNode
from hantc.dialect.verbatim import Function


def _elu(n: OnnxNode, x: Tensor) -> Tensor:
    return F.elu(x, n.attrs.get("alpha", 1.0))


def _celu(n: OnnxNode, x: Tensor) -> Tensor:
    return F.celu(x, n.attrs.get("alpha", 1.0))


def _selu(n: OnnxNode, x: Tensor) -> Tensor:
    alpha: float = n.attrs.get("alpha", 1.6732632423543772)
    gamma: float = n.attrs.get("gamma", 1.0507009873554805)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0)))


def _thresholded_relu(n: OnnxNode, x: Tensor) -> Tensor:
    return torch.where(x > n.attrs.get("alpha", 1.0), x, torch.zeros_like(x))


def _gelu(n: OnnxNode, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=n.attrs.get("approximate", "none"))


def _swish(n: OnnxNode, x: Tensor) -> Tensor:
    return x * torch.sigmoid(n.attrs.get("alpha", 1.0) * x)


def _shrink(n: OnnxNode, x: Tensor) -> Tensor:
    edge, bias = n.attrs.get("lambd", 0.5), n.attrs.get("bias", 0.0)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, torch.zeros_like(x))).to(x.dtype)


def _prelu(n: OnnxNode, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _clip(n: OnnxNode, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    # min of max, as the standard has it: torch agrees where low exceeds high
    if low is None and high is None:
        return x.clone()
    return torch.clamp(x, min=low, max=high)


def _flat(n: OnnxNode, x: Tensor, f: Callable[[Tensor, int], Tensor]) -> Tensor:
    """A softmax over one axis, or before opset 13 over all dims from that axis on together."""
    axis = n.attrs.get("axis", -1 if n.opset >= 13 else 1)
    if n.opset >= 13:
        return f(x, axis)
    axis %= max(x.dim(), 1)
    return f(x.reshape(math.prod(x.shape[:axis]), -1), 1).reshape(x.shape)


def _softmax(n: OnnxNode, x: Tensor) -> Tensor:
    return _flat(n, x, lambda v, axis: torch.softmax(v, axis))


def _log_softmax(n: OnnxNode, x: Tensor) -> Tensor:
    return _flat(n, x, lambda v, axis: torch.log_softmax(v, axis))


def _hardmax(n: OnnxNode, x: Tensor) -> Tensor:
    def one(v: Tensor, axis: int) -> Tensor:
        return torch.zeros_like(v).scatter(axis, v.argmax(axis, keepdim=True), 1)

    return _flat(n, x, one)


def _is_inf(n: OnnxNode, x: Tensor) -> Tensor:
    found = torch.zeros_like(x, dtype=torch.bool)
    if n.attrs.get("detect_positive", 1):
        found |= torch.isposinf(x)
    return found | torch.isneginf(x) if n.attrs.get("detect_negative", 1) else found


def _dropout(n: OnnxNode, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Any:
    if training is not None and bool(training) and (ratio is None or float(ratio) > 0):
        raise UnsupportedError("Dropout in training mode is random")
    return x.clone(), torch.ones_like(x, dtype=torch.bool)


def plain(f: Callable[[Tensor], Tensor]) -> Function:
    """A function of one tensor that has no attributes."""
    return Function(lambda n, x: f(x))


FUNCTIONS: dict[str, Function] = {
    "Elu": Function(_elu),
    "Celu": Function(_celu),
    "Selu": Function(_selu),
    "ThresholdedRelu": Function(_thresholded_relu),
    "Gelu": Function(_gelu),
    "Mish": plain(F.mish),
    "Swish": Function(_swish),
    "Shrink": Function(_shrink),
    "PRelu": Function(_prelu, weights=(1,)),
    "Clip": Function(_clip),
    "Softmax": Function(_softmax),
    "LogSoftmax": Function(_log_softmax),
    "Hardmax": Function(_hardmax),
    "Dropout": Function(_dropout),
    "Sign": plain(torch.sign),
    "Round": plain(torch.round),
    "Not": plain(torch.logical_not),
    "BitwiseNot": plain(torch.bitwise_not),
    "IsNaN": plain(torch.isnan),
    "IsInf": Function(_is_inf),
    **{name.capitalize(): plain(getattr(torch, name)) for name in
       ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh")},
    "Det": plain(torch.linalg.det),
}  # fmt: skip
