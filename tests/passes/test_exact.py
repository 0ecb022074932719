"""Candidates that compute what their region does: never trained, taken without data, dropped if nothing is won."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from hantc.backends.predicted import run as run_predicted
from hantc.backends.roofline.backend import RooflineBackend
from hantc.core.backend_api import Artefact, BuildSpec
from hantc.core.types import CandidateSpec, Fetching, Protocol, Signature, Timing
from hantc.dialect.conv import Conv
from hantc.dialect.emitter import emit
from hantc.dialect.graph import trace
from hantc.dialect.rearrange import SpaceToDepth
from hantc.ops.registry import build
from hantc.passes.cost import Cost
from hantc.passes.distill import Distill
from hantc.passes.plug import origin_of
from hantc.passes.select import Select
from hantc.passes.state import Context, State
from hantc.pipeline import COMPILE, run_passes
from tests.passes.conftest import CLASSES, COUNTING, SIZE, STACK, Lab, ToyNet, offer

if TYPE_CHECKING:
    from pathlib import Path

SPEC = CandidateSpec("teacher_s2d")


class Fond(RooflineBackend):
    """Finds space-to-depth fast; in whole networks (those with a head) as fast as `whole` says."""

    def __init__(self, whole: float) -> None:
        super().__init__(COUNTING)
        self.whole = whole

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        found = []
        for artefact, timing in zip(artefacts, super().measure(artefacts, protocol), strict=True):
            ops = {n.op_type for n in artefact.handle.model.graph.node}
            factor = 1.0 if "SpaceToDepth" not in ops else self.whole if "Gemm" in ops else 0.25
            found.append(replace(timing, median_ms=factor * timing.median_ms))
        return found


@pytest.fixture
def strided(tmp_path: Path) -> Lab:
    """The toy network with a stem that halves the resolution."""
    lab = Lab(tmp_path)
    torch.manual_seed(1)
    net = ToyNet().eval()
    net.stem = Conv(3, 16, 3, 2)
    lab.model = emit(trace(net, (3, SIZE, SIZE), (CLASSES,))).model
    return lab


def road(lab: Lab, whole: float) -> tuple[State, Context]:
    """The whole pipeline, without data."""
    ctx = lab.context(backend=Fond(whole))
    return run_passes(COMPILE, lab.begin(), ctx)[0], ctx


def test_without_data_the_faster_form_is_taken(strided: Lab) -> None:
    state, _ = road(strided, whole=0.5)
    assert state.plan is not None and state.emitted is not None and state.summary is not None
    assert {c.candidate for c in state.plan.choices if c.region == "r00"} == {"teacher_s2d"}
    assert {c.candidate for c in state.plan.choices if c.region != "r00"} == {"teacher"}
    assert state.costs is not None and state.plan.predicted_latency_ms < state.costs.teacher_ms
    assert "SpaceToDepth" in {n.op_type for n in state.emitted.graph.node}
    difference = state.summary["max_relative_difference"]
    assert isinstance(difference, float) and difference < 1e-5


def test_the_weights_of_an_exact_form_count(strided: Lab) -> None:
    """It has 4 MB where the teacher has none, of which the caches hold 1; where they cost more than it gains, the
    teacher stays."""
    state, ctx = road(strided, whole=0.5)
    assert state.costs is not None
    rows = tuple(replace(r, params=1_000_000 * (r.candidate == "teacher_s2d")) for r in state.costs.rows)
    held, fetched, costly = (
        Select._exact(replace(state, costs=replace(state.costs, rows=rows, fetching=f)), ctx)
        for f in (Fetching(), Fetching(1.0, 0.001), Fetching(1.0, 0.1))
    )
    assert fetched.predicted_latency_ms == pytest.approx(held.predicted_latency_ms + 0.003)
    assert "teacher_s2d" in {c.candidate for c in fetched.choices}
    assert {c.candidate for c in costly.choices} == {"teacher"}


def test_what_gained_nothing_as_a_whole_leaves_no_trace(strided: Lab) -> None:
    state, ctx = road(strided, whole=3.0)
    assert state.plan is not None and state.emitted is not None and state.student is not None
    assert {c.candidate for c in state.plan.choices} == {"teacher"}
    assert state.emitted is state.model
    assert not any(isinstance(m, SpaceToDepth) for m in state.student.modules())
    assert any("gained nothing" in note for note in ctx.notes)


def test_a_stride_of_one_has_no_such_form(lab: Lab) -> None:
    state, _ = road(lab, whole=0.5)
    assert state.proposals == () and state.plan is not None
    assert {c.candidate for c in state.plan.choices} == {"teacher"}
    assert any(region == "r00" and "no stride" in reason for region, name, reason in state.skipped if name == SPEC.name)


def test_training_leaves_it_as_it_is(strided: Lab) -> None:
    state, data = strided.matched, strided.plain
    assert state.match is not None and state.network is not None
    region = state.match.region("r00")
    origin = origin_of(state.network, state.match, region)
    exact = build(SPEC, Signature.of(region), origin=origin)
    proposals = (replace(offer(region, STACK), spec=SPEC), offer(state.match.region("r01"), STACK))
    ctx = strided.context(backend=Fond(0.5), data=data, effort={"distill_epochs": 2})
    after = Distill().call(Cost().call(replace(state, proposals=proposals), ctx), ctx)
    assert after.weights is not None
    found = after.weights["r00", SPEC.name]
    assert found.keys() == exact.state_dict().keys()
    assert all(torch.equal(found[k], v) for k, v in exact.state_dict().items())
    assert ("r01", STACK.name) in after.weights, "or nothing was trained"


def test_the_file_runs_as_the_teacher_does(strided: Lab) -> None:
    state, ctx = road(strided, whole=0.5)
    assert state.emitted is not None
    feeds = {state.emitted.graph.input[0].name: np.random.default_rng(0).random((4, 3, SIZE, SIZE), dtype=np.float32)}
    made, own = (run_predicted(ctx.backend.build(m, BuildSpec()), feeds)[0] for m in (state.emitted, state.model))
    np.testing.assert_allclose(made, own, rtol=0, atol=1e-5 * float(np.abs(own).max()))
