"""Batch normalisation."""

from __future__ import annotations

from typing import ClassVar

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hantc.core.errors import UnsupportedError
from hantc.dialect.leaf import EmitContext, Leaf, OnnxNode, array, tensor


class BatchNorm(Leaf):
    """Batch normalisation over dim 1; batch statistics in training mode, running ones otherwise."""

    ops: ClassVar[tuple[str, ...]] = ("BatchNormalization",)
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, …) → same."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """The affine map (per channel) that the norm is in evaluation mode."""
        scale = self.weight / torch.sqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale

    @classmethod
    def parse(cls, node: OnnxNode) -> BatchNorm:
        if node.attrs.get("training_mode", 0) or len([o for o in node.outputs if o]) > 1:
            raise UnsupportedError("BatchNormalization in training mode")
        if not node.attrs.get("spatial", 1):
            raise UnsupportedError("BatchNormalization with a scale for every pixel (spatial=0)")
        scale, bias, mean, var = (tensor(node.require_const(i, "parameter")) for i in (1, 2, 3, 4))
        leaf = cls(scale.numel(), eps=float(node.attrs.get("epsilon", 1e-5)))
        leaf.weight, leaf.bias = nn.Parameter(scale), nn.Parameter(bias)
        leaf.running_mean, leaf.running_var = mean, var
        return leaf

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        parts = [
            e.const(array(t), hint)
            for t, hint in (
                (self.weight, "scale"),
                (self.bias, "bias"),
                (self.running_mean, "mean"),
                (self.running_var, "var"),
            )
        ]
        return e.node("BatchNormalization", [xs[0], *parts], {"epsilon": self.eps})
