"""Selections judged as wholes: learn from real evaluations what adding up scores gets wrong.

Scores come from candidates plugged in alone; together their errors add up to more than their sum, by an amount
that depends on which stand beside which. The loss of a whole selection is modelled as linear in what was
picked, with the scores as the prior; each round draws weights from the posterior, solves the integer program
for them, has the answer evaluated for real, and updates (Thompson sampling on a Bayesian linear model).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hantc.core.errors import HantcError
from hantc.core.types import untouched
from hantc.search.ilp import solve
from hantc.search.problem import Problem, Solution

_NOISE = 0.05  # of an evaluated loss, relative to the typical one


@dataclass(frozen=True)
class Trial:
    """A selection and the loss it really has."""

    solution: Solution
    loss: float


@dataclass
class _Posterior:
    """Gaussian over the items' weights."""

    mean: np.ndarray[Any, Any]
    cov: np.ndarray[Any, Any]

    @classmethod
    def prior(cls, problem: Problem) -> _Posterior:
        """Around the scores, the wider the larger the score; what scores nothing alone may still hurt."""
        scores = np.array([i.score for i in problem.items])
        floor = float(np.median(scores[scores > 0])) if (scores > 0).any() else 1e-3
        free = np.array([untouched(i.candidate, i.precision) for i in problem.items])
        spread = np.where(free, 1e-9, scores + floor)
        return cls(scores.copy(), np.diag(spread**2))

    def update(self, picked: tuple[int, ...], loss: float, noise: float) -> None:
        """Condition on: the weights of `picked` sum to `loss`."""
        z = np.zeros(len(self.mean))
        z[list(picked)] = 1.0
        direction = self.cov @ z
        gain = direction / (z @ direction + noise**2)
        self.mean = self.mean + gain * (loss - z @ self.mean)
        self.cov = self.cov - np.outer(gain, direction)

    def draw(self, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        """One sample of all weights, never negative."""
        spread = np.sqrt(np.clip(np.diag(self.cov), 0, None))
        # independent draws: cheaper than a factorisation, and correlations matter little for exploring
        drawn: np.ndarray[Any, Any] = np.maximum(self.mean + spread * 0.5 * rng.standard_normal(len(self.mean)), 0.0)
        return drawn


def explore(
    problem: Problem,
    evaluate: Callable[[Solution], float],
    *,
    rounds: int,
    seconds: float,
    seed: int,
    known: tuple[Trial, ...] = (),
    gap: float = 0.01,
    progress: Callable[[], None] = lambda: None,
) -> list[Trial]:
    """Up to `rounds` evaluated selections within the budget, best first, each once. `evaluate` gives a whole
    selection's loss over the teacher's (lower is better; a non-finite one counts as very bad). `known`: trials
    made already. Deterministic for a seed unless `seconds` end it. Raises what `solve` raises."""
    deadline = time.monotonic() + seconds
    rng = np.random.default_rng(seed)
    posterior = _Posterior.prior(problem)
    trials = {t.solution.items: t for t in known}
    typical = float(np.median([t.loss for t in known])) if known else 1.0
    noise = max(_NOISE * abs(typical), 1e-6)
    for t in known:
        posterior.update(t.solution.items, t.loss, noise)
    for i in range(rounds):
        if time.monotonic() > deadline:
            break
        weights = np.maximum(posterior.mean, 0.0) if i % 3 == 0 else posterior.draw(rng)
        items = tuple(replace(it, score=float(w)) for it, w in zip(problem.items, weights, strict=True))
        try:
            solution = solve(replace(problem, items=items), gap=gap, time_limit=5.0)
        except HantcError:
            if not trials:
                raise
            break
        progress()
        if solution.items in trials:
            posterior.update(solution.items, trials[solution.items].loss, noise)
            continue
        loss = evaluate(solution)
        loss = loss if np.isfinite(loss) else 100.0 * max(typical, 1.0)
        trials[solution.items] = Trial(solution, loss)
        posterior.update(solution.items, loss, noise)
    return sorted(trials.values(), key=lambda t: t.loss)
