"""Emit: student -> one ONNX model, INT8 regions as QDQ, in FP16 where that is the target's precision."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from onnx import ModelProto

from hantc.passes.assemble import Blueprint, calibration_feeds, deployable, to_onnx
from hantc.passes.calibrate import WAYS, Way, best_calibration
from hantc.passes.state import Context, State

_IMAGES = 256
_UNFUSED = (
    "model.onnx has INT8 parts with scales in FP16, of which ONNX Runtime's own INT8 forms lose small biases: there, "
    'set the session option "session.disable_quant_qdq" to "1"; engines are not concerned'
)


class Emit:
    """Student -> one ONNX model; INT8 regions become QDQ with ranges (and, where it helps, biases) from the
    train split, in the way that suits the student best on the search split."""

    name: ClassVar[str] = "emit"
    requires: ClassVar[tuple[str, ...]] = ("student", "plan")
    ensures: ClassVar[tuple[str, ...]] = ("emitted",)

    def call(self, state: State, ctx: Context) -> State:
        """Write the graph; the file itself is put in place by the pipeline, once verified."""
        assert state.student is not None and state.plan is not None
        blueprint = Blueprint.of(state.plan.choices)
        needed = bool(blueprint.int8) or ctx.base == "fp16"
        feeds = calibration_feeds(state.student, ctx.data, _IMAGES, 32) if ctx.data and needed else []
        student = state.student

        def make(way: Way) -> ModelProto:
            return to_onnx(student, blueprint, ctx, feeds, way.ranges, correct_biases=way.correct_biases)

        model = best_calibration(state, ctx, ctx.data, make) if ctx.data and blueprint.int8 else make(WAYS[0])
        if blueprint.int8 and ctx.base == "fp16":
            ctx.note(_UNFUSED)
        return replace(state, emitted=deployable(model, ctx, feeds))
