"""Measuring the finished files: restless machines are told of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from onnx import ModelProto

from hantc.backends.roofline.backend import RooflineBackend
from hantc.core.backend_api import Artefact, BuildSpec
from hantc.core.errors import ModelError
from hantc.core.types import Protocol, Timing
from hantc.dialect.emitter import emit
from hantc.passes.verify import Verify
from tests.passes.conftest import COUNTING

if TYPE_CHECKING:
    from tests.passes.conftest import Lab


class Restless(RooflineBackend):
    """Figures that spread."""

    def __init__(self, spread: float) -> None:
        super().__init__(COUNTING)
        self.spread = spread

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        """As predicted, but uncertain."""
        return [replace(t, iqr_ms=self.spread * t.median_ms) for t in super().measure(artefacts, protocol)]


@pytest.mark.parametrize(("spread", "told"), [(0.05, False), (0.6, True)])
def test_a_restless_machine_is_noted(lab: Lab, spread: float, told: bool) -> None:
    ctx = lab.context(backend=Restless(spread))
    note = Verify._restless(Verify._time([lab.model, lab.model], ctx))
    assert ("restless" in note and "60 %" in note) if told else note == ""


class Tiring(RooflineBackend):
    """Each call of `measure` finds the machine twice as slow as the one before."""

    def __init__(self) -> None:
        super().__init__(COUNTING)
        self.calls = 0

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        """As predicted, times what the machine has come to."""
        slow, self.calls = 2.0**self.calls, self.calls + 1
        return [replace(t, median_ms=slow * t.median_ms) for t in super().measure(artefacts, protocol)]


def test_networks_timed_in_pairs_are_on_one_clock(lab: Lab) -> None:
    first, *others = Verify._time([lab.model] * 4, lab.context(backend=Tiring()))
    assert len(others) == 3
    assert [t.median_ms for t in others] == pytest.approx([first.median_ms] * 3)


class Crowded(RooflineBackend):
    """Others use the caches: what is as large as the teacher takes `factor` times as long, the rest as ever. Whether
    there is a reference network hangs on `knows`."""

    def __init__(self, large: int, factor: float, *, knows: bool) -> None:
        super().__init__(COUNTING)
        self.large, self.factor, self.knows = large, factor, knows

    def build(self, model: ModelProto, spec: BuildSpec) -> Artefact:
        """As ever; the reference network is refused if it is not known."""
        if model.graph.name == "canary" and not self.knows:
            raise ModelError("no")
        return replace(super().build(model, spec), size_bytes=model.ByteSize())

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        """As predicted, and longer."""
        slow = [self.factor if a.size_bytes >= self.large else 1.0 for a in artefacts]
        timings = super().measure(artefacts, protocol)
        return [replace(t, median_ms=s * t.median_ms) for t, s in zip(timings, slow, strict=True)]


@pytest.mark.parametrize(
    ("knows", "options", "wanted"),
    [
        (True, {}, 1.0),
        (False, {}, 2.0),  # without a reference network only the teacher tells how fast the machine is
        (True, {"lut": Path("table.json")}, 2.0),  # whose reference network may have run in another hour
        (True, {"data": None}, 2.0),  # exact rewrites: the student has the teacher's weights, and their lot
    ],
)
def test_a_crowded_cache_does_not_make_the_prediction_wrong(
    lab: Lab, knows: bool, options: dict[str, Any], wanted: float
) -> None:
    """The teacher takes twice what it took when the table was made, the student the same: so is it predicted."""
    state = lab.rewritten()
    assert state.student is not None and state.network is not None and state.costs is not None
    teacher, student = emit(state.network).model, emit(state.student).model
    ctx = lab.fresh(backend=Crowded(teacher.ByteSize(), 2.0, knows=knows), **options)
    assert student.ByteSize() < teacher.ByteSize()
    timings = Verify._time([teacher, student], ctx)
    assert timings[0].median_ms == pytest.approx(2 * state.costs.teacher_ms, rel=0.01)
    pace = Verify._pace(replace(state, emitted=student), ctx, timings, (teacher, teacher))
    assert pace == pytest.approx(wanted, rel=0.01)
