"""Bottleneck transformer (Srinivas et al. 2021, arXiv 2101.11605)."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from hantc.core.types import CandidateSpec, Signature
from hantc.ops.attention import SelfAttention
from hantc.ops.cb_stack import hidden_width
from hantc.ops.family import PAPER
from hantc.ops.layers import Frame, Layer, LayeredFamily

HEADS = 4
WIDTHS = (1 / 4, 1 / 2, 1.0, 2.0, 3.0, 4.0)


class BotTrans(LayeredFamily):
    """Convolution to e·C_out channels (1×1; 3×3 where the resolution changes) with norm and ReLU, self-attention
    with four heads in the place of a bottleneck's 3×3 convolution, 1×1 convolution to C_out, norm."""

    name = "bot_trans"
    source = f"{PAPER}, operation pool, bottleneck transformer (arXiv 2101.11605)"
    params = MappingProxyType({"e": WIDTHS})
    options = MappingProxyType({"act": "relu"})

    def plan(self, spec: CandidateSpec, signature: Signature) -> Sequence[tuple[str, Layer]]:
        """Convolution, what mixes positions, convolution."""
        p, f = self.values(spec), Frame(signature)
        hidden = hidden_width(p["e"], f.c_out)
        return [
            ("reduce", f.resize(f.c_in, hidden, 1 if f.size == f.out_size else 3, act=p["act"])),
            ("mix", self.mixer(hidden, f.out_size)),
            ("expand", f.after(hidden, f.c_out)),
        ]

    def mixer(self, channels: int, size: tuple[int, int]) -> Layer:
        """What mixes positions in the middle, (N, channels, *size) → same."""
        return SelfAttention(channels, size, HEADS)
