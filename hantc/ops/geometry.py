"""Sizes: which stride and padding lead exactly from one resolution to another; widths that engines like."""

from __future__ import annotations

import math

from hantc.core.types import Signature

WIDTH_STEP = 8


class Misfit(Exception):
    """The reason why a layer cannot serve a signature; never leaves this package."""


def round_width(width: float) -> int:
    """`width` channels rounded to a multiple of eight, at least eight.

    Eight float32 values fill an AVX2 register, and are the smallest channel block of ONNX Runtime's blocked
    (NCHWc) convolutions; tensor cores want multiples of eight FP16 values. A width in between costs as much
    as the next multiple, and leaves ONNX Runtime's blocked layout.
    """
    return max(WIDTH_STEP, WIDTH_STEP * math.floor(width / WIDTH_STEP + 0.5))


def strides(signature: Signature) -> tuple[int, int]:
    """Integer strides of height and width."""
    h, w = (_stride(*pair) for pair in zip(signature.in_shape[1:], signature.out_shape[1:], strict=True))
    return h, w


def divides(before: int, after: int, stride: int) -> bool:
    """Whether `after` is before / stride, rounded up or down."""
    return after in (before // stride, -(-before // stride))


def _stride(before: int, after: int) -> int:
    # the ratio's nearest integer, unless its other neighbour alone divides: 10 → 4 is stride 3, not 2
    ratio = before / after
    near = sorted({max(1, math.floor(ratio)), max(1, math.ceil(ratio))}, key=lambda s: abs(s - ratio))
    return next((s for s in near if divides(before, after, s)), near[0])


def pads_for(before: int, after: int, kernel: int, stride: int) -> tuple[int, int]:
    """(begin, end) padding with which an odd `kernel` at `stride` makes exactly `after` of `before`.

    The usual kernel // 2 on both sides where it fits, else as near to it as possible, on both sides alike if
    there is a choice. Misfit if `after` is larger than ⌈before / stride⌉ (a fractional stride) or if the kernel
    is too small to end at `after`.
    """
    same = kernel - 1
    least = (after - 1) * stride + kernel - before
    most = least + stride - 1
    if after > before:
        raise Misfit(f"the resolution grows from {before} to {after}")
    if least > same:
        raise Misfit(f"no integer stride leads from {before} to {after}")
    if most < 0:
        raise Misfit(f"a {kernel}×{kernel} kernel at stride {stride} leaves more than {after} of {before}")
    total = min(same, most)
    if total % 2 and total > max(least, 0):
        total -= 1
    return total // 2, total - total // 2


def resize_pads(signature: Signature, kernel: int) -> tuple[int, int, int, int]:
    """ONNX pads (top, left, bottom, right) of the convolution that changes the resolution. Misfit as above."""
    (top, bottom), (left, right) = (
        pads_for(before, after, kernel, stride)
        for before, after, stride in zip(
            signature.in_shape[1:], signature.out_shape[1:], strides(signature), strict=True
        )
    )
    return top, left, bottom, right
