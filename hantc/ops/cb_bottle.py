"""CBR-CBR-CB: a bottleneck of three convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from hantc.core.types import CandidateSpec, Signature
from hantc.ops.cb_stack import KERNELS, WIDTHS, hidden_width
from hantc.ops.family import PAPER
from hantc.ops.layers import Frame, Layer, LayeredFamily, odd_kernel


class CBBottle(LayeredFamily):
    """1×1 convolution to w·C_out channels, k×k convolution (the stride is here), 1×1 convolution to C_out; each
    with norm, the first two with ReLU."""

    name = "cb_bottle"
    source = f"{PAPER}, operation pool, CBR-CBR-CB"
    params = MappingProxyType({"k": KERNELS, "w": WIDTHS})
    options = MappingProxyType({"act": "relu"})

    def plan(self, spec: CandidateSpec, signature: Signature) -> Sequence[tuple[str, Layer]]:
        """Three convolutions."""
        p, f = self.values(spec), Frame(signature)
        k, hidden = odd_kernel(p["k"]), hidden_width(p["w"], f.c_out)
        return [
            ("reduce", f.before(f.c_in, hidden, act=p["act"])),
            ("middle", f.resize(hidden, hidden, k, act=p["act"])),
            ("expand", f.after(hidden, f.c_out)),
        ]
