"""Images that drive a network far beyond the rest: they are found, and decide nothing."""

from __future__ import annotations

import pytest
import torch

from hantc.dialect.spread import Activations, enough, image_variance, ordinary


def activations(n: int = 20) -> torch.Tensor:
    return torch.randn(n, 6, 4, 4, generator=torch.Generator().manual_seed(0))


def test_each_image_has_its_own_variance() -> None:
    x = activations() * torch.linspace(1.0, 2.0, 20).view(-1, 1, 1, 1)
    want = x.flatten(1).var(1, correction=0)
    assert torch.allclose(image_variance(x), want)
    assert torch.allclose(image_variance(x.contiguous(memory_format=torch.channels_last)), want)


def test_an_image_with_hardly_any_has_a_tenth_of_the_median() -> None:
    x = activations()
    x[3] = 0.5
    variance, rest = image_variance(x), torch.cat([x[:3], x[4:]])
    typical = rest.flatten(1).var(1, correction=0)
    assert variance[3] == pytest.approx(0.1 * float(typical.median()))


@pytest.mark.parametrize("width", [1, 7])
def test_a_few_values_are_taken_together(width: int) -> None:
    x = torch.arange(4.0 * width).reshape(4, width)
    assert torch.equal(image_variance(x), x.var(correction=0).expand(4))


def test_a_constant_is_nobodys_outlier() -> None:
    x = torch.ones(5, 3, 2, 2)
    assert bool((image_variance(x) > 0).all()) and bool(ordinary(image_variance(x)).all())
    assert bool(ordinary(image_variance(torch.ones(1, 1))).all()), "one value has no variance"


def test_where_most_images_are_blank_the_others_are_no_outliers() -> None:
    x = activations()
    x[:12] = 0.0
    variance = image_variance(x)
    assert bool((variance > 0.05).all())
    assert bool(ordinary(variance).all())


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_of_a_few_images_enough_are_left(n: int) -> None:
    x = activations(n) * torch.logspace(0, 4, n).view(-1, 1, 1, 1)
    assert enough(ordinary(image_variance(x))) or n == 1


def test_images_far_beyond_the_rest_are_found() -> None:
    x = activations()
    x[[2, 11]] *= 100.0
    assert (~ordinary(image_variance(x))).nonzero().flatten().tolist() == [2, 11]
    assert bool(ordinary(image_variance(activations() * torch.linspace(1.0, 2.5, 20).view(-1, 1, 1, 1))).all())


def test_a_candidate_sees_images_that_are_ordinary_at_both_ends() -> None:
    source, target = activations(), activations()
    source[3], target[5] = 100 * source[3], 100 * target[5]
    values = Activations({"a": source, "b": target, "c": activations()})
    usual = values.usual("a", "b")
    assert usual is not None
    assert (~usual).nonzero().flatten().tolist() == [3, 5]
    assert values.usual("c", "c") is None
    assert torch.equal(values.variance("b"), image_variance(target))


def test_images_that_are_not_finite_leave_the_others_to_train_on() -> None:
    x = activations()
    x[4, 0, 0, 0] = float("nan")
    assert not bool(ordinary(image_variance(x))[4])
