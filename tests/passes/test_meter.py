"""One clock for a table that is measured over minutes, on a machine whose speed changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from hantc.backends.onnxruntime.backend import OnnxRuntimeBackend
from hantc.core.backend_api import Artefact, BuildSpec, Capabilities
from hantc.core.errors import ModelError
from hantc.core.types import CostRow, Protocol, Timing
from hantc.passes.meter import Meter, Work

if TYPE_CHECKING:
    from tests.passes.conftest import Lab


class Moody:
    """A machine that takes a millisecond for each node, times what `slowness` says."""

    name = "moody"

    def __init__(self, slowness: Sequence[float], *, refuses: str = "") -> None:
        self.slowness, self.refuses, self.calls = list(slowness), refuses, 0

    def capabilities(self) -> Capabilities:
        return OnnxRuntimeBackend().capabilities()

    def build(self, model: ModelProto, spec: BuildSpec) -> Artefact:
        if self.refuses and any(n.op_type == self.refuses for n in model.graph.node):
            raise ModelError(f"no {self.refuses}")
        return Artefact(len(model.graph.node))

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        slow = self.slowness[min(self.calls, len(self.slowness) - 1)]
        self.calls += 1
        return [Timing(slow * a.handle, 0.1 * slow, protocol.samples) for a in artefacts]


def chain(n: int) -> ModelProto:
    """n rectifiers in a row."""
    x, y = (helper.make_tensor_value_info(v, TensorProto.FLOAT, ["N", 2, 3, 3]) for v in ("t0", f"t{n}"))
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(n)]
    graph = helper.make_graph(nodes, "chain", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def meter(lab: Lab, backend: Any, **rest: Any) -> Meter:
    return Meter(lab.fresh(backend=backend, **rest))


def work(m: Meter, n: int, shape: tuple[int, ...] = (2, 3, 3)) -> Work:
    row = CostRow("r00", f"c{n}", "fp32", 0.0, 0.0, 0, "moody", "d", 1, 1)
    return Work(m.key(candidate=n, shape=shape), row, chain(n), True, shape, shape)


def test_figures_do_not_depend_on_the_pace(lab: Lab) -> None:
    even, swinging = meter(lab, Moody([1.0])), meter(lab, Moody([1.0, 2.0, 0.5, 3.0]))
    figures = []
    for m in (even, swinging):
        rows = m.rows([work(m, 3), work(m, 5, (2, 4, 4))])  # two groups
        timing, _ = m.network(chain(7))
        figures.append([r.latency_ms for r in rows] + [timing.median_ms, timing.iqr_ms])
    assert figures[0] == pytest.approx(figures[1])
    assert figures[0][-2] == pytest.approx(7.0)
    assert swinging.pace == pytest.approx([2.0, 0.5, 3.0])


@pytest.mark.parametrize(("slow", "told"), [(1.05, ""), (1.5, "0.90 to 1.50 times")])
def test_a_restless_machine_is_told(lab: Lab, slow: float, told: str) -> None:
    m = meter(lab, Moody([1.0, *[0.9, 1.0, slow] * 8]))
    assert not m.restless, "nothing was timed yet"
    for n in range(20):
        m.rows([work(m, 3 + n)])
    assert told in m.restless and bool(told) == bool(m.restless)


def test_the_pace_of_the_network_is_kept_with_it(lab: Lab) -> None:
    backend = Moody([1.0, 1.5])
    ctx = lab.fresh(backend=backend)
    first = Meter(ctx).network(chain(4))
    assert first[1] == pytest.approx(1.5)
    calls = backend.calls
    assert Meter(lab.fresh(backend=backend, store=ctx.store)).network(chain(4)) == first
    assert backend.calls == calls, "nothing is measured again"


def test_rows_of_pinned_threads_are_rows_of_their_own(lab: Lab) -> None:
    free = lab.fresh(backend=Moody([1.0]))
    pinned, elsewhere = (Meter(replace(free, cores=cores)) for cores in ((0,), (1,)))
    assert Meter(free).key(candidate=1) != pinned.key(candidate=1) == elsewhere.key(candidate=1)
    assert pinned.protocol.cores == pinned.careful.cores == (0,)


def test_rows_are_measured_anew_when_their_reference_is_lost(lab: Lab) -> None:
    ctx = lab.fresh(backend=Moody([1.0]))
    m = Meter(ctx)
    m.rows([work(m, 3)])
    for entry in ctx.store.ls("network"):
        ctx.store.remove(entry.kind, entry.key, ".json")
    slower = Meter(lab.fresh(backend=Moody([2.0]), store=ctx.store))
    (row,) = slower.rows([work(slower, 3)])
    assert slower.measured == 1
    assert row.latency_ms == pytest.approx(2 * m.rows([work(m, 3)])[0].latency_ms)


def test_a_backend_without_the_reference_measures_as_the_clock_says(lab: Lab) -> None:
    m = meter(lab, Moody([1.0, 2.0], refuses="HardSwish"))
    assert m.network(chain(4))[0].median_ms == pytest.approx(4.0)
    assert m.network(chain(5))[0].median_ms == pytest.approx(10.0)


def test_what_the_backend_refuses_costs_too_much_to_be_chosen(lab: Lab) -> None:
    m = meter(lab, Moody([1.0], refuses="Relu"))
    m._canary = Artefact(1)
    (row,) = m.rows([work(m, 3)])
    assert row.latency_ms >= 1e8 and row.samples == 0


def test_the_reference_is_a_network_of_its_own(lab: Lab) -> None:
    """It runs on the real engine, and takes about as long as a candidate does."""
    m = meter(lab, lab.ort)
    timing = m.time([onnx.load_from_string(chain(1).SerializeToString())])[0]
    assert np.isfinite(timing.median_ms) and timing.median_ms > 0
    assert 0.01 < m.reference_ms < 1000


class Listing(Moody):
    """Keeps the sizes of what it builds."""

    def __init__(self) -> None:
        super().__init__([1.0])
        self.built: list[int] = []

    def build(self, model: ModelProto, spec: BuildSpec) -> Artefact:
        self.built.append(len(model.graph.node))
        return super().build(model, spec)


@pytest.mark.parametrize(("mb", "copies"), [(0.0, 4), (1.5, 4), (1.6, 3), (2.5, 2), (5.2, 1), (80.0, 1)])
@pytest.mark.parametrize("is_chain", [True, False])
def test_heavy_parts_are_timed_in_fewer_copies(lab: Lab, mb: float, copies: int, is_chain: bool) -> None:
    """Four copies of 5 MB each would miss caches that keep a whole student's weights."""
    machine = Listing()
    m = meter(lab, machine)
    part = replace(work(m, 50), chain=is_chain)
    light = m.rows([part])[0].latency_ms
    part = replace(part, key=m.key(heavy=mb), row=replace(part.row, params=round(mb * 250_000)))
    before = len(machine.built)
    assert m.rows([part])[0].latency_ms == pytest.approx(light) == pytest.approx(50.0)
    assert max(machine.built[before:]) // 50 == copies


def test_heavy_parts_are_not_timed_as_light_ones_of_their_shapes_are(lab: Lab) -> None:
    machine = Listing()
    m = meter(lab, machine)
    light = work(m, 50)
    heavy = replace(light, key=m.key(heavy=True), row=replace(light.row, params=1_300_000))
    before = len(machine.built)
    assert [r.latency_ms for r in m.rows([light, heavy])] == pytest.approx([50.0, 50.0])
    assert sorted(n // 50 for n in machine.built[before:] if n >= 50) == [1, 4]
