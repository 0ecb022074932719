"""CBR-CB: two k×k convolutions, the first with ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from hantc.core.types import CandidateSpec, Signature
from hantc.ops.family import PAPER
from hantc.ops.geometry import round_width
from hantc.ops.layers import Frame, Layer, LayeredFamily, odd_kernel, positive

KERNELS = (1, 3, 5, 7)
WIDTHS = (1 / 16, 1 / 10, 1 / 8, 1 / 5, 1 / 4, 1 / 2, 1.0, 2.0, 3.0, 4.0)


def hidden_width(w: float, c_out: int) -> int:
    """Channels inside: w·c_out, rounded to what engines like. Misfit unless w > 0."""
    return round_width(positive("w", w) * c_out)


class CBStack(LayeredFamily):
    """k×k convolution to w·C_out channels (the stride is here), norm, ReLU; k×k convolution to C_out, norm."""

    name = "cb_stack"
    source = f"{PAPER}, operation pool, CBR-CB"
    params = MappingProxyType({"k": KERNELS, "w": WIDTHS})
    options = MappingProxyType({"act": "relu"})

    def plan(self, spec: CandidateSpec, signature: Signature) -> Sequence[tuple[str, Layer]]:
        """Two convolutions."""
        p, f = self.values(spec), Frame(signature)
        k, hidden = odd_kernel(p["k"]), hidden_width(p["w"], f.c_out)
        return [
            ("first", f.resize(f.c_in, hidden, k, act=p["act"])),
            ("second", f.after(hidden, f.c_out, k)),
        ]
