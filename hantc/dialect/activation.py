"""Activations and other operations of one operand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor

from hantc.core.errors import UnsupportedError
from hantc.dialect.leaf import EmitContext, Leaf, OnnxNode

UNARY: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "Relu": torch.relu,
        "Sigmoid": torch.sigmoid,
        "Tanh": torch.tanh,
        "Softplus": F.softplus,
        "Softsign": F.softsign,
        "Erf": torch.erf,
        "Exp": torch.exp,
        "Log": torch.log,
        "Sqrt": torch.sqrt,
        "Reciprocal": torch.reciprocal,
        "Neg": torch.neg,
        "Abs": torch.abs,
        "Floor": torch.floor,
        "Ceil": torch.ceil,
    }
)


class Unary(Leaf):
    """An element-wise function without parameters."""

    ops: ClassVar[tuple[str, ...]] = tuple(UNARY)

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return UNARY[self.op](x)

    @classmethod
    def parse(cls, node: OnnxNode) -> Unary:
        return cls(node.op)

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        return e.node(self.op, xs)

    def extra_repr(self) -> str:
        return self.op


class Silu(Leaf):
    """x·σ(x); ONNX has no such op, so it is emitted as Sigmoid and Mul, which engines fuse."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return F.silu(x)

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        return e.node("Mul", [xs[0], e.node("Sigmoid", xs)])


class HardSwish(Leaf):
    """x·max(0, min(1, x/6 + 1/2)); before opset 14 emitted as HardSigmoid and Mul."""

    ops: ClassVar[tuple[str, ...]] = ("HardSwish",)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return F.hardswish(x)

    @classmethod
    def parse(cls, node: OnnxNode) -> HardSwish:
        return cls()

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        if e.opset >= 14:
            return e.node("HardSwish", xs)
        return e.node("Mul", [xs[0], e.node("HardSigmoid", xs, {"alpha": 1 / 6, "beta": 0.5})])


class HardSigmoid(Leaf):
    """max(0, min(1, alpha·x + beta))."""

    ops: ClassVar[tuple[str, ...]] = ("HardSigmoid",)

    def __init__(self, alpha: float = 1 / 6, beta: float = 0.5) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return torch.clamp(self.alpha * x + self.beta, 0, 1)

    @classmethod
    def parse(cls, node: OnnxNode) -> HardSigmoid:
        return cls(float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5)))

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        return e.node("HardSigmoid", xs, {"alpha": self.alpha, "beta": self.beta})


class LeakyRelu(Leaf):
    """x where positive, alpha·x elsewhere."""

    ops: ClassVar[tuple[str, ...]] = ("LeakyRelu",)

    def __init__(self, alpha: float = 0.01) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return F.leaky_relu(x, self.alpha)

    @classmethod
    def parse(cls, node: OnnxNode) -> LeakyRelu:
        return cls(float(node.attrs.get("alpha", 0.01)))

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        return e.node("LeakyRelu", xs, {"alpha": self.alpha})


class Clip(Leaf):
    """Clamp to [low, high]; ReLU6 is Clip(0, 6)."""

    ops: ClassVar[tuple[str, ...]] = ("Clip",)

    def __init__(self, low: float = -math.inf, high: float = math.inf) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.dtype: np.dtype[Any] = np.dtype(np.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        if self.low == -math.inf and self.high == math.inf:
            return x
        kind = float if x.is_floating_point() else int  # float bounds would turn integers into floats
        low, high = (kind(v) if math.isfinite(v) else None for v in (self.low, self.high))
        return torch.clamp(x, low, high)

    @classmethod
    def parse(cls, node: OnnxNode) -> Clip:
        if node.opset < 11:
            low, high = node.attrs.get("min", -math.inf), node.attrs.get("max", math.inf)
        else:
            low = node.require_const(1, "min").item() if node.has(1) else -math.inf
            high = node.require_const(2, "max").item() if node.has(2) else math.inf
        leaf = cls(float(low), float(high))
        if math.isnan(leaf.low) or math.isnan(leaf.high) or leaf.low == math.inf or leaf.high == -math.inf:
            raise UnsupportedError(f"Clip to [{low}, {high}]")
        bound = node.const(1) if node.const(1) is not None else node.const(2)
        leaf.dtype = bound.dtype if bound is not None else leaf.dtype
        return leaf

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        if e.opset < 11:
            attrs = {"min": self.low, "max": self.high}
            return e.node("Clip", xs, {k: float(v) for k, v in attrs.items() if math.isfinite(v)})
        bounds: list[gs.Tensor] = []
        for value, hint in ((self.low, "min"), (self.high, "max")):
            bounds.append(e.const(np.array(value, self.dtype), hint) if math.isfinite(value) else gs.Variable.empty())
        while bounds and bounds[-1].is_empty():
            bounds.pop()
        return e.node("Clip", [xs[0], *bounds])


class Softmax(Leaf):
    """Softmax over one axis. `rank` of the value, where known, tells whether that is the last."""

    ops: ClassVar[tuple[str, ...]] = ("Softmax",)

    def __init__(self, axis: int = -1, rank: int | None = None) -> None:
        super().__init__()
        self.axis, self.rank = axis, rank

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return torch.softmax(x, self.axis)

    @classmethod
    def parse(cls, node: OnnxNode) -> Softmax:
        axis = int(node.attrs.get("axis", -1 if node.opset >= 13 else 1))
        if node.opset < 13:
            # before opset 13 all dims from `axis` on were normalised together
            rank = node.rank()
            if axis % rank != rank - 1:
                raise UnsupportedError("Softmax over several dims at once (opset below 13)")
            return cls(rank - 1, rank)
        return cls(axis)

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        last = self.axis == -1 or (self.rank is not None and self.axis == self.rank - 1)
        if e.opset < 13 and not last:
            raise UnsupportedError("Softmax over an inner dim needs opset 13", hint="export the model with opset 13")
        return e.node("Softmax", xs, {"axis": self.axis})


def activation(name: str) -> Leaf:
    """A fresh activation leaf by its common name; KeyError for unknown names."""
    makers: dict[str, Callable[[], Leaf]] = {
        "relu": lambda: Unary("Relu"),
        "relu6": lambda: Clip(0.0, 6.0),
        "silu": Silu,
        "hardswish": HardSwish,
        "hardsigmoid": HardSigmoid,
        "sigmoid": lambda: Unary("Sigmoid"),
        "tanh": lambda: Unary("Tanh"),
        "leakyrelu": LeakyRelu,
    }
    return makers[name]()


def activation_name(leaf: object) -> str:
    """Common name of an activation leaf, "" if the leaf is none."""
    if isinstance(leaf, Unary):
        return {"Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh"}.get(leaf.op, "")
    if isinstance(leaf, Clip):
        return "relu6" if (leaf.low, leaf.high) == (0.0, 6.0) else ""
    names: dict[type, str] = {Silu: "silu", HardSwish: "hardswish", HardSigmoid: "hardsigmoid", LeakyRelu: "leakyrelu"}
    return names.get(type(leaf), "")
