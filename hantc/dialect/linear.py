"""Matrix products: with a constant weight (`Linear`) or between two activations (`MatMul`)."""

from __future__ import annotations

import math
from typing import ClassVar

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hantc.core.errors import UnsupportedError
from hantc.dialect.leaf import EmitContext, Leaf, OnnxNode, array, in_mixed_precision, tensor


def _scaled(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1 else value * float(factor)


class Linear(Leaf):
    """y = x Wᵀ + b on the last dim. `gemm` says which ONNX op it came from and is emitted as."""

    ops: ClassVar[tuple[str, ...]] = ("Gemm",)
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, gemm: bool = True) -> None:
        super().__init__()
        self.gemm = gemm
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=1 / math.sqrt(in_features))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return self.product(x, self.weight)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """`forward` with another weight of the same shape. Of whole images (two dims: a classifier, a gate) it stays in
        FP32 in mixed precision: that is cheap, and BF16 would round logits as far as they are from a teacher's."""
        if in_mixed_precision() and weight.dtype == torch.float32 and x.dim() == 2:
            with torch.autocast(x.device.type, enabled=False):
                return F.linear(x.float(), weight, self.bias)
        return F.linear(x, weight, self.bias)

    @classmethod
    def parse(cls, node: OnnxNode) -> Linear:
        if node.attrs.get("transA", 0):
            raise UnsupportedError("Gemm with transA")
        weight = _scaled(tensor(node.require_const(1, "weight")), node.attrs.get("alpha", 1.0))
        if not weight.is_floating_point():
            raise UnsupportedError("Gemm of integers")
        weight = weight if node.attrs.get("transB", 0) else weight.T.contiguous()
        with torch.device("meta"):  # no weights are drawn that the file's would replace
            leaf = cls(weight.shape[1], weight.shape[0], bias=False)
        leaf.weight = nn.Parameter(weight)
        if node.has(2):
            bias = _scaled(tensor(node.require_const(2, "bias")), node.attrs.get("beta", 1.0))
            if bias.dim() == 2 and bias.shape[0] != 1:
                raise UnsupportedError("Gemm with a bias that differs by row")
            leaf.bias = nn.Parameter(bias.reshape(-1).expand(weight.shape[0]).clone())
        return leaf

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        if self.gemm:
            bias = array(self.bias) if self.bias is not None else array(self.weight.new_zeros(self.weight.shape[0]))
            return e.node("Gemm", [xs[0], e.const(array(self.weight), "weight"), e.const(bias, "bias")], {"transB": 1})
        out = e.node("MatMul", [xs[0], e.const(array(self.weight.T), "weight")])
        if self.bias is not None:
            out = e.node("Add", [out, e.const(array(self.bias), "bias")])
        return out


class MatMul(Leaf):
    """Matrix product of two activations; with a constant 2-d right side, parsing gives a `Linear`."""

    ops: ClassVar[tuple[str, ...]] = ("MatMul",)
    data = (0, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(…, m, k) × (…, k, n) → (…, m, n)."""
        return torch.matmul(a, b)

    @classmethod
    def parse(cls, node: OnnxNode) -> Leaf:
        right = node.const(1)
        weight = right is not None and right.ndim == 2 and right.dtype.kind == "f"
        if weight and right is not None and node.const(0) is None:
            with torch.device("meta"):
                leaf = Linear(right.shape[0], right.shape[1], bias=False, gemm=False)
            leaf.weight = nn.Parameter(tensor(right.T))
            return leaf
        return cls()

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        return e.node("MatMul", xs)
