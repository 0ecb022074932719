"""Augmentation: per-sample translations with reflection, and mirroring."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from hantc.data.augment import Augment
from hantc.data.preprocess import Layout


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_every_result_is_a_reflected_shift_or_its_mirror(layout: Layout) -> None:
    x = torch.rand(16, 3, 6, 7)
    given = x if layout == "NCHW" else x.permute(0, 2, 3, 1)
    out = Augment(shift=2, flip=True).apply(given, layout, gen())
    out = out if layout == "NCHW" else out.permute(0, 3, 1, 2)
    padded = pad(x, (2, 2, 2, 2), mode="reflect")
    seen = set()
    for i in range(16):
        hits = [
            (dy, dx, flip)
            for dy in range(5)
            for dx in range(5)
            for flip in (False, True)
            for crop in (padded[i, :, dy : dy + 6, dx : dx + 7],)
            if torch.equal(out[i], crop.flip(-1) if flip else crop)
        ]
        assert len(hits) == 1
        seen.add(hits[0])
    assert len(seen) > 5, "parameters must differ between samples"


def test_nothing_asked_changes_nothing() -> None:
    x = torch.randint(0, 255, (4, 5, 5, 3), dtype=torch.uint8)
    out = Augment().apply(x, "NHWC", gen())
    assert torch.equal(out, x) and out.dtype == torch.uint8


def test_flip_alone_mirrors_about_half() -> None:
    x = torch.rand(200, 1, 1, 4)
    out = Augment(flip=True).apply(x, "NCHW", gen())
    flipped = sum(torch.equal(a, b.flip(-1)) for a, b in zip(out, x, strict=True))
    assert 60 < flipped < 140


def test_shift_beyond_the_image_is_held_to_it() -> None:
    assert Augment(shift=9).apply(torch.rand(2, 1, 3, 1), "NCHW", gen()).shape == (2, 1, 3, 1)
