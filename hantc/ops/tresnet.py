"""TResNet's blocks (Ridnik et al. 2021, arXiv 2003.13630): made to be fast as measured, not as counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.conv import Conv
from hantc.ops.cb_stack import hidden_width
from hantc.ops.geometry import Misfit
from hantc.ops.layers import ConvBN, Frame, Layer, LayeredFamily, SqueezeExcite


@dataclass(frozen=True)
class Blur:
    """Anti-alias downsampling (Zhang 2019, arXiv 1904.11486): a depthwise binomial kernel at the stride, which
    may be trained on. `conv` is where it stands."""

    conv: ConvBN

    @property
    def weights(self) -> int:
        """Trainable values."""
        return self.conv.weights

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample."""
        return self.conv.macs

    def check(self) -> None:
        """As the convolution."""
        self.conv.check()

    def module(self) -> nn.Module:
        """The layer itself."""
        made = self.conv.module()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        for leaf in made:
            if isinstance(leaf, Conv):
                with torch.no_grad():
                    leaf.weight.copy_(torch.outer(line, line).expand_as(leaf.weight))
        return made


class TResNet(LayeredFamily):
    """Two 3×3 convolutions (`block` basic) or 1×1, 3×3, 1×1 (bottle) with w·C_out channels inside, norms and leaky
    ReLU. The resolution changes by blurring between them; the squeeze-and-excite gate (`se` of the inner
    channels) stands before the last one, where it is lightest."""

    name = "tresnet"
    source = "TResNet, arXiv 2003.13630"
    params = MappingProxyType({"block": ("basic", "bottle"), "w": (1 / 4, 1 / 2, 1.0), "se": (0.0, 0.25)})
    options = MappingProxyType({"act": "leakyrelu"})

    def plan(self, spec: CandidateSpec, signature: Signature) -> Sequence[tuple[str, Layer]]:
        """Convolutions, blur and gate."""
        p, f = self.values(spec), Frame(signature)
        hidden, act, se = hidden_width(p["w"], f.c_out), p["act"], float(p["se"])
        if p["block"] not in ("basic", "bottle"):
            raise Misfit(f"block={p['block']} is neither basic nor bottle")
        if not 0 <= se <= 1:
            raise Misfit(f"se={se:g} is not within 0 and 1")
        basic = p["block"] == "basic"
        layers: list[tuple[str, Layer]] = []
        if basic:
            layers.append(("first", f.before(f.c_in, hidden, 3, act=act)))
        else:
            layers += [("reduce", f.before(f.c_in, hidden, act=act)), ("middle", f.before(hidden, hidden, 3, act=act))]
        if f.size != f.out_size:
            layers.append(("blur", Blur(f.resize(hidden, hidden, 3, act="", groups=hidden))))
        if se:
            layers.append(("se", SqueezeExcite(hidden, max(1, round(se * hidden)), "relu")))
        return [*layers, ("last", f.after(hidden, f.c_out, 3 if basic else 1))]
