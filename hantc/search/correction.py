"""What whole networks took, told apart into what each kind of part costs more or less than its table says.

Parts are measured alone, and in a network some kinds cost more: caches are colder, borders come in other company. And
all of them may cost more than when the table was measured, for what others do to the host's caches and memory. A
student's latency is the sum of its parts' by kind, each times a factor of its kind; the factors are fitted to a few
students, with the table as the prior (Bayesian linear regression), so that one student moves them little, and kinds
that none of them has move with the others alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NOISE = 0.04  # of a measured latency


@dataclass(frozen=True)
class Fit:
    """One factor a kind. `misfit`: how much the networks and the prior together speak against them (twice the negative
    logarithm of their probability, but for a constant): between tables of other parts, the lower is the likelier."""

    factors: tuple[float, ...]
    misfit: float


def fit_factors(
    parts: Sequence[Sequence[float]], measured: Sequence[float], spread: Sequence[float], together: float = 0.0
) -> Fit:
    """The factors that whole networks tell of. `parts`: for each network the milliseconds of each kind by the table;
    `measured`: what the networks took, ms; `spread`: how far each kind's factor is expected to be from 1 by itself,
    `together`: all of them by the same (standard deviations)."""
    x, y = np.asarray(parts, float).reshape(len(measured), len(spread)), np.asarray(measured, float)
    weight = 1 / (_NOISE * y)
    a, b = x * weight[:, None], (y - x.sum(1)) * weight
    prior = np.linalg.inv(np.diag(np.square(np.asarray(spread, float))) + together**2)
    shift = np.linalg.solve(a.T @ a + prior, a.T @ b)
    misfit = float(np.sum(np.square(a @ shift - b)) + shift @ prior @ shift)
    # a kind may cost next to nothing, never less than that
    return Fit(tuple(float(f) for f in np.maximum(1 + shift, 0.05)), misfit)
