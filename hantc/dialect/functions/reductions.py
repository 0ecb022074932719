"""Reductions over axes, which may be computed; positions of extremes; running sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hantc.dialect.leaf import OnnxNode
from hantc.dialect.verbatim import Function

Over = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _norm(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    if not x.is_floating_point():
        return torch.sum(x.square(), dims, keepdim=keep, dtype=x.dtype).sqrt().to(x.dtype)
    size: Tensor = torch.linalg.vector_norm(x, 2, dims, keepdim=keep)  # whose gradient at zero is zero
    return size


def _same(x: Tensor) -> Tensor:
    return x


def _prod(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    for d in sorted((d % x.dim() for d in dims), reverse=True):
        x = torch.prod(x, d, keepdim=keep, dtype=x.dtype)
    return x


def _sum(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sum(x, dims, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return torch.mean(x, dims, keepdim=keep)


def _extreme(largest: bool) -> Over:
    """Of nothing: the type's least, or its greatest."""

    def over(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
        if all(x.shape[d] for d in dims):
            return torch.amax(x, dims, keepdim=keep) if largest else torch.amin(x, dims, keepdim=keep)
        if x.dtype == torch.bool:
            bound: float = not largest
        elif x.is_floating_point():
            bound = float("-inf") if largest else float("inf")
        else:
            bound = torch.iinfo(x.dtype).min if largest else torch.iinfo(x.dtype).max
        return torch.full_like(torch.sum(x, dims, keepdim=keep), bound, dtype=x.dtype)

    return over


def _log_sum_exp(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return torch.logsumexp(x, dims, keepdim=keep)


def reduce(
    over: Over, before: Callable[[Tensor], Tensor] = _same, after: Callable[[Tensor], Tensor] = _same
) -> Function:
    """`after(over(before(x)))`; over all axes where none are named, or over none (`noop_with_empty_axes`)."""

    def compute(n: OnnxNode, x: Tensor, axes: Tensor | None = None) -> Tensor:
        named = list(n.attrs["axes"]) if "axes" in n.attrs else [] if axes is None else axes.tolist()
        if not named and n.attrs.get("noop_with_empty_axes", 0):
            return after(before(x)).clone()
        dims = tuple(named or range(x.dim()))
        return after(over(before(x), dims, bool(n.attrs.get("keepdims", 1))) if dims else before(x).clone())

    return Function(compute)


def _position(largest: bool) -> Callable[..., Tensor]:
    def compute(n: OnnxNode, x: Tensor) -> Tensor:
        axis, keep = n.attrs.get("axis", 0), bool(n.attrs.get("keepdims", 1))
        last = bool(n.attrs.get("select_last_index", 0))
        seen = x.flip(axis) if last else x
        found = seen.argmax(axis, keepdim=keep) if largest else seen.argmin(axis, keepdim=keep)
        return x.shape[axis] - 1 - found if last else found

    return compute


def _top_k(n: OnnxNode, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    count = int(k) if k is not None else int(n.attrs["k"])
    largest, axis = bool(n.attrs.get("largest", 1)), n.attrs.get("axis", -1)
    # a stable sort puts the first of equals first, as ONNX does and torch.topk does not
    values, places = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


def _running(f: Any, neutral: float) -> Callable[..., Tensor]:
    def compute(n: OnnxNode, x: Tensor, axis: Tensor) -> Tensor:
        d, backwards = int(axis), bool(n.attrs.get("reverse", 0))
        seen = x.flip(d) if backwards else x
        result: Tensor = f(seen, d, dtype=x.dtype)
        if n.attrs.get("exclusive", 0):
            first = torch.full_like(result.narrow(d, 0, 1), neutral)
            result = torch.cat([first, result.narrow(d, 0, result.shape[d] - 1)], d)
        return result.flip(d) if backwards else result

    return compute


FUNCTIONS: dict[str, Function] = {
    "ReduceSum": reduce(_sum),
    "ReduceMean": reduce(_mean),
    "ReduceMax": reduce(_extreme(True)),
    "ReduceMin": reduce(_extreme(False)),
    "ReduceProd": reduce(_prod),
    "ReduceL1": reduce(_sum, torch.abs),
    "ReduceL2": reduce(_norm, torch.abs),
    "ReduceLogSum": reduce(_sum, after=torch.log),
    "ReduceLogSumExp": reduce(_log_sum_exp),
    "ReduceSumSquare": reduce(_sum, torch.square),
    "ArgMax": Function(_position(True)),
    "ArgMin": Function(_position(False)),
    "TopK": Function(_top_k),
    "CumSum": Function(_running(torch.cumsum, 0.0)),
    "CumProd": Function(_running(torch.cumprod, 1.0)),
}
