"""CB pair: two k×k convolutions with norms and nothing between."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from hantc.core.types import CandidateSpec, Signature
from hantc.ops.cb_stack import KERNELS, WIDTHS, hidden_width
from hantc.ops.family import PAPER
from hantc.ops.layers import Frame, Layer, LayeredFamily, odd_kernel


class CBRes(LayeredFamily):
    """k×k convolution to w·C_out channels (the stride is here), norm; k×k convolution to C_out, norm. Without an
    activation between them the pair is one factorised convolution beside the skip connection."""

    name = "cb_res"
    source = f"{PAPER}, operation pool, CB pair"
    params = MappingProxyType({"k": KERNELS, "w": WIDTHS})

    def plan(self, spec: CandidateSpec, signature: Signature) -> Sequence[tuple[str, Layer]]:
        """Two convolutions."""
        p, f = self.values(spec), Frame(signature)
        k, hidden = odd_kernel(p["k"]), hidden_width(p["w"], f.c_out)
        return [("first", f.resize(f.c_in, hidden, k, act="")), ("second", f.after(hidden, f.c_out, k))]
