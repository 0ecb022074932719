"""Element-wise functions of two or more operands: arithmetic, comparison, logic, choice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hantc.core.errors import UnsupportedError
from hantc.dialect.elementwise import BINARY, signed
from hantc.dialect.leaf import OnnxNode
from hantc.dialect.verbatim import Function

Pair = Callable[[Tensor, Tensor], Tensor]


def _binary(f: Pair, *, keep: bool = True) -> Function:
    """A broadcasting function of two. `keep`: the result has the first operand's type, else it is a truth value."""

    def compute(n: OnnxNode, a: Tensor, b: Tensor) -> Tensor:
        if n.opset < 7:
            raise UnsupportedError(f"{n.op} with the broadcasting of opset {n.opset}")
        result = f(signed(a), signed(b))
        return result.to(a.dtype) if keep else result

    return Function(compute)


def _many(f: Pair) -> Callable[..., Tensor]:
    def compute(n: OnnxNode, *xs: Tensor) -> Tensor:
        return functools.reduce(f, (signed(x) for x in xs)).to(xs[0].dtype)

    return compute


def _mean(n: OnnxNode, *xs: Tensor) -> Tensor:
    return functools.reduce(torch.add, xs) / len(xs)


def _mod(n: OnnxNode, a: Tensor, b: Tensor) -> Tensor:
    f = torch.fmod if n.attrs.get("fmod", 0) else torch.remainder
    return f(signed(a), signed(b)).to(a.dtype)


def _shift(n: OnnxNode, a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.uint64:
        raise UnsupportedError("torch shifts no 64-bit unsigned integers")
    shift: Pair = torch.bitwise_left_shift if n.attrs["direction"] == "LEFT" else torch.bitwise_right_shift
    return shift(a.to(torch.int64), b.to(torch.int64)).to(a.dtype)


def _where(n: OnnxNode, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


def _cast_like(n: OnnxNode, x: Tensor, like: Tensor) -> Tensor:
    if like.is_floating_point() and like.dtype.itemsize == 1:
        raise UnsupportedError("torch's 8-bit floats do not saturate as the standard's do")
    return x.to(like.dtype)


_COMPARE: dict[str, Any] = {
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
}
_COMPUTE: dict[str, Any] = {
    **BINARY,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}

FUNCTIONS: dict[str, Function] = {
    **{op: _binary(f, keep=False) for op, f in _COMPARE.items()},
    **{op: _binary(f) for op, f in _COMPUTE.items()},
    "Max": Function(_many(torch.maximum)),
    "Min": Function(_many(torch.minimum)),
    "Sum": Function(_many(torch.add)),
    "Mean": Function(_mean),
    "Mod": Function(_mod),
    "BitShift": Function(_shift),
    "Where": Function(_where),
    "CastLike": Function(_cast_like),
}
