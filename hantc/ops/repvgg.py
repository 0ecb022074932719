"""RepVGG (Ding et al. 2021, arXiv 2101.03697): branches while training, one convolution when deployed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn

from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.activation import activation
from hantc.dialect.elementwise import Add
from hantc.dialect.norm import BatchNorm
from hantc.ops.cb_stack import KERNELS, WIDTHS, hidden_width
from hantc.ops.family import PAPER
from hantc.ops.geometry import Misfit
from hantc.ops.layers import ConvBN, Frame, Layer, LayeredFamily, odd_kernel


@dataclass(frozen=True)
class RepConv:
    """k×k and 1×1 convolutions side by side, each with norm, and a norm alone where the shapes allow; summed,
    then an activation unless `act` is "". `normalize` merges the branches, so that the deployed layer is one
    convolution; `weights` and `macs` count what is trained."""

    main: ConvBN
    act: str = ""

    @property
    def point(self) -> ConvBN | None:
        """The 1×1 branch; None beside a 1×1 convolution, which it would repeat."""
        m = self.main
        return ConvBN(m.channels, m.size, m.out_size, 1, m.stride, (0, 0, 0, 0)) if m.kernel > 1 else None

    @property
    def through(self) -> bool:
        """Whether the input itself is a branch."""
        return self.main.channels[0] == self.main.channels[1] and self.main.size == self.main.out_size

    @property
    def weights(self) -> int:
        """Trainable values of all branches."""
        return self.main.weights + (self.point.weights if self.point else 0) + 2 * self.main.channels[0] * self.through

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample, branches apart."""
        return self.main.macs + (self.point.macs if self.point else 0)

    def check(self) -> None:
        """Misfit where the branches would look at different pixels."""
        self.main.check()
        half, m = self.main.kernel // 2, self.main
        if m.pads is not None and m.pads[:2] != (half, half):
            raise Misfit(
                f"a {m.kernel}×{m.kernel} kernel padded by {m.pads[0]} is not centred on the 1×1 branch's pixel"
            )
        last = tuple((n - 1) * s for n, s in zip(m.out_size, m.stride, strict=True))
        if any(at >= size for at, size in zip(last, m.size, strict=True)):
            raise Misfit("the 1×1 branch would leave the image")

    def module(self) -> nn.Module:
        """The layer itself."""
        return _Branches(self)


class _Branches(nn.Module):
    def __init__(self, plan: RepConv) -> None:
        super().__init__()
        self.main = plan.main.module()
        self.point = plan.point.module() if plan.point else None
        self.add = Add() if plan.point else None
        self.through = BatchNorm(plan.main.channels[0]) if plan.through else None
        self.add2 = Add() if plan.through else None
        self.act = activation(plan.act) if plan.act else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H', W')."""
        y: Tensor = self.main(x)
        if self.point is not None and self.add is not None:
            y = self.add(y, self.point(x))
        if self.through is not None and self.add2 is not None:
            y = self.add2(y, self.through(x))
        return self.act(y) if self.act is not None else y


class RepVGG(LayeredFamily):
    """Two RepVGG layers: k×k to w·C_out channels (the stride is here) with ReLU, k×k to C_out."""

    name = "repvgg"
    source = f"{PAPER}, operation pool, RepVGG (arXiv 2101.03697)"
    params = MappingProxyType({"k": KERNELS, "w": WIDTHS})
    options = MappingProxyType({"act": "relu"})

    def plan(self, spec: CandidateSpec, signature: Signature) -> Sequence[tuple[str, Layer]]:
        """Two layers of branches."""
        p, f = self.values(spec), Frame(signature)
        k, hidden = odd_kernel(p["k"]), hidden_width(p["w"], f.c_out)
        return [
            ("first", RepConv(f.resize(f.c_in, hidden, k, act=""), act=p["act"])),
            ("second", RepConv(f.after(hidden, f.c_out, k))),
        ]
