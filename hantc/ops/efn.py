"""MBConv, the block of EfficientNet (Tan & Le 2019, arXiv 1905.11946)."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from hantc.core.types import CandidateSpec, ParamValue, Signature
from hantc.ops.family import PAPER
from hantc.ops.geometry import Misfit
from hantc.ops.layers import Frame, Layer, LayeredFamily, SqueezeExcite, odd_kernel, positive

GRID: dict[str, tuple[ParamValue, ...]] = {"e": (1, 3, 6), "k": (1, 3, 5), "se": (0.0, 0.04, 0.25)}


def expanded(e: float, c_in: int) -> int:
    """Channels inside: e·c_in. Misfit unless e > 0."""
    return max(1, round(positive("e", e) * c_in))


def squeeze_excite(se: float, channels: int, c_in: int, act: str) -> list[tuple[str, Layer]]:
    """The gate on `channels`, squeezed to `se` of the block's input channels as in EfficientNet; none for 0."""
    if not 0 <= se <= 1:
        raise Misfit(f"se={se:g} is not within 0 and 1")
    return [("se", SqueezeExcite(channels, max(1, round(se * c_in)), act))] if se else []


class EFN(LayeredFamily):
    """1×1 convolution to e·C_in channels (none for e = 1), depthwise k×k (the stride is here), each with norm and
    SiLU; squeeze-and-excite; 1×1 convolution to C_out, norm."""

    name = "efn"
    source = f"{PAPER}, operation pool, EfficientNet's inverted residual"
    params = MappingProxyType(GRID)
    options = MappingProxyType({"act": "silu"})

    def plan(self, spec: CandidateSpec, signature: Signature) -> Sequence[tuple[str, Layer]]:
        """Up to three convolutions and the gate."""
        p, f = self.values(spec), Frame(signature)
        k, hidden, act = odd_kernel(p["k"]), expanded(p["e"], f.c_in), p["act"]
        expand: list[tuple[str, Layer]] = []
        if p["e"] != 1:
            expand.append(("expand", f.before(f.c_in, hidden, act=act)))
        return [
            *expand,
            ("depthwise", f.resize(hidden, hidden, k, act=act, groups=hidden)),
            *squeeze_excite(p["se"], hidden, f.c_in, act),
            ("project", f.after(hidden, f.c_out)),
        ]
