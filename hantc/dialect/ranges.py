"""The range that an activation is rounded over, from what each of many images needs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KEPT = (0.995, 0.99, 0.98, 0.95, 0.9)  # shares of images whose extremes the range may be made for
_CLEARLY = 0.5  # a narrower range must halve the error
_STEPS = 255

Array = NDArray[Any]


def robust_range(low: Array, high: Array, variance: Array) -> tuple[float, float]:
    """(lowest, highest), zero among them, from each image's lowest and highest value and variance, all (N,).

    The whole range, unless some images reach so far beyond the others that rounding over it would blur those: then
    the range with the least mean error, each image's being relative to its own variance, and 1 at most. An image's
    rounding error is that of uniform steps; what is cut off is taken from how far the image reaches beyond.
    """
    floor = max(0.1 * float(np.median(variance)), 1e-12)
    variance = np.maximum(variance, floor)
    reach = np.maximum(-low, high)
    order = np.argsort(reach, kind="stable")
    n = len(low)
    found: list[tuple[float, float, float]] = []
    for kept in sorted({n, *(math.ceil(s * n) for s in _KEPT)}, reverse=True):
        lowest, highest = (min(0.0, float(low[order[:kept]].min())), max(0.0, float(high[order[:kept]].max())))
        rounding = ((highest - lowest) / _STEPS) ** 2 / 12 / variance
        beyond = np.maximum(np.maximum(high - highest, lowest - low), 0.0)
        cut = np.minimum(beyond / np.maximum(reach, 1e-12), 1.0) ** 2
        found.append((float(np.minimum(rounding + cut, 1.0).mean()), lowest, highest))
    whole, best = found[0], min(found, key=lambda f: f[0])
    return best[1:] if best[0] < _CLEARLY * whole[0] else whole[1:]
