"""CBR pair: two k×k convolutions, each with norm and ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from hantc.core.types import CandidateSpec, Signature
from hantc.ops.cb_stack import KERNELS, WIDTHS, hidden_width
from hantc.ops.family import PAPER
from hantc.ops.layers import Frame, Layer, LayeredFamily, odd_kernel


class ConvCS(LayeredFamily):
    """k×k convolution to w·C_out channels (the stride is here), norm, ReLU; k×k convolution to C_out, norm, ReLU:
    what is added to the skip connection is never negative."""

    name = "conv_cs"
    source = f"{PAPER}, operation pool, CBR pairs"
    params = MappingProxyType({"k": KERNELS, "w": WIDTHS})
    options = MappingProxyType({"act": "relu"})

    def plan(self, spec: CandidateSpec, signature: Signature) -> Sequence[tuple[str, Layer]]:
        """Two convolutions."""
        p, f = self.values(spec), Frame(signature)
        k, hidden = odd_kernel(p["k"]), hidden_width(p["w"], f.c_out)
        return [
            ("first", f.resize(f.c_in, hidden, k, act=p["act"])),
            ("second", f.after(hidden, f.c_out, k, act=p["act"])),
        ]
