"""Interleaved timing that holds up on a noisy machine.

- Every round times each artefact once, so that slow spells (frequency, other processes) hit all alike and
  ratios stay fair; the order is drawn anew each time, so that none always runs behind the same neighbour (behind a
  small network another one is 1 to 2 % slower than behind its like), and none twice running: of two networks that were
  one file, that which followed itself in a quarter of the rounds was 4 to 9 % faster.
- Samples are short (`_SLICE_MS`) and many rather than long and few, the time spent being the same: a shared
  machine changes its speed every fraction of a second, and a short sample lies within one spell. A sample
  starts with an untimed run that refills the caches (`Protocol.settle` of them for whole networks: EfficientNet-B0 at
  64×64, whose weights fill a shared cache, is 12 % slower in its first run behind another network than in its eighth,
  5 % in its third), times its runs one by one (very short ones in groups of
  `_GROUP_MS`, which makes the clock's grain and the Python call of 6 µs small), leaves out those in which the
  system took the core away (involuntary context switches), and keeps the median of the rest.
- Noise only ever adds time, so the figure is the median of the quiet samples: those within `_QUIET` of the 5th
  percentile. On a quiet machine that is every one; the reported spread keeps them all. Measured on a machine
  whose speed swung by 1.5 between spells, two networks interleaved for four seconds, 300 times: the ratio of
  plain medians lay between 0.348 and 0.392 (5th and 95th percentile), of these between 0.371 and 0.393.
- More rounds follow, up to `_MAX_FACTOR` times what was asked for, until every figure's 95 % confidence interval is
  narrow: within `_NARROW` of it to either side. The interval is that of a median, between two of the quiet samples
  by rank (Le Boudec, "Performance Evaluation of Computer and Communication Systems", section 2.2), which supposes
  nothing about how they are spread; where fewer than half of the samples are quiet there is none yet.
- Caches are warm: a network runs behind itself. With `Protocol.cold` each sample is one run behind the `Eviction` of
  whatever the processor's caches held, as where a request comes after other work.
- With `Protocol.cores` threads keep to these processors (`core.pinning`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from hantc.core.backend_api import Artefact
from hantc.core.errors import HantcError, ModelError
from hantc.core.memory import cache_size
from hantc.core.pinning import confined
from hantc.core.types import Protocol, Timing

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_NARROW = 0.03  # half of a figure's confidence interval, relative to it
_MAX_FACTOR = 3
_QUIET = 1.10
_QUIET_LEVEL = 5  # percentile
_SLICE_MS = 3.0
_GROUP_MS = 0.1
_MAX_RUNS = 10_000
_SETTLE_MS = 8.0  # longer networks find no more in the caches than what they bring there in one run
_OWN_CACHE = 8 << 20  # bytes: more than the levels that a core has to itself

Clock = Callable[[], int]


@dataclass(frozen=True)
class _Sampling:
    """A sample is `groups` groups of `size` runs each, behind `settle` runs that are not timed."""

    groups: int
    size: int
    settle: int = 1


def measure_interleaved(
    runs: Sequence[Callable[[], object]], protocol: Protocol, clock: Clock = time.perf_counter_ns
) -> list[Timing]:
    """Time every callable by the protocol; one Timing each, in order. `clock` gives nanoseconds."""
    with confined(protocol.cores):
        return _interleaved(runs, protocol, clock)


def _interleaved(runs: Sequence[Callable[[], object]], protocol: Protocol, clock: Clock) -> list[Timing]:
    fastest = [_fastest_ms(run, protocol, clock) for run in runs]
    prepare = [Eviction(protocol.threads)] * len(runs) if protocol.cold else list(runs)
    plans = [_Sampling(1, 1) if protocol.cold else _plan(ms, protocol) for ms in fastest]
    wanted = protocol.samples if protocol.cold else _rounds(fastest, protocol)
    samples: list[list[float]] = [[] for _ in runs]
    orders, rounds = _orders(len(runs)), 0
    while rounds < wanted or (rounds < wanted * _MAX_FACTOR and any(uncertainty(s) > _NARROW for s in samples)):
        for i in next(orders):
            samples[i].append(_sample_ms(runs[i], plans[i], clock, prepare[i]))
        rounds += 1
    return [_timing(s) for s in samples]


def _orders(n: int) -> Iterator[list[int]]:
    """Random orders of n, none of which begins with what the one before it ended with."""
    rng, last = np.random.default_rng(0), -1
    while True:
        order = rng.permutation(n).tolist()
        if n > 1 and order[0] == last:
            order.append(order.pop(0))
        last = order[-1] if order else -1
        yield order


def measure_artefacts(
    artefacts: Sequence[Artefact],
    protocol: Protocol,
    bind: Callable[[Artefact], Callable[[], object]],
    told: Callable[[Exception], str],
    clock: Clock = time.perf_counter_ns,
) -> list[Timing]:
    """`measure_interleaved` for a backend whose handles know their `threads`.

    `bind` makes an artefact's timed call; `told` says what an exception of the engine means; a `clock` of the device's
    own waits for what the calls before it began. HantcError if an artefact
    was built for other threads than the protocol's, cannot be timed, or fails while it runs."""
    for a in artefacts:
        if a.handle.threads != protocol.threads:
            raise HantcError(
                f"an artefact built for {a.handle.threads} thread(s) cannot be timed at {protocol.threads}"
            )
    try:
        return measure_interleaved([bind(a) for a in artefacts], protocol, clock)
    except HantcError:
        raise
    except Exception as e:  # the engines' own exceptions share no base class
        raise ModelError(told(e)) from e


