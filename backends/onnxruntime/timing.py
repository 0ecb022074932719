"""Interleaved timing that holds up on a noisy machine.

- Every round times each artefact once, so that slow spells (frequency, other processes) hit all alike and
  ratios stay fair; the order rotates each round, so that none always runs behind the same neighbour.
- A sample lasts at least `min_sample_ms` and starts with one untimed run that refills the caches. It times
  its runs one by one (very short ones in groups of `_GROUP_MS`, which makes the clock's grain and the Python
  call of 6 µs small), leaves out those in which the system took the core away (involuntary context switches),
  and keeps the median of the rest.
- Noise only ever adds time, so samples slower than the lower quartile by `_SLOW_SPELL` are left out of the
  median; the reported spread keeps them. A machine that is free a third of the time still gives true figures.
- Where the spread is wide, more rounds follow, up to `_MAX_FACTOR` times what was asked for.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hantc.core.types import Protocol, Timing

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_NOISY = 0.10  # IQR over median above which more rounds follow
_MAX_FACTOR = 2
_SLOW_SPELL = 1.25
_GROUP_MS = 0.1
_MAX_RUNS = 10_000

Clock = Callable[[], int]


@dataclass(frozen=True)
class _Sampling:
    """A sample is `groups` groups of `size` runs each."""

    groups: int
    size: int


def measure_interleaved(
    runs: Sequence[Callable[[], object]], protocol: Protocol, clock: Clock = time.perf_counter_ns
) -> list[Timing]:
    """Time every callable by the protocol; one Timing each, in order. `clock` gives nanoseconds."""
    plans = [_plan(run, protocol, clock) for run in runs]
    samples: list[list[float]] = [[] for _ in runs]
    rounds, limit = 0, protocol.samples * _MAX_FACTOR
    while rounds < protocol.samples or (rounds < limit and any(_is_noisy(s) for s in samples)):
        for k in range(len(runs)):
            i = (k + rounds) % len(runs)
            samples[i].append(_sample_ms(runs[i], plans[i], clock))
        rounds += 1
    return [_timing(s) for s in samples]


def _plan(run: Callable[[], object], protocol: Protocol, clock: Clock) -> _Sampling:
    one = _Sampling(1, 1)
    best = max(1e-4, min(_sample_ms(run, one, clock) for _ in range(max(1, protocol.warmup))))
    total = max(1, min(_MAX_RUNS, math.ceil(protocol.min_sample_ms / best)))
    size = min(total, math.ceil(_GROUP_MS / best))
    return _Sampling(math.ceil(total / size), size)


def _sample_ms(run: Callable[[], object], plan: _Sampling, clock: Clock) -> float:
    run()
    undisturbed: list[int] = []
    disturbed: list[int] = []
    switches = _switches()
    for _ in range(plan.groups):
        start = clock()
        for _ in range(plan.size):
            run()
        elapsed = clock() - start
        before, switches = switches, _switches()
        (undisturbed if switches == before else disturbed).append(elapsed)
    return float(statistics.median(undisturbed or disturbed)) / plan.size / 1e6


def _switches() -> int:
    """How often the system took a core away from a thread of this process; 0 where it does not tell."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource is not None else 0


def _is_noisy(samples: Sequence[float]) -> bool:
    timing = _timing(samples)
    return timing.iqr_ms > _NOISY * timing.median_ms


def _timing(samples: Sequence[float]) -> Timing:
    low, high = np.percentile(samples, [25, 75])
    usable = [s for s in samples if s <= _SLOW_SPELL * low]
    return Timing(median_ms=float(np.median(usable)), iqr_ms=float(high - low), samples=len(samples))
