"""Shapes as values; operators that pick, repeat, place or pad; their arguments may be computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from onnx import numpy_helper
from torch import Tensor

from hantc.core.errors import ModelError
from hantc.dialect.leaf import OnnxNode, tensor
from hantc.dialect.shape import torch_dtype
from hantc.dialect.verbatim import Function

_LARGEST = 1 << 28  # elements that a computed shape may ask for


def _shape(n: OnnxNode, x: Tensor) -> Tensor:
    dims = list(x.shape)
    end = n.attrs.get("end")
    return torch.tensor(dims[slice(n.attrs.get("start", 0), end if end is not None else len(dims))], dtype=torch.int64)


def _size(n: OnnxNode, x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


def _sizes(values: Tensor) -> list[int]:
    """A computed shape; ModelError for one that no memory holds."""
    dims: list[int] = [int(v) for v in values.reshape(-1).tolist()]
    if math.prod(abs(d) for d in dims) > _LARGEST:
        raise ModelError(f"a shape of {dims} is asked for")
    return dims


def _constant_of_shape(n: OnnxNode, shape: Tensor) -> Tensor:
    value = tensor(numpy_helper.to_array(n.attrs["value"])) if "value" in n.attrs else torch.zeros(1)
    return value.reshape(()).expand(_sizes(shape)).clone()


def _range(n: OnnxNode, start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    first, last, by = (v.item() for v in (start, limit, step))
    count = max(math.ceil((last - first) / by), 0)
    if count > _LARGEST:
        raise ModelError(f"a range of {count} numbers is asked for")
    return (start + step * torch.arange(count, dtype=start.dtype)).to(start.dtype)


def _expand(n: OnnxNode, x: Tensor, shape: Tensor) -> Tensor:
    whole = torch.broadcast_shapes(x.shape, tuple(_sizes(shape)))
    return x.expand(_sizes(torch.tensor(whole))).clone()


def _tile(n: OnnxNode, x: Tensor, repeats: Tensor) -> Tensor:
    _sizes(torch.tensor([x.numel(), *repeats.tolist()]))
    return x.repeat(*repeats.tolist()) if x.dim() else x.clone()


def _split(n: OnnxNode, x: Tensor, split: Tensor | None = None) -> tuple[Tensor, ...]:
    axis, sizes = n.attrs.get("axis", 0), n.attrs.get("split") or (None if split is None else split.tolist())
    if sizes is None:
        count = int(n.attrs.get("num_outputs", len(n.outputs)))
        each, whole = -(-x.shape[axis] // count), x.shape[axis]
        sizes = [max(0, min(each, whole - i * each)) for i in range(count)]
    return tuple(part.clone() for part in torch.split(x, [int(s) for s in sizes], axis))


def _positive(indices: Tensor, size: int) -> Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def _gather(n: OnnxNode, x: Tensor, indices: Tensor) -> Tensor:
    axis = n.attrs.get("axis", 0) % x.dim()
    found = torch.index_select(x, axis, _positive(indices, x.shape[axis]).reshape(-1))
    return found.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _gather_elements(n: OnnxNode, x: Tensor, indices: Tensor) -> Tensor:
    axis = n.attrs.get("axis", 0)
    return torch.gather(x, axis, _positive(indices, x.shape[axis]))


def _places(indices: Tensor) -> tuple[Tensor, ...]:
    return indices.long().unbind(-1)


def _gather_nd(n: OnnxNode, x: Tensor, indices: Tensor) -> Tensor:
    batch = n.attrs.get("batch_dims", 0)
    if not batch:
        return x[_places(indices)]
    flat, at = x.reshape(-1, *x.shape[batch:]), indices.reshape(-1, *indices.shape[batch:])
    found = torch.stack([v[_places(i)] for v, i in zip(flat, at, strict=True)])
    return found.reshape(*x.shape[:batch], *found.shape[1:])


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter_elements(n: OnnxNode, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis, how = n.attrs.get("axis", 0), n.attrs.get("reduction", "none")
    at = _positive(indices, x.shape[axis])
    if how == "none":
        return x.scatter(axis, at, updates)
    return x.scatter_reduce(axis, at, updates, _REDUCE[how])


def _scatter_nd(n: OnnxNode, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    how, out = n.attrs.get("reduction", "none"), x.clone()
    if how in ("none", "add"):
        return out.index_put(_places(indices), updates, accumulate=how == "add")
    for at, value in zip(
        indices.reshape(-1, indices.shape[-1]), updates.reshape(-1, *updates.shape[indices.dim() - 1 :]), strict=True
    ):
        place = tuple(at.tolist())
        pair = {"mul": torch.mul, "max": torch.maximum, "min": torch.minimum}[how]
        out[place] = pair(out[place], value)
    return out


def _one_hot(n: OnnxNode, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count, axis = int(depth), n.attrs.get("axis", -1)
    axis = axis % (indices.dim() + 1)
    _sizes(torch.tensor([indices.numel(), count]))
    places = _positive(indices, count).unsqueeze(axis)  # those out of range are nowhere
    along = torch.arange(count).reshape([-1 if d == axis else 1 for d in range(indices.dim() + 1)])
    return torch.where(places == along, values[1], values[0])


def _trilu(n: OnnxNode, x: Tensor, k: Tensor | None = None) -> Tensor:
    offset = 0 if k is None else int(k)
    return torch.triu(x, offset) if n.attrs.get("upper", 1) else torch.tril(x, offset)


def _non_zero(n: OnnxNode, x: Tensor) -> Tensor:
    return x.nonzero().T if x.dim() else x.reshape(1).nonzero().T


def _compress(n: OnnxNode, x: Tensor, keep: Tensor) -> Tensor:
    axis = n.attrs.get("axis")
    value = x.reshape(-1) if axis is None else x
    return torch.index_select(value, 0 if axis is None else axis, keep.nonzero().reshape(-1))


def _eye_like(n: OnnxNode, x: Tensor) -> Tensor:
    k = n.attrs.get("k", 0)
    kind = torch_dtype(n.attrs["dtype"]) if "dtype" in n.attrs else x.dtype
    rows, columns = (torch.arange(s) for s in x.shape)
    ones: Tensor = columns[None] - rows[:, None] == k
    return ones.to(kind)


def _reshape(n: OnnxNode, x: Tensor, shape: Tensor) -> Tensor:
    copies = not n.attrs.get("allowzero", 0)
    return x.reshape([x.shape[i] if d == 0 and copies else d for i, d in enumerate(shape.tolist())])


def _squeeze(n: OnnxNode, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return (x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))).clone()


def _slice(
    n: OnnxNode, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    first, last = starts.tolist(), ends.tolist()
    along = axes.tolist() if axes is not None else list(range(len(first)))
    by = steps.tolist() if steps is not None else [1] * len(first)
    for a, b, axis, step in zip(first, last, along, by, strict=True):
        if step < 0:  # a start before the first is taken for the first, and an end before it lets that one in
            a = max(a, -x.shape[axis])
            b = b if b >= -x.shape[axis] else None
        chosen = range(*slice(a, b, step).indices(x.shape[axis]))
        x = torch.index_select(x, axis, torch.tensor(list(chosen), dtype=torch.int64))
    return x


def _mirrored(size: int, before: int, after: int, mode: str) -> list[int]:
    """Which positions of a dim a padded one shows; those of cut-off edges are left out."""
    places: Sequence[int] = range(-before, size + after)
    if mode == "edge":
        return [min(max(p, 0), size - 1) for p in places]
    if mode == "wrap":
        return [p % size for p in places]
    period = max(2 * (size - 1), 1)
    return [min(p % period, period - p % period) if size > 1 else 0 for p in places]


def _pad(
    n: OnnxNode, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    mode, amounts = n.attrs.get("mode", "constant"), list(n.attrs["pads"]) if pads is None else pads.tolist()
    if pads is None and "value" in n.attrs:  # both were attributes before opset 11
        value = torch.tensor(n.attrs["value"], dtype=x.dtype)
    along = [a % x.dim() for a in (axes.tolist() if axes is not None else range(x.dim()))]
    _sizes(torch.tensor([s + sum(amounts[i :: len(along)]) if d in along else s
                         for d, s in enumerate(x.shape) for i in [along.index(d) if d in along else 0]]))  # fmt: skip
    for i, axis in enumerate(along):
        before, after = int(amounts[i]), int(amounts[len(along) + i])
        if mode != "constant":
            index = _mirrored(x.shape[axis], before, after, mode)
            x = torch.index_select(x, axis, torch.tensor(index, dtype=torch.int64))
            continue
        start, kept = max(-before, 0), x.shape[axis] - max(-before, 0) - max(-after, 0)
        parts = [x.narrow(axis, start, kept)]
        for amount, front in ((before, True), (after, False)):
            if amount > 0:
                shape = [*x.shape[:axis], amount, *x.shape[axis + 1 :]]
                fill = torch.zeros(shape, dtype=x.dtype) if value is None else value.reshape(()).expand(shape)
                parts = [fill, *parts] if front else [*parts, fill]
        x = torch.cat(parts, axis)
    return x


def _center_crop_pad(n: OnnxNode, x: Tensor, shape: Tensor) -> Tensor:
    wanted = _sizes(shape)
    for axis, size in zip(n.attrs.get("axes", range(x.dim())), wanted, strict=True):
        there = x.shape[axis]
        if size <= there:
            x = x.narrow(axis, (there - size) // 2, size)
            continue
        before, after = (size - there) // 2, (size - there) - (size - there) // 2
        ends = [[*x.shape[: axis % x.dim()], k, *x.shape[axis % x.dim() + 1 :]] for k in (before, after)]
        x = torch.cat([x.new_zeros(ends[0]), x, x.new_zeros(ends[1])], axis)
    return x.clone()


def _reverse_sequence(n: OnnxNode, x: Tensor, lengths: Tensor) -> Tensor:
    batch, time = n.attrs.get("batch_axis", 1), n.attrs.get("time_axis", 0)
    rows = []
    for row, length in zip(x.unbind(batch), lengths.tolist(), strict=True):
        d = time if time < batch else time - 1
        head, tail = row.narrow(d, 0, length), row.narrow(d, length, row.shape[d] - length)
        rows.append(torch.cat([head.flip(d), tail], d))
    return torch.stack(rows, batch)


FUNCTIONS: dict[str, Any] = {
    "Shape": Function(_shape),
    "Size": Function(_size),
    "ConstantOfShape": Function(_constant_of_shape),
    "Range": Function(_range),
    "Expand": Function(_expand),
    "Tile": Function(_tile),
    "Split": Function(_split),
    "Gather": Function(_gather),
    "GatherElements": Function(_gather_elements),
    "GatherND": Function(_gather_nd),
    "ScatterElements": Function(_scatter_elements),
    "Scatter": Function(_scatter_elements),
    "ScatterND": Function(_scatter_nd),
    "OneHot": Function(_one_hot),
    "Trilu": Function(_trilu),
    "NonZero": Function(_non_zero),
    "Compress": Function(_compress),
    "EyeLike": Function(_eye_like),
    "Reshape": Function(_reshape),
    "Squeeze": Function(_squeeze),
    "Slice": Function(_slice),
    "Pad": Function(_pad),
    "CenterCropPad": Function(_center_crop_pad),
    "ReverseSequence": Function(_reverse_sequence),
    "Identity": Function(lambda n, x: x.clone()),
}
