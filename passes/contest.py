"""Which candidates are not worth training on, judged by latency and error so far (successive halving)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rung:
    """A comparison of candidates in training. `at`: share of the training time; `clearly`: how many times smaller a
    rival's error must be; `places`: how many of a region train on at most (but all that nothing outdoes do)."""

    at: float
    clearly: float
    places: int


RUNGS = (Rung(0.06, 0.4, 32), Rung(0.15, 0.6, 16), Rung(0.35, 0.75, 10), Rung(0.6, 0.85, 8))

SAME_COST = 1.02  # latencies are measured: this much more is no more


@dataclass(frozen=True)
class Entrant:
    """A candidate in training: latency in ms, running relative error."""

    region: str
    candidate: str
    cost: float
    loss: float


def outdone(entrants: Sequence[Entrant], rung: Rung) -> list[str]:
    """For each entrant the rival that makes it pointless, or "": one of the same region that costs no more (within what
    measuring can tell) and whose error is clearly smaller; or that costs no more at all and whose error is smaller at
    all, where more are left than have places: of those, the ones that the most rivals outdo go first."""
    regions: dict[str, list[Entrant]] = {}
    for e in entrants:
        regions.setdefault(e.region, []).append(e)
    out = {e: rival for some in regions.values() for e, rival in _in_region(some, rung).items()}
    return [out.get(e, "") for e in entrants]


def _in_region(entrants: Sequence[Entrant], rung: Rung) -> dict[Entrant, str]:
    near = _best({e: [r for r in entrants if r.cost <= SAME_COST * e.cost and r.loss < e.loss] for e in entrants})
    out = {e: r.candidate for e, r in near.items() if r.loss < rung.clearly * e.loss}
    left = [e for e in entrants if e not in out]
    # not within what measuring can tell: a chain of such steps would lead far
    better = {e: [r for r in entrants if r.cost <= e.cost and r.loss < e.loss] for e in left}
    best = _best(better)
    beaten = sorted((e for e in left if e in best), key=lambda e: (-len(better[e]), -e.loss, e.candidate))
    for e in beaten[: max(0, len(left) - rung.places)]:
        out[e] = best[e].candidate
    return out


def _best(rivals: Mapping[Entrant, Sequence[Entrant]]) -> dict[Entrant, Entrant]:
    """The nearest rival of each that has any."""
    return {e: min(some, key=lambda r: (r.loss, r.cost, r.candidate)) for e, some in rivals.items() if some}
