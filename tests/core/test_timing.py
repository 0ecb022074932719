"""Timing statistics, on a simulated clock."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hantc.core.memory import cache_size
from hantc.core.timing import Eviction, measure_interleaved, uncertainty
from hantc.core.types import Protocol


class FakeRuns:
    """Callables that take given times on a simulated clock."""

    def __init__(self) -> None:
        self.now = 0
        self.calls: list[str] = []

    def run(self, name: str, times_ms: list[float]) -> Callable[[], None]:
        """A callable; its durations cycle through `times_ms`."""
        durations = itertools.cycle(times_ms)

        def call() -> None:
            self.now += int(next(durations) * 1e6)
            self.calls.append(name)

        return call


def test_samples_are_interleaved_and_long_enough() -> None:
    fake = FakeRuns()
    runs = [fake.run("a", [1.0]), fake.run("b", [10.0])]
    timings = measure_interleaved(runs, Protocol(1, warmup=2, samples=5, min_sample_ms=3.0), lambda: fake.now)
    assert [(t.median_ms, t.iqr_ms, t.samples) for t in timings] == [(1.0, 0.0, 5), (10.0, 0.0, 5)]
    # a sample of a is 3 runs, one of b is 1, each after one untimed; neither follows itself
    assert "".join(fake.calls[8:]) in ("aaaabb" * 5, "bbaaaa" * 5)


def test_whole_networks_settle_before_each_sample() -> None:
    """Five runs of what takes a millisecond, two of what takes four, one of what takes longer than caches remember."""
    fake = FakeRuns()
    runs = [fake.run(name, [ms]) for name, ms in (("a", 1.0), ("b", 4.0), ("c", 20.0))]
    protocol = Protocol(1, warmup=1, samples=1, min_sample_ms=3.0, settle=5)
    timings = measure_interleaved(runs, protocol, lambda: fake.now)
    assert [t.median_ms for t in timings] == [1.0, 4.0, 20.0]
    sample = {"a": 5 + 3, "b": 2 + 1, "c": 1 + 1}
    assert {name: fake.calls[6:].count(name) for name in sample} == sample


def test_no_artefact_always_runs_behind_the_same_neighbour() -> None:
    fake = FakeRuns()
    runs = [fake.run(name, [10.0]) for name in "abcd"]
    measure_interleaved(runs, Protocol(1, warmup=1, samples=40, min_sample_ms=3.0), lambda: fake.now)
    order = fake.calls[8::2]  # each sample is one untimed run and one that counts
    assert len(order) == 160 and all(sorted(order[i : i + 4]) == list("abcd") for i in range(0, 160, 4))
    assert all(a != b for a, b in itertools.pairwise(order)), "what follows itself finds its weights in the caches"
    behind = {name: [a for a, b in itertools.pairwise(order) if b == name] for name in "abcd"}
    for name, before in behind.items():
        counts = [before.count(other) for other in set(before)]
        assert len(counts) > 1 and max(counts) <= len(before) / 2 + 1, name


def test_interruptions_do_not_move_the_result() -> None:
    fake = FakeRuns()
    spiky = [1.0] * 9 + [40.0]
    protocol = Protocol(1, samples=15, min_sample_ms=5.0)
    (timing,) = measure_interleaved([fake.run("a", spiky)], protocol, lambda: fake.now)
    assert (timing.median_ms, timing.iqr_ms, timing.samples) == (1.0, 0.0, 25)


def test_long_samples_are_cut_into_short_ones_of_the_same_total() -> None:
    fake = FakeRuns()
    runs = [fake.run("a", [1.0]), fake.run("b", [5.0])]
    timings = measure_interleaved(runs, Protocol(1, warmup=1, samples=4, min_sample_ms=15.0), lambda: fake.now)
    # 4 rounds of 15 + 15 ms are 15 rounds of 3 + 5 ms
    assert [(t.median_ms, t.samples) for t in timings] == [(1.0, 15), (5.0, 15)]


def test_a_machine_that_is_rarely_quiet_still_gives_the_quiet_figure() -> None:
    fake = FakeRuns()
    run = fake.run("a", [1.0] * 10 + [1.4] * 90)  # a tenth of the time at full speed
    (timing,) = measure_interleaved([run], Protocol(1, samples=100, min_sample_ms=0.1), lambda: fake.now)
    assert timing.median_ms == pytest.approx(1.0)


def test_slow_spells_show_in_the_spread_but_not_in_the_median() -> None:
    fake = FakeRuns()
    run = fake.run("a", [1.0] * 12 + [2.0] * 20)
    (timing,) = measure_interleaved([run], Protocol(1, samples=16, min_sample_ms=0.1), lambda: fake.now)
    assert timing.median_ms == 1.0 and timing.iqr_ms == 1.0


def test_very_short_runs_are_timed_in_groups() -> None:
    fake = FakeRuns()
    reads = 0

    def clock() -> int:
        nonlocal reads
        reads += 1
        return fake.now

    (timing,) = measure_interleaved(
        [fake.run("a", [0.001])], Protocol(1, warmup=1, samples=2, min_sample_ms=1.0), clock
    )
    assert timing.median_ms == pytest.approx(0.001)
    assert len(fake.calls) == 2 + 2 * (1 + 1000)
    assert reads == 2 * (1 + 2 * 10)


def test_a_slow_machine_is_waited_for_up_to_a_limit() -> None:
    """Two thirds of the samples are disturbed: what the quiet ones say is not to be trusted yet."""
    fake = FakeRuns()
    runs = [fake.run("a", [1.0, 3.0, 2.0]), fake.run("b", [1.0])]
    timings = measure_interleaved(runs, Protocol(1, samples=4, min_sample_ms=0.1), lambda: fake.now)
    assert [t.samples for t in timings] == [12, 12]


def test_rounds_end_when_the_interval_is_narrow() -> None:
    fake = FakeRuns()
    first = [1.0, 1.0, 1.0, 1.09] * 4  # every second call is timed: eight samples, half of them slower
    run = fake.run("a", [1.0] * 6 + first + [1.0] * 200)
    (timing,) = measure_interleaved([run], Protocol(1, samples=8, min_sample_ms=0.1), lambda: fake.now)
    assert 8 < timing.samples < 24 and timing.median_ms == 1.0


@pytest.mark.parametrize("n", [12, 25, 100])
def test_the_interval_covers_the_median(n: int) -> None:
    """In 95 of 100 cases or more, whatever the distribution: here a skewed one within the quiet range."""
    rng = np.random.default_rng(n)
    true, covered = float(np.median(1 + 0.05 * rng.beta(1, 3, 1_000_000))), 0
    for _ in range(1000):
        samples = list(1 + 0.05 * rng.beta(1, 3, n))
        covered += abs(float(np.median(samples)) - true) <= 2 * uncertainty(samples)  # it is not symmetric
    assert covered >= 950


def test_the_interval_narrows_with_samples() -> None:
    rng = np.random.default_rng(0)
    found = [uncertainty(list(1 + 0.05 * rng.random(n))) for n in (12, 100, 1000)]
    assert found[0] > found[1] > found[2] > 0
    assert uncertainty([1.0]) == 0.0 and uncertainty([1.0, 2.0, 2.0]) == math.inf


def test_cold_runs_come_behind_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run is timed by itself, and none runs behind its like."""
    fake = FakeRuns()
    monkeypatch.setattr("hantc.core.timing.Eviction", lambda threads: lambda: fake.calls.append(f"e{threads}"))
    runs = [fake.run("a", [1.0]), fake.run("b", [0.001])]
    timings = measure_interleaved(runs, Protocol(2, warmup=1, samples=3, cold=True), lambda: fake.now)
    assert [(t.median_ms, t.samples) for t in timings] == [(1.0, 3), (0.001, 3)]
    assert "".join(fake.calls[4:]) in ("e2ae2b" * 3, "e2be2a" * 3)


def test_eviction_writes_to_more_than_the_caches_hold() -> None:
    evict = Eviction(2)
    evict()
    assert sum(p.nbytes for p in evict._parts) >= 2 * cache_size() - 16
    assert {p.nbytes for p in Eviction(4096)._parts} == {8 << 20}
    assert all(bool((p == 1).all()) for p in evict._parts)


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ({"index0": "32K", "index3": "48M"}, 48 << 20),
        ({"index0": "48K"}, 48 << 10),
        ({"index3": "768M"}, 256 << 20),
        ({"index3": "?"}, 32 << 20),
        ({}, 32 << 20),
    ],
)
def test_cache_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, str], wanted: int) -> None:
    for name, size in sizes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(size + "\n")
    monkeypatch.setattr("hantc.core.memory._CACHES", tmp_path)
    assert cache_size() == wanted
