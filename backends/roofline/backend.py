"""The roofline model as a backend: deterministic, needs no hardware; its figures are predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from hantc.backends.feeds import random_feeds
from hantc.backends.roofline.model import Machine, Prediction, predict
from hantc.core.backend_api import Artefact, BuildSpec, Capabilities, Feeds
from hantc.core.errors import HantcError, ModelError
from hantc.core.types import Device, Protocol, Timing


@dataclass(frozen=True)
class _Handle:
    model: onnx.ModelProto
    prediction: Prediction

    @cached_property
    def session(self) -> ort.InferenceSession:
        # numbers only, never timed; ONNX's own reference evaluator lacks per-channel QDQ below opset 19
        options = ort.SessionOptions()
        options.log_severity_level = 4
        return ort.InferenceSession(self.model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class RooflineBackend:
    """Predicts latencies from FLOPs and bytes; `handle.prediction` holds the details."""

    name = "roofline"

    def __init__(self, machine: Machine | None = None) -> None:
        self.machine = machine or Machine()

    def capabilities(self) -> Capabilities:
        """Always available; never measures."""
        m = self.machine
        # the ceilings are the device: rows predicted under others must not mix
        ceilings = (
            f"fp32={m.peak_fp32:g}",
            f"int8={m.peak_int8:g}",
            f"bw={m.bandwidth:g}/{m.bandwidth_max:g}",
            f"op={m.op_overhead_s:g}",
            f"par={m.parallel_efficiency:g}",
        )
        device = Device(cpu=f"roofline: {m.name}", flags=ceilings, cores=1, versions=(("roofline", "1"),))
        notes = ("figures are predicted, not measured",)
        return Capabilities(True, f"predicts for {m.name}", ("fp32", "int8"), device, measures=False, notes=notes)

    def supports(self, model: onnx.ModelProto) -> tuple[bool, str]:
        """Whether every node's shape can be inferred."""
        try:
            predict(model, self.machine, batch=1, threads=1)
        except HantcError as e:
            return False, e.message
        return True, ""

    def build(self, model: onnx.ModelProto, spec: BuildSpec) -> Artefact:
        """Predict for `spec`. ModelError if the model is invalid or has unknown shapes."""
        kept = onnx.ModelProto()
        kept.CopyFrom(model)
        prediction = predict(kept, self.machine, spec.batch, spec.threads)
        return Artefact(_Handle(kept, prediction), random_feeds(kept, spec.batch), size_bytes=kept.ByteSize())

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        """The predictions, with no spread and no samples."""
        return [Timing(a.handle.prediction.latency_ms, 0.0, 0) for a in artefacts]

    def run(self, artefact: Artefact, feeds: Feeds) -> list[np.ndarray[Any, Any]]:
        """Run with ONNX Runtime, for the numbers. ModelError if it cannot."""
        try:
            return [np.asarray(o) for o in artefact.handle.session.run(None, dict(feeds))]
        except Exception as e:  # onnxruntime raises several unrelated types
            raise ModelError(f"the model cannot be run: {e}") from e
