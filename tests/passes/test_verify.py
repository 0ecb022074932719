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
