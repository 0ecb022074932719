"""Sliding windows in all their forms: dilated, padded, rounded up, with positions; transposed convolution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hantc.core.errors import UnsupportedError
from hantc.dialect.conv import explicit_pads
from hantc.dialect.leaf import OnnxNode
from hantc.dialect.verbatim import Function


@dataclass(frozen=True)
class _Windows:
    """Geometry of a pooling over an input of known size; all but `size` one number a spatial dim."""

    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    before: list[int]
    after: list[int]  # with what rounding up adds
    declared: list[int]  # without

    @classmethod
    def of(cls, n: OnnxNode, x: Tensor) -> _Windows:
        kernel = [int(k) for k in n.attrs["kernel_shape"]]
        rank = len(kernel)
        stride = [int(s) for s in n.attrs.get("strides", [1] * rank)]
        dilation = [int(d) for d in n.attrs.get("dilations", [1] * rank)]
        known = OnnxNode(n.op, n.attrs, n.opset, ("x",), shapes={"x": tuple(x.shape)})
        pads = explicit_pads(known, kernel, stride, dilation)
        before, declared, after = pads[:rank], pads[rank:], []
        up = bool(n.attrs.get("ceil_mode", 0))
        for size, k, s, d, b, a in zip(x.shape[2:], kernel, stride, dilation, before, declared, strict=True):
            span, room = d * (k - 1) + 1, size + b + a
            count = (-(-(room - span) // s) if up else (room - span) // s) + 1
            if up and (count - 1) * s >= size + b:  # a window must begin inside
                count -= 1
            after.append((count - 1) * s + span - size - b)
        return cls(kernel, stride, dilation, before, after, declared)

    def __call__(self, x: Tensor, fill: float) -> Tensor:
        """(N, C, …) → (N, C, …, k) with each window's values last; `fill` where windows reach outside."""
        pads = [p for b, a in zip(reversed(self.before), reversed(self.after), strict=True) for p in (b, a)]
        x = F.pad(x, pads, value=fill)
        for i, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
        return x.flatten(-len(self.kernel))


def _average(n: OnnxNode, x: Tensor) -> Tensor:
    windows = _Windows.of(n, x)
    ones = torch.ones_like(x[:1, :1])
    if n.attrs.get("count_include_pad", 0):  # but for what rounding up added
        pads = [p for b, a in zip(reversed(windows.before), reversed(windows.declared), strict=True) for p in (b, a)]
        counted = F.pad(ones, pads, value=1.0)
        rest = [a - d for a, d in zip(windows.after, windows.declared, strict=True)]
        inner = _Windows(windows.kernel, windows.stride, windows.dilation, [0] * len(rest), rest, rest)
        return windows(x, 0.0).sum(-1) / inner(counted, 0.0).sum(-1)
    return windows(x, 0.0).sum(-1) / windows(ones, 0.0).sum(-1)


def _lp(n: OnnxNode, x: Tensor) -> Tensor:
    p = float(n.attrs.get("p", 2))
    size: Tensor = torch.linalg.vector_norm(_Windows.of(n, x)(x, 0.0), p, -1)
    return size


