"""Measuring the finished files: restless machines are told of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from hantc.backends.roofline.backend import RooflineBackend
from hantc.core.backend_api import Artefact
from hantc.core.types import Protocol, Timing
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
