"""Images that drive a network far beyond the rest: they are found, and decide nothing."""

from __future__ import annotations

import pytest
import torch

from hantc.dialect.spread import image_variance, ordinary


def activations(n: int = 20) -> torch.Tensor:
    return torch.randn(n, 6, 4, 4, generator=torch.Generator().manual_seed(0))


def test_each_image_has_its_own_variance() -> None:
    x = activations() * torch.linspace(1.0, 2.0, 20).view(-1, 1, 1, 1)
    assert torch.allclose(image_variance(x), x.flatten(1).var(1))


def test_an_image_with_hardly_any_has_a_tenth_of_the_median() -> None:
    x = activations()
    x[3] = 0.5
    variance = image_variance(x)
    assert variance[3] == pytest.approx(0.1 * float(x.flatten(1).var(1).median()))


@pytest.mark.parametrize("width", [1, 7])
def test_a_few_values_are_taken_together(width: int) -> None:
    x = torch.arange(4.0 * width).reshape(4, width)
    assert torch.equal(image_variance(x), x.var(correction=0).expand(4))


def test_a_constant_is_nobodys_outlier() -> None:
    x = torch.ones(5, 3, 2, 2)
    assert bool((image_variance(x) > 0).all()) and bool(ordinary(x).all())
    assert bool(ordinary(torch.ones(1, 1)).all()), "one value has no variance"


def test_images_far_beyond_the_rest_are_found() -> None:
    x = activations()
    x[[2, 11]] *= 100.0
    assert (~ordinary(x)).nonzero().flatten().tolist() == [2, 11]
    assert bool(ordinary(activations() * torch.linspace(1.0, 2.5, 20).view(-1, 1, 1, 1)).all())
