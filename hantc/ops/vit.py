"""Vision transformer blocks (Dosovitskiy et al. 2021, arXiv 2010.11929) on a feature map."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from hantc.core.types import CandidateSpec, Signature
from hantc.ops.attention import FeedForward, SelfAttention
from hantc.ops.family import PAPER
from hantc.ops.geometry import Misfit
from hantc.ops.layers import Frame, Layer, LayeredFamily


class ViT(LayeredFamily):
    """Convolution to `dim` channels (1×1; 3×3 where the resolution changes), norm; `depth` times self-attention
    with `heads` heads and a feed-forward pair of twice the channels, each with a skip connection; 1×1 convolution
    to C_out, norm. Every position is a token. Norms are batch norms, which fold (LeViT, arXiv 2104.01136)."""

    name = "vit"
    source = f"{PAPER}, operation pool, vision transformer (arXiv 2010.11929)"
    params = MappingProxyType({"depth": (1, 2), "dim": (32, 64, 128, 256, 512, 1024), "heads": (4, 8, 16)})
    options = MappingProxyType({"act": "relu"})

    def plan(self, spec: CandidateSpec, signature: Signature) -> Sequence[tuple[str, Layer]]:
        """Convolution, blocks, convolution."""
        p, f = self.values(spec), Frame(signature)
        dim, depth = int(p["dim"]), int(p["depth"])
        if min(dim, depth, int(p["heads"])) < 1:
            raise Misfit("depth, dim and heads are at least 1")
        layers: list[tuple[str, Layer]] = [
            ("embed", f.resize(f.c_in, dim, 1 if f.size == f.out_size else 3, act="")),
        ]
        for i in range(depth):
            layers.append((f"attention{i}", SelfAttention(dim, f.out_size, int(p["heads"]))))
            layers.append((f"mlp{i}", FeedForward(dim, f.out_size, p["act"])))
        return [*layers, ("project", f.after(dim, f.c_out))]
