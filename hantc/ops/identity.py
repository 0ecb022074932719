"""Leaving a region out: the identity, or its form that pools and pads where resolution or channels change."""

from __future__ import annotations

from torch import Tensor, nn

from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.activation import activation
from hantc.dialect.pool import Pool
from hantc.dialect.shape import Pad
from hantc.ops.family import PAPER, Family, unserved, unserved_tokens
from hantc.ops.geometry import divides, strides

IDEMPOTENT = frozenset({"relu", "relu6"})


class Identity(Family):
    """The input itself. A lower resolution is reached by averaging stride×stride windows, more channels by zeros
    behind the given ones (He et al. 2016, arXiv 1512.03385, option A); channels are never dropped.

    A final activation is applied only where doing so twice is the same as once (ReLU, ReLU6): there it can
    only bring the result nearer to the region's own range. The input mostly comes out of the same
    activation already, and SiLU of SiLU is no identity.
    """

    name = "identity"
    source = f"{PAPER}, operation pool, identity"

    def unserved(self, signature: Signature) -> str:
        """Feature maps, and token sequences, whose attention or feed-forward parts can be left out."""
        return unserved_tokens(signature) and unserved(signature)

    def misfit(self, spec: CandidateSpec, signature: Signature) -> str:
        """Channels must not shrink, and each resolution be divided by an integer, rounded up or down."""
        if len(signature.in_shape) == 2:
            return "" if signature.in_shape == signature.out_shape else "the identity keeps tokens and channels"
        c_in, c_out = signature.in_shape[0], signature.out_shape[0]
        if c_out < c_in:
            return f"the identity cannot drop channels ({c_in} to {c_out})"
        sizes = zip(signature.in_shape[1:], signature.out_shape[1:], strides(signature), strict=True)
        for before, after, stride in sizes:
            if after > before:
                return f"the resolution grows from {before} to {after}"
            if not divides(before, after, stride):
                return f"no integer stride leads from {before} to {after}"
        return ""

    def estimate(self, spec: CandidateSpec, signature: Signature) -> tuple[int, int]:
        """Nothing is multiplied and there are no weights."""
        self.require(spec, signature)
        return 0, 0

    def build(self, spec: CandidateSpec, signature: Signature) -> nn.Module:
        """Up to three leaves: pool, pad, activation."""
        return _PoolPad(signature)


class _PoolPad(nn.Module):
    def __init__(self, signature: Signature) -> None:
        super().__init__()
        stride = strides(signature) if len(signature.in_shape) > 2 else (1, 1)
        self.pool: Pool | None = None
        self.pad: Pad | None = None
        if stride != (1, 1):
            missing = [
                max(0, after * s - before)
                for before, after, s in zip(signature.in_shape[1:], signature.out_shape[1:], stride, strict=True)
            ]
            # explicit padding that does not count, as engines disagree on ceil_mode
            pads = [m // 2 for m in missing] + [m - m // 2 for m in missing]
            self.pool = Pool("AveragePool", stride, stride, pads)
        if extra := signature.out_shape[0] - signature.in_shape[0]:
            self.pad = Pad([0, 0, 0, 0, 0, extra, 0, 0])
        self.final = activation(signature.final_act) if signature.final_act in IDEMPOTENT else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, *in_shape) → (N, *out_shape)."""
        for part in (self.pool, self.pad, self.final):
            if part is not None:
                x = part(x)
        return x
