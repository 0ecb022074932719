"""Lambda bottleneck (Bello 2021, arXiv 2102.08602)."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from hantc.core.types import CandidateSpec, Signature
from hantc.ops.attention import Lambda
from hantc.ops.bot_trans import HEADS, WIDTHS
from hantc.ops.cb_stack import hidden_width
from hantc.ops.family import PAPER
from hantc.ops.layers import Frame, Layer, LayeredFamily


class LambdaLayer(LayeredFamily):
    """Convolution to e·C_out channels (1×1; 3×3 where the resolution changes) with norm and ReLU, a lambda layer
    with four heads, 1×1 convolution to C_out, norm."""

    name = "lambda"
    source = f"{PAPER}, operation pool, lambda layer (arXiv 2102.08602)"
    params = MappingProxyType({"e": WIDTHS})
    options = MappingProxyType({"act": "relu"})

    def plan(self, spec: CandidateSpec, signature: Signature) -> Sequence[tuple[str, Layer]]:
        """Convolution, lambda layer, convolution."""
        p, f = self.values(spec), Frame(signature)
        hidden = hidden_width(p["e"], f.c_out)
        return [
            ("reduce", f.resize(f.c_in, hidden, 1 if f.size == f.out_size else 3, act=p["act"])),
            ("context", Lambda(hidden, f.out_size, HEADS)),
            ("expand", f.after(hidden, f.c_out)),
        ]
