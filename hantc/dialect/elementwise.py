"""Element-wise operations of two operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from hantc.core.errors import UnsupportedError
from hantc.dialect.leaf import EmitContext, Leaf, OnnxNode

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch holds them and computes with none


def signed(x: Tensor) -> Tensor:
    """Unsigned integers that torch cannot compute with as int64, where sums, differences and products wrap alike."""
    return x.to(torch.int64) if x.dtype in _UNSIGNED else x


def _div(a: Tensor, b: Tensor) -> Tensor:
    # ONNX integer division truncates towards zero
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _pow(a: Tensor, b: Tensor) -> Tensor:
    # the result has the base's type, an integer's power of a float too
    return torch.pow(a, b).to(a.dtype)


BINARY: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": _div, "Pow": _pow}
)


class Binary(Leaf):
    """Broadcasting element-wise `op` of two tensors."""

    ops: ClassVar[tuple[str, ...]] = tuple(BINARY)
    data = (0, 1)

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Broadcast of a and b."""
        try:
            return BINARY[self.op](a, b)
        except NotImplementedError:  # not asked beforehand: the forward must stay traceable
            return BINARY[self.op](signed(a), signed(b)).to(a.dtype)

    @classmethod
    def parse(cls, node: OnnxNode) -> Binary:
        if node.opset < 7:
            raise UnsupportedError(f"{node.op} with the broadcasting of opset {node.opset}")
        return cls(node.op)

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        return e.node(self.op, xs)

    def extra_repr(self) -> str:
        return self.op


class Add(Binary):
    """Sum of two tensors (the skip connection of candidates)."""

    ops: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__("Add")


class Mul(Binary):
    """Product of two tensors (the gate of candidates)."""

    ops: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__("Mul")
