"""Resize in all modes of the standard, and sampling by grids.

Interpolation is separable: an axis is resized by a matrix (out, in) that the standard's formulas fill.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hantc.core.errors import ModelError, UnsupportedError
from hantc.dialect.leaf import Array, OnnxNode
from hantc.dialect.verbatim import Function

_LARGEST = 1 << 28  # elements of a result


def _coordinates(mode: str, out: int, size: int, scale: float, roi: tuple[float, float]) -> Array:
    """Where in the input each output position lies (`coordinate_transformation_mode`), in float32 and from the whole
    output's size, as ONNX Runtime and torch have it (the standard's text takes scale · size, rounded or not)."""
    y, length, scale = np.arange(out, dtype=np.float32), float(out), float(np.float32(scale))
    if mode == "align_corners":
        return y * np.float32(size - 1) / np.float32(length - 1) if length != 1 else np.zeros(out, np.float32)
    if mode in ("asymmetric", "tf_half_pixel_for_nn"):
        return y / np.float32(scale) if mode == "asymmetric" else (y + np.float32(0.5)) / np.float32(scale)
    if mode == "tf_crop_and_resize":
        wide = (roi[1] - roi[0]) * (size - 1)
        return roi[0] * (size - 1) + (y * wide / (length - 1) if length != 1 else np.full(out, wide / 2))
    if mode == "pytorch_half_pixel" and length == 1:
        return np.zeros(out, np.float32)
    if mode in ("half_pixel", "pytorch_half_pixel"):
        return (y + np.float32(0.5)) / np.float32(scale) - np.float32(0.5)
    if mode == "half_pixel_symmetric":
        return size / 2 * (1 - out / (scale * size)) + (y + 0.5) / scale - 0.5
    raise UnsupportedError(f"Resize with coordinates {mode}")


def _nearest(at: Array, how: str, size: int) -> Array:
    if how == "round_prefer_floor":
        places = np.ceil(at - 0.5)
    elif how == "round_prefer_ceil":
        places = np.floor(at + 0.5)
    else:
        places = np.floor(at) if how == "floor" else np.ceil(at)
    result: Array = np.clip(places, 0, size - 1).astype(np.int64)
    return result


def _linear(distance: Array) -> Array:
    weight: Array = np.clip(1 - np.abs(distance), 0, None)
    return weight


def _cubic(distance: Array, a: float) -> Array:
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _matrix(n: OnnxNode, at: Array, size: int, scale: float) -> Array:
    """(out, in): how much of each input position is in each output position."""
    mode, shrink = n.attrs["mode"], min(scale, 1.0) if n.attrs.get("antialias", 0) else 1.0
    reach = (2 if mode == "cubic" else 1) / shrink
    near = np.floor(at)[:, None] + np.arange(-math.ceil(reach), math.ceil(reach) + 2)
    distance = (near - at[:, None]) * shrink
    weight = _cubic(distance, n.attrs.get("cubic_coeff_a", -0.75)) if mode == "cubic" else _linear(distance)
    if n.attrs.get("exclude_outside", 0):
        weight = np.where((near < 0) | (near >= size), 0.0, weight)
    if n.attrs.get("exclude_outside", 0) or shrink < 1:
        total = weight.sum(1, keepdims=True)
        weight = weight / np.where(total == 0, 1.0, total)
    places = np.clip(near, 0, size - 1).astype(np.int64)  # beyond the edge, the edge's value
    matrix = np.zeros((len(at), size))
    np.add.at(matrix, (np.arange(len(at))[:, None], places), weight)
    return matrix


def _along(n: OnnxNode, x: Tensor, axis: int, out: int, scale: float, roi: tuple[float, float]) -> Tensor:
    """One axis resized."""
    mode, size = n.attrs.get("coordinate_transformation_mode", "half_pixel"), x.shape[axis]
    at = _coordinates(mode, out, size, scale, roi)
    if n.attrs.get("mode", "nearest") == "nearest":
        how = n.attrs.get("nearest_mode", "round_prefer_floor")
        result = torch.index_select(x, axis, torch.from_numpy(_nearest(at, how, size)))
    else:
        matrix = torch.from_numpy(_matrix(n, at, size, scale)).to(x.dtype if x.is_floating_point() else torch.float32)
        moved = (x if x.is_floating_point() else x.float()).movedim(axis, -1)
        result = (moved @ matrix.T).movedim(-1, axis)
        result = result if x.is_floating_point() else torch.round(result).to(x.dtype)
    if mode == "tf_crop_and_resize":
        outside = torch.from_numpy((at < 0) | (at > size - 1))
        shape = [-1 if d == axis else 1 for d in range(x.dim())]
        beyond = torch.tensor(n.attrs.get("extrapolation_value", 0.0), dtype=x.dtype)
        result = torch.where(outside.reshape(shape), beyond, result)
    return result


def _targets(
    n: OnnxNode, x: Tensor, axes: list[int], scales: Tensor | None, sizes: Tensor | None
) -> list[tuple[int, float]]:
    """(size, scale) of each axis after resizing."""
    if sizes is None or not sizes.numel():
        if scales is None or not scales.numel():
            raise UnsupportedError("Resize without scales and sizes")
        return [(math.floor(x.shape[a] * s), s) for a, s in zip(axes, scales.tolist(), strict=True)]
    wanted, policy = [int(s) for s in sizes.tolist()], n.attrs.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return [(w, w / x.shape[a]) for a, w in zip(axes, wanted, strict=True)]
    pick = min if policy == "not_larger" else max
    scale = pick(w / x.shape[a] for a, w in zip(axes, wanted, strict=True))
    return [(math.floor(scale * x.shape[a] + 0.5), scale) for a in axes]


def _resize(n: OnnxNode, x: Tensor, *rest: Tensor | None) -> Tensor:
    if n.opset < 11:  # scales alone
        attrs = {**n.attrs, "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return _resized(OnnxNode(n.op, attrs, n.opset, n.inputs), x, None, rest[0], None)
    roi, scales, sizes = (*rest, None, None, None)[:3]
    return _resized(n, x, roi, scales, sizes)


def _upsample(n: OnnxNode, x: Tensor, scales: Tensor | None = None) -> Tensor:
    given = scales if scales is not None else torch.tensor(n.attrs["scales"])
    return _resize(OnnxNode(n.op, n.attrs, 9, n.inputs), x, given)


def _resized(n: OnnxNode, x: Tensor, roi: Tensor | None, scales: Tensor | None, sizes: Tensor | None) -> Tensor:
    mode = n.attrs.get("mode", "nearest")
    if mode not in ("nearest", "linear", "cubic"):
        raise UnsupportedError(f"Resize in mode {mode}")
    axes = [a % x.dim() for a in n.attrs.get("axes", range(x.dim()))]
    targets = _targets(n, x, axes, scales, sizes)
    if math.prod(t for t, _ in targets) > _LARGEST:
        raise ModelError(f"Resize to {[t for t, _ in targets]} is asked for")
    ends = roi.tolist() if roi is not None and roi.numel() else [0.0] * len(axes) + [1.0] * len(axes)
    cropping = n.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    for i, (axis, (out, scale)) in enumerate(zip(axes, targets, strict=True)):
        if out != x.shape[axis] or scale != 1 or cropping:
            x = _along(n, x, axis, out, scale, (ends[i], ends[len(axes) + i]))
    return x.clone()


_GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def _grid_sample(n: OnnxNode, x: Tensor, grid: Tensor) -> Tensor:
    mode = n.attrs.get("mode", "linear")
    corners = bool(n.attrs.get("align_corners", 0))
    return F.grid_sample(x, grid, _GRID_MODES.get(mode, mode), n.attrs.get("padding_mode", "zeros"), corners)


def _affine_grid(n: OnnxNode, theta: Tensor, size: Tensor) -> Tensor:
    return F.affine_grid(theta, size.tolist(), align_corners=bool(n.attrs.get("align_corners", 0)))


FUNCTIONS: dict[str, Any] = {
    "Resize": Function(_resize),
    "Upsample": Function(_upsample),
    "GridSample": Function(_grid_sample),
    "AffineGrid": Function(_affine_grid),
}
