"""INT8 ranges, and whether biases are corrected, chosen by what files lose."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from onnx import ModelProto

from hantc.core.errors import HantcError
from hantc.dialect.emitter import emit
from hantc.dialect.examples import example_inputs
from hantc.passes.assemble import Blueprint, calibration_feeds, to_onnx
from hantc.passes.calibrate import RANGES, WAYS, FileModule, Way, best_calibration, choose
from hantc.passes.emit import Emit
from hantc.passes.engine import Judge, output_kind

if TYPE_CHECKING:
    from hantc.passes.state import Context, State
    from tests.passes.conftest import Lab, Recorder

ROBUST, MINMAX, PERCENTILE, ENTROPY = RANGES
CORRECTED = replace(ROBUST, correct_biases=True)


def test_there_are_corrected_biases_for_all_ranges() -> None:
    assert len(set(WAYS)) == len({str(way) for way in WAYS}) == 2 * len(RANGES)


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ((1.0, 1.0, 1.0, 1.0), ROBUST),
        ((1.0, 0.99, 2.0, 3.0), ROBUST),  # not clearly better
        ((1.0, 0.9, 2.0, 0.8), ENTROPY),
        ((1.0, math.nan, 0.5, 0.8), PERCENTILE),
        ((math.nan, 7.0, 6.0, 8.0), PERCENTILE),
        ((math.nan, math.nan, math.nan, math.nan), ROBUST),
    ],
)
def test_the_nearest_wins_if_clearly_better(found: tuple[float, ...], best: Way) -> None:
    assert choose(dict(zip(RANGES, found, strict=True))) == best


def test_a_file_computes_what_its_network_does(lab: Lab) -> None:
    ctx = lab.fresh(backend=lab.ort)
    network = lab.scored.network
    assert network is not None
    x = lab.labelled.val.batch(list(range(7)))[0]
    with torch.no_grad():
        want = network(x)
    info = network.meta["info"]
    assert torch.allclose(FileModule(ctx, emit(network).model, info.inputs[0])(x), want, atol=1e-4)


def test_batches_of_a_fixed_size_are_filled_up(lab: Lab) -> None:
    ctx = lab.fresh(backend=lab.ort)
    network = lab.scored.network
    assert network is not None
    model = emit(network).model
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    spec = network.meta["info"].inputs[0]
    x = lab.labelled.val.batch(list(range(7)))[0]
    got = FileModule(ctx, model, replace(spec, shape=(3, *spec.shape[1:])))(x)
    with torch.no_grad():
        assert torch.allclose(got, network(x), atol=1e-4)


def judged(state: State, ctx: Context, model: ModelProto) -> float:
    """How far a file is from the teacher on the search split."""
    assert state.network is not None and ctx.data is not None
    info = state.network.meta["info"]
    kind = output_kind(state.network, example_inputs(info, 2)[0], ctx.data.num_classes)
    judge = Judge(state.network, ctx.data.search, kind, limit=ctx.effort.score_images, blend=True)
    return judge(FileModule(ctx, model, info.inputs[0]))["kl"]


def made(state: State, ctx: Context, way: Way) -> ModelProto:
    """The student's file, quantised in one way."""
    assert state.student is not None and state.plan is not None and ctx.data is not None
    feeds = calibration_feeds(state.student, ctx.data, 256, 32)
    blueprint = Blueprint.of(state.plan.choices)
    return to_onnx(state.student, blueprint, ctx, feeds, way.ranges, correct_biases=way.correct_biases)


def test_the_emitted_file_is_the_best_of_all_ways(lab: Lab) -> None:
    ctx, state = lab.fresh(backend=lab.ort), lab.rewritten()
    emitted = Emit().call(state, ctx).emitted
    assert emitted is not None and state.student is not None and state.plan is not None and ctx.data is not None
    tried = [*RANGES, CORRECTED]
    losses = {way: judged(state, ctx, made(state, ctx, way)) for way in tried}
    nearest = replace(min(RANGES, key=lambda way: losses[way]), correct_biases=True)
    losses[nearest] = judged(state, ctx, made(state, ctx, nearest))
    reporter: Recorder = ctx.reporter  # type: ignore[assignment]
    event = reporter.last("calibration")
    found = event["divergence"]
    assert {k: found[k] for k in map(str, tried)} == pytest.approx({str(way): losses[way] for way in tried})
    assert found == pytest.approx({str(way): losses[way] for way in losses if str(way) in found})
    assert event["chosen"] == str(choose({way: losses[way] for way in losses if str(way) in found}))
    assert judged(state, ctx, emitted) == pytest.approx(found[event["chosen"]])
    assert bool(ctx.notes) == (event["chosen"] != "robust")


def test_ways_that_fail_are_left_out_but_not_the_first(lab: Lab) -> None:
    ctx, state = lab.fresh(backend=lab.ort), lab.scored
    assert state.network is not None and ctx.data is not None
    model = emit(state.network).model
    tried = []

    def make(way: Way) -> ModelProto:
        tried.append(way)
        if way == failing:
            raise HantcError("no ranges")
        return model

    failing = MINMAX
    assert best_calibration(state, ctx, ctx.data, make) is model
    assert tried == [ROBUST, CORRECTED, MINMAX, PERCENTILE, ENTROPY]  # none is nearer than the first
    failing = ROBUST
    with pytest.raises(HantcError, match="no ranges"):
        best_calibration(state, ctx, ctx.data, make)


def test_a_run_without_time_takes_the_first(lab: Lab) -> None:
    ctx, state = lab.fresh(backend=lab.ort), lab.scored
    assert state.network is not None and ctx.data is not None
    ctx.clock.limit_s = 0.0
    tried: list[Way] = []
    model = emit(state.network).model

    def make(way: Way) -> ModelProto:
        tried.append(way)
        return model

    best_calibration(state, ctx, ctx.data, make)
    assert tried == [ROBUST]
    best_calibration(state, ctx, ctx.data, make)  # the same run again: as it was
    assert tried == [ROBUST, ROBUST]
    ctx.clock.limit_s = 1e6  # a longer one may try more
    best_calibration(state, ctx, ctx.data, make)
    assert tried == [ROBUST, ROBUST, ROBUST, CORRECTED, *RANGES[1:]]


def test_a_choice_is_made_once(lab: Lab) -> None:
    ctx, state = lab.fresh(backend=lab.ort), lab.rewritten()
    first = Emit().call(state, ctx).emitted
    later = lab.fresh(backend=lab.ort, store=ctx.store)
    again = Emit().call(state, later).emitted
    assert first is not None and again is not None
    assert first.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)
    assert later.notes == ctx.notes, "what is told is told again"
    reporter: Recorder = later.reporter  # type: ignore[assignment]
    assert not [e for e in reporter.events if e[0] == "calibration"]


def test_values_are_what_the_engine_gives(lab: Lab) -> None:
    ctx = lab.fresh(backend=lab.ort)
    network = lab.scored.network
    assert network is not None
    found = FileModule(ctx, emit(network).model, network.meta["info"].inputs[0])(torch.zeros(2, 3, 12, 12))
    assert found.shape == (2, 4) and np.isfinite(found.numpy()).all()