def _fastest_ms(run: Callable[[], object], protocol: Protocol, clock: Clock) -> float:
    one = _Sampling(1, 1)
    return max(1e-4, min(_sample_ms(run, one, clock, run) for _ in range(max(1, protocol.warmup))))


def _slice_ms(protocol: Protocol) -> float:
    return min(_SLICE_MS, protocol.min_sample_ms)


def _rounds(fastest: Sequence[float], protocol: Protocol) -> int:
    """As many rounds of short samples as take the time of `protocol.samples` rounds of long ones."""
    long = sum(max(ms, protocol.min_sample_ms) for ms in fastest)
    short = sum(max(ms, _slice_ms(protocol)) for ms in fastest)
    return max(1, round(protocol.samples * long / short)) if fastest else 0


def _plan(fastest_ms: float, protocol: Protocol) -> _Sampling:
    total = max(1, min(_MAX_RUNS, math.ceil(_slice_ms(protocol) / fastest_ms)))
    size = min(total, math.ceil(_GROUP_MS / fastest_ms))
    settle = max(1, min(protocol.settle, int(_SETTLE_MS / fastest_ms)))
    return _Sampling(math.ceil(total / size), size, settle)


def _sample_ms(run: Callable[[], object], plan: _Sampling, clock: Clock, prepare: Callable[[], object]) -> float:
    for _ in range(plan.settle):
        prepare()
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


class Eviction:
    """Fills the caches of as many cores as a network's threads take with other data: together they write to twice the
    bytes of the last level, which they share, each to no less than `_OWN_CACHE`; all at once, so that they spread over
    the cores."""

    def __init__(self, threads: int) -> None:
        size = max(2 * cache_size() // max(1, threads), _OWN_CACHE)
        self._parts = [np.zeros(size // 8) for _ in range(max(1, threads))]
        self._pool = ThreadPoolExecutor(len(self._parts))

    def __call__(self) -> None:
        list(self._pool.map(_touch, self._parts))


def _touch(part: np.ndarray[Any, Any]) -> None:
    part += 1.0


def _switches() -> int:
    """How often the system took a core away from a thread of this process; 0 where it does not tell."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource is not None else 0


def uncertainty(samples: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of `_timing`'s figure, relative to it."""
    quiet = _quiet(samples)
    if 2 * len(quiet) < len(samples):
        return math.inf
    middle, reach = (len(quiet) - 1) / 2, 0.98 * math.sqrt(len(quiet))
    low, high = max(0, math.floor(middle - reach)), min(len(quiet) - 1, math.ceil(middle + reach))
    return (quiet[high] - quiet[low]) / 2 / statistics.median(quiet)


def _quiet(samples: Sequence[float]) -> list[float]:
    """Those samples that nothing slowed down, in order."""
    level = float(np.percentile(samples, _QUIET_LEVEL))
    return sorted(s for s in samples if s <= _QUIET * level)


def _timing(samples: Sequence[float]) -> Timing:
    low, high = np.percentile(samples, [25, 75])
    return Timing(median_ms=statistics.median(_quiet(samples)), iqr_ms=float(high - low), samples=len(samples))
