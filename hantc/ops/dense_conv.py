"""A DenseNet layer, or a whole block of them, as one wide convolution whose result stands beside the input."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from types import MappingProxyType

from torch import Tensor, nn

from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.activation import activation
from hantc.dialect.shape import Concat
from hantc.ops.cb_stack import hidden_width
from hantc.ops.geometry import Misfit
from hantc.ops.layers import Frame, Layer, LayeredFamily, odd_kernel


class DenseConv(LayeredFamily):
    """1×1 convolution to w times the new channels, norm, ReLU, k×k convolution to the new channels, norm; their
    result is concatenated behind the input, as a dense layer's is (Huang et al. 2017, arXiv 1608.06993). For a
    block of many layers it replaces as many concatenations, whose memory traffic is what makes them slow."""

    name = "dense_conv"
    source = "after DenseNet, arXiv 1608.06993; hantc"
    params = MappingProxyType({"k": (1, 3, 5), "w": (1 / 2, 1.0, 2.0)})
    options = MappingProxyType({"act": "relu"})

    def plan(self, spec: CandidateSpec, signature: Signature) -> Sequence[tuple[str, Layer]]:
        """Two convolutions."""
        p, f = self.values(spec), Frame(signature)
        if f.size != f.out_size or f.c_out <= f.c_in:
            raise Misfit("only where channels are added at one resolution")
        new = f.c_out - f.c_in
        hidden = hidden_width(p["w"], new)
        return [
            ("reduce", f.before(f.c_in, hidden, act=p["act"])),
            ("grow", f.after(hidden, new, odd_kernel(p["k"]))),
        ]

    def build(self, spec: CandidateSpec, signature: Signature) -> nn.Module:
        """The convolutions, the concatenation and the region's own final activation."""
        parts = OrderedDict((name, layer.module()) for name, layer in self.layers(spec, signature))
        return _Beside(nn.Sequential(parts), signature.final_act)


class _Beside(nn.Module):
    def __init__(self, body: nn.Sequential, final: str) -> None:
        super().__init__()
        self.body, self.join = body, Concat(1)
        self.final = activation(final) if final else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H, W)."""
        y: Tensor = self.join(x, self.body(x))
        return self.final(y) if self.final is not None else y
