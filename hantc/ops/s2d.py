"""A stem that reads blocks of pixels as channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.rearrange import SpaceToDepth
from hantc.ops.geometry import Misfit, resize_pads, strides
from hantc.ops.layers import Frame, Layer, LayeredFamily, odd_kernel

_MOST_CHANNELS = 16  # of the input; in the middle of a network it would multiply what are many channels already


@dataclass(frozen=True)
class Blocks:
    """Space to depth at the stride that leads from `size` to `out_size`."""

    size: tuple[int, int]
    out_size: tuple[int, int]
    weights: int = 0
    macs: int = 0

    @property
    def stride(self) -> int:
        """Side of a block."""
        return self.size[0] // self.out_size[0]

    def check(self) -> None:
        """Misfit unless the input falls into square blocks."""
        if self.stride < 2 or any(a != b * self.stride for a, b in zip(self.size, self.out_size, strict=True)):
            raise Misfit(f"{self.size} does not fall into square blocks, one for each position of {self.out_size}")

    def module(self) -> nn.Module:
        """The layer itself."""
        return SpaceToDepth(self.stride)


class S2D(LayeredFamily):
    """TResNet's stem: blocks of pixels become channels, then a k×k convolution, norm, the region's activation. One
    dense convolution at the low resolution takes the place of a strided one, and of a pooling behind it."""

    name = "s2d"
    source = "TResNet's stem, arXiv 2003.13630"
    params = MappingProxyType({"k": (1, 3)})

    def plan(self, spec: CandidateSpec, signature: Signature) -> Sequence[tuple[str, Layer]]:
        """Rearrangement and convolution."""
        f, k = Frame(signature), odd_kernel(self.values(spec)["k"])
        if f.c_in > _MOST_CHANNELS:
            raise Misfit(f"for stems: {f.c_in} channels are more than {_MOST_CHANNELS}")
        resize_pads(signature, 3)  # says where no stride leads from one to the other
        if max(strides(signature)) < 2:
            raise Misfit("the resolution stays as it is")
        blocks = Blocks(f.size, f.out_size)
        blocks.check()
        return [("blocks", blocks), ("conv", f.after(f.c_in * blocks.stride**2, f.c_out, k))]
