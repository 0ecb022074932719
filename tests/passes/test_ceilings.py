"""Ceilings measured on a machine whose ceilings are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from onnx import TensorProto

from hantc.backends.prediction import Machine
from hantc.backends.roofline.backend import RooflineBackend
from hantc.core.backend_api import Artefact, BuildSpec, Capabilities
from hantc.core.errors import HantcError
from hantc.core.types import Protocol, Timing
from hantc.passes.ceilings import Ceilings, measure_ceilings

if TYPE_CHECKING:
    from onnx import ModelProto

    from tests.passes.conftest import Lab

MACHINE = Machine(
    "known",
    peak_fp32=50e9,
    peak_int8=170e9,
    bandwidth=9e9,
    bandwidth_max=14e9,
    op_overhead_s=2e-6,
    parallel_efficiency=0.8,
)


class Pretender(RooflineBackend):
    """Takes its predictions for measurements."""

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), measures=True)


class Refusing(Pretender):
    """Cannot build INT8."""

    def build(self, model: ModelProto, spec: BuildSpec) -> Artefact:
        if any(n.op_type == "QuantizeLinear" for n in model.graph.node):
            raise HantcError("no INT8 here")
        return super().build(model, spec)


def test_a_known_machine_is_recovered() -> None:
    found = measure_ceilings(Pretender(MACHINE), 4)
    peaks = dict(found.peaks)
    assert peaks["fp32"] == pytest.approx(50e9, rel=0.03)
    assert peaks["int8"] == pytest.approx(170e9, rel=0.1)  # a network's first and last border weigh on it
    assert found.bandwidth == pytest.approx(9e9, rel=0.1)
    assert found.bandwidth_max == pytest.approx(14e9, rel=0.15)
    assert found.op_overhead_s == pytest.approx(2e-6, rel=0.1)
    assert found.parallel_efficiency == pytest.approx(0.8, rel=0.05)
    assert found.cores == 4


class Watched(Pretender):
    """Keeps what it was asked: an engine that takes signed activations alone, as TensorRT."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.kinds: set[int] = set()
        self.cores: set[tuple[int, tuple[int, ...]]] = set()

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), symmetric=True)

    def build(self, model: ModelProto, spec: BuildSpec) -> Artefact:
        weights = {w.name: w for w in model.graph.initializer}
        self.kinds |= {weights[n.input[2]].data_type for n in model.graph.node if n.op_type == "QuantizeLinear"}
        return super().build(model, spec)

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        self.cores.add((protocol.threads, protocol.cores))
        return super().measure(artefacts, protocol)


def test_it_is_measured_as_the_engine_wants_it_and_where_threads_stay() -> None:
    machine = Watched(MACHINE)
    measure_ceilings(machine, 2, (4, 6))
    assert machine.kinds == {TensorProto.INT8}
    assert machine.cores == {(1, (4,)), (2, (4, 6))}


def test_a_single_core_adds_nothing() -> None:
    found = measure_ceilings(Pretender(MACHINE), 1)
    assert found.parallel_efficiency == 1.0
    assert found.bandwidth == found.bandwidth_max


def test_peaks_of_several_threads() -> None:
    c = Ceilings((("fp32", 10.0),), 1.0, 2.0, 0.0, 0.5, cores=4)
    assert [c.peak("fp32", n) for n in (1, 2, 4, 8)] == [10.0, 15.0, 25.0, 25.0]
    with pytest.raises(KeyError):
        c.peak("int8", 1)


def test_an_engine_that_predicts_has_none_to_measure() -> None:
    with pytest.raises(HantcError, match="measures nothing here"):
        measure_ceilings(RooflineBackend(), 1)


def test_the_real_engine_has_sane_ones(lab: Lab) -> None:
    found = measure_ceilings(lab.ort, 1)
    assert {"fp32", "int8"} <= {p for p, _ in found.peaks}
    assert all(1e8 < v < 1e14 for _, v in found.peaks)
    assert 1e8 < found.bandwidth <= found.bandwidth_max < 1e13
    assert 0 <= found.op_overhead_s < 1e-2
