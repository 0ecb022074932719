"""What torch is spared: BF16 where it is slow or too coarse, and a kernel that is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from hantc.dialect.conv import Conv
from hantc.dialect.linear import Linear


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [(1, torch.bfloat16), (2, torch.bfloat16), (4, torch.float32)],
    ids=["full", "groups", "depthwise"],
)
def test_precision_by_groups(groups: int, wanted: torch.dtype) -> None:
    torch.manual_seed(0)
    conv, x = Conv(4, 8, 3, groups=groups), torch.randn(2, 4, 6, 6, requires_grad=True)
    plain = conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = conv(x)
        behind = conv(x.bfloat16())
    assert rounded.dtype == behind.dtype == wanted
    assert torch.allclose(rounded.float(), plain, atol=0.05, rtol=0.02)
    rounded.float().sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.dtype == torch.float32


def test_one_channel_in_odd_strides() -> None:
    """torch 2.13 computes this one wrongly, off by as much as the values are large."""
    torch.manual_seed(0)
    conv = Conv(1, 2, 3, (1, 2), pads=[0] * 4)
    x = torch.randn(3, 1, 9, 3)
    wanted = conv.double()(x.double())
    found = conv.float()(x.as_strided(x.shape, (27, 1, 3, 1)))
    assert torch.allclose(found.double(), wanted, atol=1e-5)


def test_other_types_keep_to_themselves() -> None:
    conv = Conv(4, 4, 3, groups=4).double()
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    plain = conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(x), plain)


def test_classifiers_stay_in_fp32() -> None:
    """Logits in BF16 would be as far from a teacher's as a good student's are."""
    linear = Linear(8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(2, 8).bfloat16()).dtype == torch.float32
        assert linear(torch.randn(2, 5, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("leaf", [Conv(1, 2, 3, (1, 2)), Conv(4, 4, 3, groups=4), Linear(8, 3)])
def test_tracing_passes_through(leaf: torch.nn.Module) -> None:
    """Nothing is asked of values that are not there yet."""
    assert len(fx.symbolic_trace(leaf).graph.nodes) > 2
