"""Quantised operators, in float arithmetic with the file's rounding: a model that is already quantised computes here
what it computes in ONNX Runtime, up to a rounding step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hantc.core.errors import UnsupportedError
from hantc.dialect.conv import Conv
from hantc.dialect.leaf import OnnxNode
from hantc.dialect.verbatim import Function, through_leaf

_BOUNDS = {
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.uint16: (0, 65535),
    torch.int16: (-32768, 32767),
}
_TYPES = {2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16}


def _along(value: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """A scale or zero point (one for all, one for each slice of `axis`, one for each block) to broadcast with `x`."""
    if value.numel() == 1 and not block:
        return value.reshape(())
    axis %= x.dim()
    if block:
        return value.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return value.reshape([-1 if d == axis else 1 for d in range(x.dim())])


def rounded(x: Tensor, scale: Tensor, zero: Tensor | None, kind: torch.dtype) -> Tensor:
    """x/scale, rounded half to even, plus zero, cut to the type."""
    if kind not in _BOUNDS:
        raise UnsupportedError(f"quantisation to {kind}")
    low, high = _BOUNDS[kind]
    steps = torch.round(x / scale).double()
    return torch.clamp(steps if zero is None else steps + zero.double(), low, high).to(torch.int64).to(kind)


def _quantize(n: OnnxNode, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    axis, block = n.attrs.get("axis", 1), n.attrs.get("block_size", 0)
    wanted = n.attrs.get("output_dtype", 0)
    if n.attrs.get("precision", 0) not in (0, 1) or (wanted and wanted not in _TYPES):
        raise UnsupportedError(f"QuantizeLinear to ONNX type {wanted}")
    kind = zero.dtype if zero is not None else _TYPES[wanted or 2]
    full = None if zero is None else _along(zero.to(torch.int64), x, axis, block)
    return rounded(x, _along(scale, x, axis, block).to(x.dtype), full, kind)


def dequantized(x: Tensor, scale: Tensor, zero: Tensor | None, axis: int = 1, block: int = 0) -> Tensor:
    """(x − zero) · scale."""
    whole = x.to(torch.int64)
    if zero is not None:
        whole = whole - _along(zero.to(torch.int64), x, axis, block)
    return whole.to(scale.dtype) * _along(scale, x, axis, block)


def _dequantize(n: OnnxNode, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    if x.is_floating_point() or n.attrs.get("output_dtype", 0) not in (0, 1, 10):
        raise UnsupportedError("DequantizeLinear of or to a rare type")
    out = dequantized(x, scale, zero, n.attrs.get("axis", 1), n.attrs.get("block_size", 0))
    return out.half() if n.attrs.get("output_dtype", 0) == 10 else out


def _dynamic(n: OnnxNode, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.clamp(torch.round(-low / scale), 0, 255).to(torch.uint8)
    return rounded(x, scale, zero, torch.uint8), scale, zero


def _conv(n: OnnxNode, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    names = ("x", "w", "b") if bias is not None else ("x", "w")
    node = OnnxNode("Conv", n.attrs, n.opset, names, outputs=("y",))
    args = (x, weight) if bias is None else (x, weight, bias)
    out = through_leaf(Conv).compute(node, *args)
    assert isinstance(out, Tensor)
    return out


def _q_conv(
    n: OnnxNode, x: Tensor, xs: Tensor, xz: Tensor, w: Tensor, ws: Tensor, wz: Tensor, ys: Tensor, yz: Tensor,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    weight = dequantized(w, ws, wz, 0)
    shift = None if bias is None else bias.to(xs.dtype) * (xs * ws)
    return rounded(_conv(n, dequantized(x, xs, xz), weight, shift), ys, yz, yz.dtype)


def _last(value: Tensor, x: Tensor, *, rows: bool) -> Tensor:
    """A scale or zero point of each row (left operand) or column (right one) of a matrix, to broadcast with it."""
    if value.dim() != 1 or value.numel() == 1:
        return value.reshape(()) if value.numel() == 1 else value
    return value.unsqueeze(-1) if rows else value


def _q_matmul(
    n: OnnxNode, a: Tensor, as_: Tensor, az: Tensor, b: Tensor, bs: Tensor, bz: Tensor, ys: Tensor, yz: Tensor
) -> Tensor:
    kind = as_.dtype
    left = (a.to(torch.int64) - _last(az, a, rows=True).to(torch.int64)).double() * _last(as_, a, rows=True).double()
    right = (b.to(torch.int64) - _last(bz, b, rows=False).to(torch.int64)).double() * _last(bs, b, rows=False).double()
    return rounded((left @ right).to(kind if kind != torch.float16 else torch.float32), ys.float(), yz, yz.dtype)


def _integers(x: Tensor, zero: Tensor | None, *, rows: bool) -> Tensor:
    """Exact in doubles: products of bytes."""
    value = x.double()
    return value if zero is None else value - _last(zero, x, rows=rows).double()


def _matmul_integer(n: OnnxNode, a: Tensor, b: Tensor, az: Tensor | None = None, bz: Tensor | None = None) -> Tensor:
    return (_integers(a, az, rows=True) @ _integers(b, bz, rows=False)).to(torch.int32)


def _conv_integer(n: OnnxNode, x: Tensor, w: Tensor, xz: Tensor | None = None, wz: Tensor | None = None) -> Tensor:
    value = x.double() if xz is None else x.double() - xz.double()
    weight = w.double() if wz is None else w.double() - _along(wz.double(), w, 0, 0)
    return torch.round(_conv(n, value, weight, None)).to(torch.int32)


FUNCTIONS: dict[str, Any] = {
    "QuantizeLinear": Function(_quantize),
    "DequantizeLinear": Function(_dequantize),
    "DynamicQuantizeLinear": Function(_dynamic),
    "QLinearConv": Function(_q_conv),
    "QLinearMatMul": Function(_q_matmul),
    "MatMulInteger": Function(_matmul_integer),
    "ConvInteger": Function(_conv_integer),
}
