"""ONNX Runtime backend: fingerprint, timing statistics, refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hantc.backends import device
from hantc.backends.feeds import random_feeds
from hantc.backends.onnxruntime.backend import OnnxRuntimeBackend
from hantc.backends.timing import measure_interleaved
from hantc.core.backend_api import BuildSpec
from hantc.core.errors import HantcError, ModelError
from hantc.core.types import Device, Protocol


def cpuinfo(cores: int, threads: int, flags: str) -> str:
    """Text of /proc/cpuinfo for one socket with hyper-threads."""
    numbers = range(cores * threads)
    blocks = (
        f"processor\t: {n}\nmodel name\t: Test CPU  @ 2GHz\nphysical id\t: 0\n"
        f"core id\t: {n % cores}\nflags\t: {flags}\n"
        for n in numbers
    )
    return "\n".join(blocks)


def test_physical_cores_count_cores_not_threads_and_respect_the_affinity() -> None:
    text = cpuinfo(cores=4, threads=2, flags="avx2")
    assert len(device.parse_cpuinfo(text)) == 8
    for allowed, want in [(range(2), 2), ((1, 5), 1), ((0,), 1)]:
        # the machine that runs the test may itself have a CPU quota of fewer cores
        assert device.physical_cores(text, frozenset(allowed)) in range(1, want + 1)
    no_ids = "processor : 0\n\nprocessor : 1\n"
    assert device.physical_cores(no_ids, frozenset({0})) == 1
    assert device.physical_cores("", frozenset({3})) == 1


def test_fingerprint_keeps_the_flags_that_matter() -> None:
    found = device.fingerprint((("onnxruntime", "1"),), cpuinfo(2, 1, "fpu sse2 avx2 avx512f avx512_vnni amx_int8"))
    assert found.flags == ("amx_int8", "avx2", "avx512_vnni", "avx512f")
    assert found.cpu == "Test CPU @ 2GHz"
    assert device.has_vnni(found)
    assert not device.has_vnni(Device("x", ("avx2", "avx512f"), 1, ()))


def test_capabilities_agree_with_the_flags() -> None:
    caps = OnnxRuntimeBackend().capabilities()
    assert caps.reduce_range == device.needs_reduced_range(caps.device)
    assert any(n.startswith("no VNNI: ") for n in caps.notes) == caps.reduce_range


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
    # a sample of a is 3 runs, one of b is 1, each after one untimed; the order rotates
    assert "".join(fake.calls[8:]) == "aaaabb" + "bbaaaa" + "aaaabb" + "bbaaaa" + "aaaabb"


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


def test_wide_spread_asks_for_more_rounds_up_to_a_limit() -> None:
    fake = FakeRuns()
    runs = [fake.run("a", [1.0, 3.0, 2.0]), fake.run("b", [1.0])]
    timings = measure_interleaved(runs, Protocol(1, samples=4, min_sample_ms=0.1), lambda: fake.now)
    assert [t.samples for t in timings] == [8, 8]


def net(dims: list[int | str | None], elem_type: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """y = Identity(x) over the given dims."""
    x, y = (helper.make_tensor_value_info(n, elem_type, dims) for n in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_feeds_by_type_and_symbol() -> None:
    assert random_feeds(net(["N", 3]), 4)["x"].shape == (4, 3)
    shared = random_feeds(net(["N", 3, "N"]), 2, seed=1)["x"]
    assert shared.shape == (2, 3, 2)
    ids = random_feeds(net([2, 5], TensorProto.INT64), 1)["x"]
    assert ids.dtype == np.int64 and set(ids.ravel()) <= {0, 1}
    assert random_feeds(net([], TensorProto.BOOL), 1)["x"].dtype == np.bool_
    with pytest.raises(ModelError, match="'H' at axis 2"):
        random_feeds(net(["N", 3, "H", "W"]), 1)
    with pytest.raises(ModelError, match="no test input"):
        random_feeds(net([1], TensorProto.STRING), 1)


def test_dynamic_resolution_runs_but_cannot_be_timed() -> None:
    backend = OnnxRuntimeBackend()
    artefact = backend.build(net(["N", 3, "H", "W"]), BuildSpec())
    x = np.ones((1, 3, 4, 5), dtype=np.float32)
    np.testing.assert_array_equal(backend.run(artefact, {"x": x})[0], x)
    with pytest.raises(ModelError, match=r"cannot be timed.*'H'"):
        backend.measure([artefact], Protocol(1))


def test_threads_must_agree() -> None:
    backend = OnnxRuntimeBackend()
    artefact = backend.build(net([1, 3]), BuildSpec(threads=1))
    with pytest.raises(HantcError, match=r"built for 1 thread\(s\)"):
        backend.measure([artefact], Protocol(threads=2))
