"""Random translation and mirroring of a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hantc.data.preprocess import Layout


@dataclass(frozen=True)
class Augment:
    """`shift`: translate by up to that many pixels each way, reflecting at the border; `flip`: mirror half
    of the images left to right. Drawn anew for every image."""

    shift: int = 0
    flip: bool = False

    def apply(self, x: torch.Tensor, layout: Layout, generator: torch.Generator) -> torch.Tensor:
        """Augment a batch of images of any dtype, four-dimensional in `layout`; same shape, a new tensor."""
        pixels = x.permute(0, 2, 3, 1) if layout == "NCHW" else x
        n, h, w, channels = pixels.shape
        rows = self._positions(n, h, generator)
        cols = self._positions(n, w, generator)
        if self.flip:
            mirrored = torch.rand(n, 1, generator=generator) < 0.5
            cols = torch.where(mirrored, w - 1 - cols, cols)
        # One flat index per pixel: twice as fast as indexing with three tensors.
        source = (torch.arange(n)[:, None, None] * h + rows[:, :, None]) * w + cols[:, None, :]
        out = pixels.reshape(-1, channels).index_select(0, source.reshape(-1)).reshape(n, h, w, channels)
        return out.permute(0, 3, 1, 2) if layout == "NCHW" else out

    def _positions(self, count: int, side: int, generator: torch.Generator) -> torch.Tensor:
        """Source positions along one side, (count, side): a shifted range, reflected at both ends."""
        shift = min(self.shift, side - 1)
        offset = torch.randint(-shift, shift + 1, (count, 1), generator=generator)
        return (side - 1) - ((side - 1) - (torch.arange(side) + offset).abs()).abs()
