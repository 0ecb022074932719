"""How far each image's activations spread. In some trained networks one image in a hundred drives the deep layers
a hundred times beyond the rest (EfficientNet-B0's last block: a standard deviation of 119, where the median image has
0.18). Taken over a batch, errors, statistics and ranges would be that image's alone."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 0.1  # of the median image's variance, for images with hardly any
_FAR = 10.0  # times the median image's variance
_FEW = 8  # values: too few to take a variance of


def image_variance(x: Tensor) -> Tensor:
    """Variance of each image's values, (N,), at least a tenth of the median one; that of the batch where an image
    has but a few values."""
    flat = x.detach().flatten(1)
    if flat.shape[1] < _FEW:
        return flat.var(correction=0).clamp_min(1e-12).expand(flat.shape[0])
    variance = flat.var(1)
    return torch.maximum(variance, _LEAST * variance.median()).clamp_min(1e-12)


def ordinary(x: Tensor) -> Tensor:
    """Which images, (N,) of bool, do not spread far beyond the median one; always more than half of them."""
    variance = image_variance(x)
    return variance <= _FAR * variance.median()
