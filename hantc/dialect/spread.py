"""How far each image's activations spread. In some trained networks one image in a hundred drives the deep layers
a hundred times beyond the rest (EfficientNet-B0's last block: a standard deviation of 119, where the median image has
0.18). Taken over a batch, errors, statistics and ranges would be that image's alone."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 0.1  # of the median image's variance, for images with hardly any
_FAR = 10.0  # times the median image's variance
_FEW = 8  # values: too few to take a variance of


def per_image(x: Tensor) -> Tensor:
    """Mean over all dimensions but the first, (N,), whatever the layout in memory."""
    return x.mean(tuple(range(1, x.dim()))) if x.dim() > 1 else x


def image_variance(x: Tensor) -> Tensor:
    """Variance of each image's values, (N,), at least a tenth of the typical one; that of the batch where an image
    has but a few values, or none has any variance."""
    x = x.detach()
    if x[:1].numel() >= _FEW:
        variance = (per_image(x.square()) - per_image(x).square()).clamp_min(0.0)
        some = variance[variance > 0]
        if some.numel():
            return torch.maximum(variance, _LEAST * some.median())
    return x.var(correction=0).clamp_min(1e-12).expand(x.shape[0])


def ordinary(variance: Tensor) -> Tensor:
    """Which images, (N,) of bool, do not spread far beyond the median one, from `image_variance`; all of them
    unless those are two at least, and half of all."""
    some = variance[variance > variance.nan_to_num(torch.inf).min()]  # most may be at the floor
    usual = variance <= _FAR * some.median() if some.numel() else torch.ones_like(variance, dtype=torch.bool)
    return usual if enough(usual) else torch.ones_like(usual)


def enough(usual: Tensor) -> bool:
    """Whether so many images are left that the others can be done without."""
    return int(usual.sum()) >= max(2, usual.numel() / 2)


class Activations(dict[str, Tensor]):
    """A network's values on one batch by node name, (N, ...), each with its spread, which is taken once."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__(values)
        self._variance: dict[str, Tensor] = {}
        self._usual: dict[str, Tensor] = {}

    def variance(self, name: str) -> Tensor:
        """`image_variance` of a value."""
        if name not in self._variance:
            self._variance[name] = image_variance(self[name])
        return self._variance[name]

    def usual(self, source: str, target: str) -> Tensor | None:
        """Which images are ordinary in both values; None where all are, or too few."""
        for name in (source, target):
            if name not in self._usual:
                self._usual[name] = ordinary(self.variance(name))
        both = self._usual[source] & self._usual[target]
        return None if bool(both.all()) or not enough(both) else both
