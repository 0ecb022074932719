"""Fused MBConv, the block of EfficientNetV2 (Tan & Le 2021, arXiv 2104.00298)."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from hantc.core.types import CandidateSpec, Signature
from hantc.ops.efn import GRID, expanded, squeeze_excite
from hantc.ops.family import PAPER
from hantc.ops.layers import Frame, Layer, LayeredFamily, odd_kernel


class EFNV2(LayeredFamily):
    """k×k convolution to e·C_in channels (the stride is here) instead of MBConv's 1×1 and depthwise, norm, SiLU;
    squeeze-and-excite; 1×1 convolution to C_out, norm. For e = 1 the k×k convolution stays."""

    name = "efnv2"
    source = f"{PAPER}, operation pool, EfficientNetV2's fused inverted residual"
    params = MappingProxyType(GRID)
    options = MappingProxyType({"act": "silu"})

    def plan(self, spec: CandidateSpec, signature: Signature) -> Sequence[tuple[str, Layer]]:
        """Two convolutions and the gate."""
        p, f = self.values(spec), Frame(signature)
        k, hidden, act = odd_kernel(p["k"]), expanded(p["e"], f.c_in), p["act"]
        return [
            ("expand", f.resize(f.c_in, hidden, k, act=act)),
            *squeeze_excite(p["se"], hidden, f.c_in, act),
            ("project", f.after(hidden, f.c_out)),
        ]
