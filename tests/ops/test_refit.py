"""Least-squares fits: which positions they look at, and that those are enough."""

from __future__ import annotations

import pytest
import torch

from hantc.dialect.conv import Conv
from hantc.ops.refit import _spread, fit_conv


@pytest.mark.parametrize(("count", "most"), [(10, 10), (1000, 64), (252 * 64, 512), (100, 80)])
def test_positions_are_spread_and_the_same_each_time(count: int, most: int) -> None:
    at = _spread(count, most)
    assert torch.equal(at, _spread(count, most))
    assert len(at.unique()) > 0.7 * most and int(at.min()) >= 0 and int(at.max()) < count
    assert float((at / (count / most) - torch.arange(most)).abs().max()) <= 1


@pytest.mark.parametrize(("images", "side", "kernel"), [(252, 8, 1), (126, 12, 1), (115, 10, 3)])
def test_a_depthwise_fit_sees_more_than_corners(images: int, side: int, kernel: int) -> None:
    """At these sizes even steps would fall on the same two pixels of every map."""
    torch.manual_seed(0)
    teacher, student = Conv(4, 4, kernel, groups=4), Conv(4, 4, kernel, groups=4)
    ramp = torch.linspace(-1, 1, side)  # what is asked for differs over the map, so that corners mislead
    x = torch.randn(images, 4, side, side)
    with torch.no_grad():
        target = teacher(x) + 0.5 * ramp * x
        fit_conv(student, x, target)
        near = (student(x) - target).square().mean() / target.var()
        best = (teacher(x) - target).square().mean() / target.var()
    assert float(near) < 1.15 * float(best)
