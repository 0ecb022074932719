"""Which candidates are not worth training on, judged by latency and error so far (successive halving)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RUNGS: tuple[tuple[float, float], ...] = ((0.06, 0.4), (0.15, 0.6), (0.35, 0.75), (0.6, 0.85))
"""When candidates are compared (share of the training time), and how much smaller a rival's error must be."""

SAME_COST = 1.02  # latencies are measured: this much more is no more


@dataclass(frozen=True)
class Entrant:
    """A candidate in training: latency in ms, running relative error."""

    region: str
    candidate: str
    cost: float
    loss: float


def outdone(entrants: Sequence[Entrant], clearly: float) -> list[str]:
    """For each entrant the rival that makes it pointless, or "": one of the same region that costs no more and
    whose error is below `clearly` times its own."""
    rivals: list[str] = []
    for e in entrants:
        better = [
            r for r in entrants if r.region == e.region and r.cost <= SAME_COST * e.cost and r.loss < clearly * e.loss
        ]
        best = min(better, key=lambda r: (r.loss, r.cost, r.candidate), default=None)
        rivals.append(best.candidate if best else "")
    return rivals
