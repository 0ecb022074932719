"""Networks on a machine that is not here: latencies from the roofline model, numbers from ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from hantc.backends.feeds import empty_feeds
from hantc.backends.prediction import VERSION, Machine, Prediction, predict
from hantc.core.backend_api import Artefact, BuildSpec, Feeds
from hantc.core.errors import HantcError, ModelError
from hantc.core.types import Timing


@dataclass(frozen=True)
class PredictedHandle:
    """A model and what is predicted of it."""

    model: onnx.ModelProto
    prediction: Prediction

    @cached_property
    def session(self) -> ort.InferenceSession:
        """For numbers only, never timed; ONNX's own reference evaluator lacks per-channel QDQ below opset 19. What is
        written between Q and DQ is computed as it is written: ONNX Runtime 1.31's own INT8 forms refuse scales in FP16
        for some operators, and lose small biases to them for others (WeightBiasQuantization)."""
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        return ort.InferenceSession(self.model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def ceilings(machine: Machine) -> tuple[str, ...]:
    """The machine's ceilings as text: a device's fingerprint, since rows predicted under others must not mix."""
    half = (f"fp16={machine.peak_fp16:g}",) if machine.peak_fp16 else ()
    return (
        f"model={VERSION}",
        f"fp32={machine.peak_fp32:g}",
        *half,
        f"int8={machine.peak_int8:g}",
        f"bw={machine.bandwidth:g}/{machine.bandwidth_max:g}",
        f"op={machine.op_overhead_s:g}",
        f"par={machine.parallel_efficiency:g}",
    )


def supports(model: onnx.ModelProto, machine: Machine) -> tuple[bool, str]:
    """Whether every node's shape can be inferred."""
    try:
        predict(model, machine, batch=1, threads=1)
    except HantcError as e:
        return False, e.message
    return True, ""


def build(model: onnx.ModelProto, machine: Machine, spec: BuildSpec) -> Artefact:
    """Predict for `spec`. ModelError if the model is invalid or has unknown shapes."""
    kept = onnx.ModelProto()
    kept.CopyFrom(model)
    prediction = predict(kept, machine, spec.batch, spec.threads)
    return Artefact(PredictedHandle(kept, prediction), empty_feeds(kept, spec.batch), size_bytes=kept.ByteSize())


def timings(artefacts: Sequence[Artefact]) -> list[Timing]:
    """The predictions, with no spread and no samples."""
    return [Timing(a.handle.prediction.latency_ms, 0.0, 0) for a in artefacts]


def run(artefact: Artefact, feeds: Feeds) -> list[np.ndarray[Any, Any]]:
    """Run with ONNX Runtime, for the numbers. ModelError if it cannot."""
    try:
        return [np.asarray(o) for o in artefact.handle.session.run(None, dict(feeds))]
    except Exception as e:  # onnxruntime raises several unrelated types
        raise ModelError(f"the model cannot be run: {e}") from e
