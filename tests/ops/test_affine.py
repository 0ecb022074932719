"""One fitted convolution in the place of a region: it finds what is linear, and declines what it would repeat."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.activation import LeakyRelu, Unary
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Add
from hantc.ops.derived import Origin
from hantc.ops.registry import DERIVED, build
from tests.ops.test_derived import SHAPE, UNSEEN, Basic, error, graph, images, leaf_kinds, origin


@pytest.mark.parametrize("stride", [1, 2])
def test_affine_finds_what_is_linear(stride: int) -> None:
    """The region computes relu(x + a convolution of it) (or, at stride 2, no x): so does what is fitted."""
    torch.manual_seed(0)
    block = Linearly(stride)
    out = tuple(block(torch.zeros(1, *SHAPE)).shape[1:])
    of = Origin(graph(block, SHAPE, out), (), images())
    signature = Signature(SHAPE, out, "relu")
    made = build(CandidateSpec.make("affine", k=3), signature, origin=of)
    assert leaf_kinds(made) == (["Conv", "Add", "relu"] if stride == 1 else ["Conv", "relu"])
    assert error(made, of.whole, UNSEEN) < 1e-3
    worse = build(CandidateSpec.make("affine", k=1), signature, origin=of)
    assert error(made, of.whole, UNSEEN) < error(worse, of.whole, UNSEEN) < 1


class Linearly(nn.Module):
    """relu(convs(x) + x), or relu(convs(x)) at a stride."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv, self.mix, self.act = Conv(16, 24, 3, stride), Conv(24, 16), Unary("Relu")
        self.add = Add() if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.conv(x))
        out: Tensor = self.act(y if self.add is None else self.add(y, x))
        return out


def test_affine_beats_doing_nothing_on_a_trained_block_like_region() -> None:
    torch.manual_seed(0)
    block = Basic()
    with torch.no_grad():
        block.b.weight.mul_(0.1)
    whole = graph(block)
    made = build(
        CandidateSpec.make("affine", k=3), Signature(SHAPE, SHAPE, "relu"), origin=origin(block, samples=images())
    )
    nothing = error(nn.Identity(), whole, UNSEEN)
    assert error(made, whole, UNSEEN) < 0.5 * nothing


def test_affine_declines_what_it_would_repeat() -> None:
    module = graph(nn.Sequential(Conv(16, 16, 3), Unary("Relu")))
    why = DERIVED["affine"].reject_origin(
        CandidateSpec.make("affine", k=3), Signature(SHAPE, SHAPE, "relu"), Origin(module, ())
    )
    assert why == "the region is one convolution already"


@pytest.mark.parametrize(("k", "out", "why"), [(2, SHAPE, "odd"), (3, (16, 20, 18), "grows")])
def test_affine_declines(k: int, out: tuple[int, ...], why: str) -> None:
    module = graph(nn.Sequential(Conv(16, 16, 1), Conv(16, 16, 1)), SHAPE, out)
    reason = DERIVED["affine"].reject_origin(
        CandidateSpec.make("affine", k=k), Signature(SHAPE, out), Origin(module, ())
    )
    assert why in reason


def test_affine_keeps_the_activation_with_its_parameters() -> None:
    leaky = LeakyRelu(0.2)
    block = graph(nn.Sequential(Conv(16, 16, 3), Conv(16, 16, 1), leaky))
    made = build(CandidateSpec.make("affine", k=3), Signature(SHAPE, SHAPE, "leakyrelu"), origin=Origin(block, ()))
    (found,) = [m for m in made.modules() if isinstance(m, LeakyRelu)]
    assert vars(found)["alpha"] == 0.2 and found is not leaky
