"""Operations that trade resolution for channels."""

from __future__ import annotations

from typing import ClassVar

import onnx_graphsurgeon as gs
from torch import Tensor

from hantc.core.errors import UnsupportedError
from hantc.dialect.leaf import EmitContext, Leaf, OnnxNode


def _mode(node: OnnxNode) -> str:
    mode = str(node.attrs.get("mode", "DCR"))
    if mode not in ("DCR", "CRD"):
        raise UnsupportedError(f"{node.op} of mode {mode}")
    return mode


class SpaceToDepth(Leaf):
    """Blocks of `size` × `size` positions become channels: channel (row·size + column)·C + c of the output is
    channel c at that row and column of each block (mode DCR, the only one before opset 26), or channel
    c·size² + row·size + column is (CRD, torch's PixelUnshuffle)."""

    ops: ClassVar[tuple[str, ...]] = ("SpaceToDepth",)

    def __init__(self, size: int, mode: str = "DCR") -> None:
        super().__init__()
        self.size, self.mode = size, mode

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C·size², H/size, W/size)."""
        n, c, h, w = x.shape
        b = self.size
        order = (0, 3, 5, 1, 2, 4) if self.mode == "DCR" else (0, 1, 3, 5, 2, 4)
        return x.reshape(n, c, h // b, b, w // b, b).permute(order).reshape(n, c * b * b, h // b, w // b)

    @classmethod
    def parse(cls, node: OnnxNode) -> SpaceToDepth:
        return cls(int(node.attrs["blocksize"]), _mode(node))

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        mode = {} if self.mode == "DCR" else {"mode": self.mode}
        return e.node("SpaceToDepth", xs, {"blocksize": self.size, **mode})

    def extra_repr(self) -> str:
        return f"size={self.size}, {self.mode}"


class DepthToSpace(Leaf):
    """The inverse of SpaceToDepth (mode DCR), or with the channels' own order outermost (CRD, torch's PixelShuffle)."""

    ops: ClassVar[tuple[str, ...]] = ("DepthToSpace",)

    def __init__(self, size: int, mode: str = "DCR") -> None:
        super().__init__()
        self.size, self.mode = size, mode

    def forward(self, x: Tensor) -> Tensor:
        """(N, C·size², H, W) → (N, C, H·size, W·size)."""
        n, c, h, w = x.shape
        b = self.size
        if self.mode == "DCR":
            x = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
        else:
            x = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
        return x.reshape(n, c // (b * b), h * b, w * b)

    @classmethod
    def parse(cls, node: OnnxNode) -> DepthToSpace:
        return cls(int(node.attrs["blocksize"]), _mode(node))

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        mode = {} if self.mode == "DCR" else {"mode": self.mode}
        return e.node("DepthToSpace", xs, {"blocksize": self.size, **mode})

    def extra_repr(self) -> str:
        return f"size={self.size}, {self.mode}"