def _global_lp(n: OnnxNode, x: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(x, n.attrs.get("p", 2), tuple(range(2, x.dim())), keepdim=True)
    return size


def _numbers(x: Tensor, column_major: bool) -> Tensor:
    """Each element's position in its storage, of the same shape."""
    if not column_major:
        return torch.arange(x.numel()).reshape(x.shape)
    spatial = list(x.shape[2:])
    turned = torch.arange(x.numel()).reshape(*x.shape[:2], *reversed(spatial))
    return turned.permute(0, 1, *reversed(range(2, x.dim())))


def _max(n: OnnxNode, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    windows = _Windows.of(n, x)
    lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
    values = windows(x, lowest)
    if len([o for o in n.outputs if o]) < 2:
        return values.amax(-1)
    numbers = windows(_numbers(x, bool(n.attrs.get("storage_order", 0))), -1)
    place = torch.where(numbers < 0, torch.full_like(values, lowest), values).argmax(-1, keepdim=True)
    return values.gather(-1, place).squeeze(-1), numbers.gather(-1, place).squeeze(-1)


def _unpool(n: OnnxNode, x: Tensor, places: Tensor, shape: Tensor | None = None) -> Tensor:
    kernel = list(n.attrs["kernel_shape"])
    rank = len(kernel)
    stride, pads = n.attrs.get("strides", [1] * rank), n.attrs.get("pads", [0] * 2 * rank)
    inferred = [
        (size - 1) * s + k - pads[i] - pads[rank + i]
        for i, (size, s, k) in enumerate(zip(x.shape[2:], stride, kernel, strict=True))
    ]
    # positions are those of the inferred size; a larger one leaves room behind
    made = x.new_zeros(math.prod((*x.shape[:2], *inferred)))
    out = made.scatter(0, places.reshape(-1), x.reshape(-1)).reshape(*x.shape[:2], *inferred)
    if shape is not None:
        room = [int(w) - h for w, h in zip(shape.tolist()[2:], inferred, strict=True)]
        out = F.pad(out, [p for r in reversed(room) for p in (0, r)])
    return out


def _transposed_pads(n: OnnxNode, size: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """What a transposed convolution cuts off before and after, negative where it adds."""
    rank = len(kernel)
    strides, dilations = n.attrs.get("strides", [1] * rank), n.attrs.get("dilations", [1] * rank)
    extra = n.attrs.get("output_padding", [0] * rank)
    auto = n.attrs.get("auto_pad", "NOTSET")
    wanted = n.attrs.get("output_shape")
    if wanted is None and auto not in ("SAME_UPPER", "SAME_LOWER"):
        pads = list(n.attrs.get("pads", [0] * 2 * rank)) if auto != "VALID" else [0] * 2 * rank
        return pads[:rank], [p - e for p, e in zip(pads[rank:], extra, strict=True)]
    wanted = [s * k for s, k in zip(size, strides, strict=True)] if wanted is None else wanted[-rank:]
    before, after = [], []
    for s, k, d, st, e, w in zip(size, kernel, dilations, strides, extra, wanted, strict=True):
        total = st * (s - 1) + e + (k - 1) * d + 1 - w
        if total < 0 and auto != "NOTSET":
            raise UnsupportedError("ConvTranspose with auto_pad and a kernel smaller than its stride")
        half = total // 2 if auto == "SAME_UPPER" else total - total // 2
        half = max(half, 0) if total < 0 else half  # what is missing is added behind
        before.append(half)
        after.append(total - half - e)
    return before, after


def _conv_transpose(n: OnnxNode, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = weight.dim() - 2
    if rank not in (1, 2, 3):
        raise UnsupportedError(f"{rank}-d transposed convolution")
    op = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[rank]
    strides, dilations = n.attrs.get("strides", [1] * rank), n.attrs.get("dilations", [1] * rank)
    before, after = _transposed_pads(n, x.shape[2:], weight.shape[2:])
    whole: Tensor = op(x, weight, None, list(strides), 0, 0, int(n.attrs.get("group", 1)), list(dilations))
    out = F.pad(whole, [-p for b, a in zip(reversed(before), reversed(after), strict=True) for p in (b, a)])
    return out if bias is None else out + bias.reshape(-1, *(1,) * rank)


def _col2im(n: OnnxNode, x: Tensor, image: Tensor, block: Tensor) -> Tensor:
    size, kernel = image.tolist(), block.tolist()
    rank = len(size)
    dilations, strides = n.attrs.get("dilations", [1] * rank), n.attrs.get("strides", [1] * rank)
    pads = n.attrs.get("pads", [0] * 2 * rank)
    room = [s + pads[i] + pads[rank + i] for i, s in enumerate(size)]
    counts = [(r - d * (k - 1) - 1) // s + 1 for r, d, k, s in zip(room, dilations, kernel, strides, strict=True)]
    columns = x.reshape(x.shape[0], -1, *kernel, *counts)
    out = x.new_zeros(x.shape[0], columns.shape[1], *room)
    for at in itertools.product(*(range(k) for k in kernel)):
        place = [
            slice(a * d, a * d + s * (c - 1) + 1, s) for a, d, s, c in zip(at, dilations, strides, counts, strict=True)
        ]
        whole: tuple[Any, ...] = (..., *place)
        one: tuple[Any, ...] = (slice(None), slice(None), *at)
        out[whole] += columns[one]
    inner = [slice(pads[i], pads[i] + s) for i, s in enumerate(size)]
    cut: tuple[Any, ...] = (..., *inner)
    return out[cut]


FUNCTIONS: dict[str, Function] = {
    "AveragePool": Function(_average),
    "MaxPool": Function(_max),
    "LpPool": Function(_lp),
    "GlobalLpPool": Function(_global_lp),
    "MaxUnpool": Function(_unpool),
    "ConvTranspose": Function(_conv_transpose, weights=(1, 2)),
    "Col2Im": Function(_col2im),
}
