"""Mixer blocks (Tolstikhin et al. 2021, arXiv 2105.01601): for sequences of tokens, (T, C), in the place of a
transformer's attention or feed-forward part."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn

from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.activation import activation
from hantc.dialect.elementwise import Add
from hantc.dialect.linear import Linear
from hantc.dialect.shape import Transpose
from hantc.ops.family import Family, unserved_tokens
from hantc.ops.geometry import round_width


class Mixer(Family):
    """Two products across tokens with an activation between them, then two across channels, each pair beside what
    comes in. `tokens` and `channels` are the hidden widths, as shares of T and C; 0 leaves the pair out. The second
    product of a pair begins at zero, so that training begins at the identity. Without norms: residual parts of trained
    transformers change their input little, and a norm across channels costs as much as a narrow pair."""

    name = "mixer"
    source = "MLP-Mixer, arXiv 2105.01601"
    params = MappingProxyType({"tokens": (0.0, 0.5, 1.0, 2.0), "channels": (0.0, 0.25, 0.5, 1.0, 2.0)})
    options = MappingProxyType({"act": "relu"})

    def unserved(self, signature: Signature) -> str:
        """Sequences of tokens alone."""
        return unserved_tokens(signature)

    def misfit(self, spec: CandidateSpec, signature: Signature) -> str:
        """It keeps the shape, has no activation behind it, and does something."""
        p = self.values(spec)
        if signature.in_shape != signature.out_shape:
            return f"it keeps the shape: {signature.in_shape} to {signature.out_shape} is another"
        if signature.final_act:
            return "it has no activation at its end"
        if min(p["tokens"], p["channels"]) < 0:
            return "widths are not negative"
        return "" if p["tokens"] or p["channels"] else "the same as the identity"

    def build(self, spec: CandidateSpec, signature: Signature) -> nn.Module:
        """The pairs that are wanted."""
        p, (tokens, channels) = self.values(spec), signature.in_shape
        pairs: list[nn.Module] = []
        if p["tokens"]:
            pairs.append(_Pair(tokens, round_width(p["tokens"] * tokens), p["act"], across=True))
        if p["channels"]:
            pairs.append(_Pair(channels, round_width(p["channels"] * channels), p["act"], across=False))
        return nn.Sequential(*pairs)


class _Pair(nn.Module):
    """Two products along one dim, beside the input."""

    def __init__(self, width: int, hidden: int, act: str, *, across: bool) -> None:
        super().__init__()
        self.turn = Transpose((0, 2, 1)) if across else None
        self.back = Transpose((0, 2, 1)) if across else None
        self.first, self.act = Linear(width, hidden, gemm=False), activation(act)
        self.second, self.add = Linear(hidden, width, gemm=False), Add()
        with torch.no_grad():
            self.second.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) → same."""
        y = x if self.turn is None else self.turn(x)
        y = self.second(self.act(self.first(y)))
        out: Tensor = self.add(y if self.back is None else self.back(y), x)
        return out
