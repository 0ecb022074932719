"""The exact space-to-depth form of a strided stem: equal for every geometry that it takes, and why not for others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.activation import activation
from hantc.dialect.conv import Conv
from hantc.dialect.graph import trace
from hantc.dialect.rearrange import DepthToSpace, SpaceToDepth
from hantc.ops.derived import Origin
from hantc.ops.registry import DERIVED, build, is_exact

SPEC = CandidateSpec("teacher_s2d")


def stem(conv: Conv, size: tuple[int, int]) -> tuple[Origin, Signature]:
    """A convolution with an activation, as a region."""
    module = nn.Sequential(conv, activation("relu")).eval()
    before = (conv.weight.shape[1] * conv.groups, *size)
    after = tuple(module(torch.zeros(1, *before)).shape[1:])
    whole = trace(module, before, after)
    return Origin(whole, (whole,)), Signature(before, after, "relu")


@settings(deadline=None, max_examples=60)
@given(
    c=st.integers(1, 4),
    s=st.sampled_from([2, 3, 4]),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    pads=st.tuples(*[st.integers(0, 4)] * 4),
    blocks=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    bias=st.booleans(),
)
def test_equal_wherever_it_is_taken(
    c: int,
    s: int,
    kernel: tuple[int, int],
    pads: tuple[int, int, int, int],
    blocks: tuple[int, int],
    bias: bool,
) -> None:
    size = (s * blocks[0], s * blocks[1])
    if any(n + a + b < k for n, k, a, b in zip(size, kernel, pads[:2], pads[2:], strict=True)):
        return  # no output at all
    torch.manual_seed(0)
    conv = Conv(c, 5, kernel, s, bias=bias, pads=pads)
    if conv.bias is not None:
        nn.init.normal_(conv.bias)
    origin, signature = stem(conv, size)
    reason = DERIVED["teacher_s2d"].reject_origin(SPEC, signature, origin)
    fits = signature.out_shape[1:] == blocks and all(p < k for p, k in zip(pads[:2], kernel, strict=True))
    assert bool(reason) != fits, reason
    if reason:
        return
    made = build(SPEC, signature, origin=origin)
    strided = [m for m in made.modules() if isinstance(m, Conv) and max(m.stride) > 1]
    assert not strided
    x = torch.randn(2, *signature.in_shape)
    with torch.no_grad():
        torch.testing.assert_close(made(x), origin.whole(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("conv", "why"),
    [
        (Conv(3, 8, 3, 1), "no stride"),
        (Conv(3, 8, 3, (2, 1)), "no stride in both"),
        (Conv(4, 8, 3, 2, groups=2), "grouped"),
        (Conv(3, 8, 3, 2, dilation=2, pads=(2, 2, 2, 2)), "dilated"),
        (Conv(32, 8, 3, 2), "for stems"),
        (Conv(3, 8, 3, 2, pads=(0, 0, 0, 0)), "does not fall into"),
    ],
)
def test_declines(conv: Conv, why: str) -> None:
    origin, signature = stem(conv, (12, 12))
    assert why in DERIVED["teacher_s2d"].reject_origin(SPEC, signature, origin)


def test_declines_what_begins_otherwise() -> None:
    whole = trace(nn.Sequential(activation("relu"), Conv(3, 8, 3, 2)).eval(), (3, 8, 8), (8, 4, 4))
    why = DERIVED["teacher_s2d"].reject_origin(SPEC, Signature((3, 8, 8), (8, 4, 4)), Origin(whole, (whole,)))
    assert "does not begin" in why


def test_which_are_exact() -> None:
    exact = [name for name, family in DERIVED.items() if family.exact]
    assert exact == ["teacher_s2d", "exact"] and is_exact(SPEC) and not is_exact(CandidateSpec("identity"))


def test_depth_to_space_undoes_space_to_depth() -> None:
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(DepthToSpace(4)(SpaceToDepth(4)(x)), x)
    assert torch.equal(DepthToSpace(2, "CRD")(torch.pixel_unshuffle(x, 2)), x)
