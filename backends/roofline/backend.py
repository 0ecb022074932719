"""The roofline model as a backend: deterministic, needs no hardware; its figures are predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from hantc.backends import predicted
from hantc.backends.prediction import Machine
from hantc.core.backend_api import Artefact, BuildSpec, Capabilities, Feeds
from hantc.core.types import Device, Protocol, Timing


class RooflineBackend:
    """Predicts latencies from FLOPs and bytes; `handle.prediction` holds the details."""

    name = "roofline"

    def __init__(self, machine: Machine | None = None) -> None:
        self.machine = machine or Machine()

    def capabilities(self) -> Capabilities:
        """Always available; never measures."""
        m = self.machine
        device = Device(f"roofline: {m.name}", predicted.ceilings(m), cores=1, versions=(("roofline", "1"),))
        notes = ("figures are predicted, not measured",)
        return Capabilities(True, f"predicts for {m.name}", ("fp32", "int8"), device, measures=False, notes=notes)

    def supports(self, model: onnx.ModelProto) -> tuple[bool, str]:
        """Whether every node's shape can be inferred."""
        return predicted.supports(model, self.machine)

    def build(self, model: onnx.ModelProto, spec: BuildSpec) -> Artefact:
        """Predict for `spec`. ModelError if the model is invalid or has unknown shapes."""
        return predicted.build(model, self.machine, spec)

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        """The predictions, with no spread and no samples."""
        return predicted.timings(artefacts)

    def run(self, artefact: Artefact, feeds: Feeds) -> list[np.ndarray[Any, Any]]:
        """Run with ONNX Runtime, for the numbers. ModelError if it cannot."""
        return predicted.run(artefact, feeds)
