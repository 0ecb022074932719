"""The identity, its downsampling form, and where it does not go."""

from __future__ import annotations

import pytest
import torch

from hantc.core.errors import HantcError
from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.graph import count_params
from hantc.ops import registry

SPEC = CandidateSpec("identity")


def test_true_identity_holds_no_operation() -> None:
    module = registry.build(SPEC, Signature((3, 7, 7), (3, 7, 7)))
    assert [n.op for n in module.graph.nodes] == ["placeholder", "output"]
    x = torch.randn(2, 3, 7, 7)
    assert torch.equal(module(x), x)
    assert registry.estimate(SPEC, Signature((3, 7, 7), (3, 7, 7))) == (0, 0)


def test_activation_is_applied_where_twice_is_once() -> None:
    x = torch.randn(2, 3, 7, 7)
    relu = registry.build(SPEC, Signature((3, 7, 7), (3, 7, 7), "relu"))
    silu = registry.build(SPEC, Signature((3, 7, 7), (3, 7, 7), "silu"))
    assert torch.equal(relu(x), x.relu())
    assert torch.equal(silu(x), x)


def test_pools_and_pads() -> None:
    x = torch.randn(2, 3, 8, 8)
    module = registry.build(SPEC, Signature((3, 8, 8), (5, 4, 4)))
    y = module(x)
    torch.testing.assert_close(y[:, :3], torch.nn.functional.avg_pool2d(x, 2))
    assert torch.count_nonzero(y[:, 3:]) == 0
    assert count_params(module) == 0


@pytest.mark.parametrize(("before", "after"), [(7, 4), (9, 4), (9, 5), (15, 8), (15, 7), (3, 2), (10, 3), (10, 4)])
def test_odd_sizes_average_real_values_only(before: int, after: int) -> None:
    signature = Signature((2, before, before), (2, after, after))
    y = registry.build(SPEC, signature)(torch.ones(1, 2, before, before))
    assert tuple(y.shape) == (1, 2, after, after)
    torch.testing.assert_close(y, torch.ones_like(y))


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ((8, 4, 4), (4, 4, 4), "drop channels"),
        ((8, 8, 8), (4, 4, 4), "drop channels"),
        ((8, 14, 14), (8, 10, 10), "no integer stride"),
        ((8, 7, 7), (8, 5, 5), "no integer stride"),
        ((8, 7, 7), (8, 14, 14), "grows"),
        ((8,), (8,), "feature vector"),
    ],
)
def test_where_it_does_not_go(before: tuple[int, ...], after: tuple[int, ...], reason: str) -> None:
    signature = Signature(before, after)
    assert reason in registry.FAMILIES["identity"].reject(SPEC, signature)
    with pytest.raises(HantcError, match=reason):
        registry.build(SPEC, signature)
