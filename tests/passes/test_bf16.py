"""Targets that compute floats in BF16: what the table holds, what budgets are shares of, what is compared."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from onnx import ModelProto

from hantc.backends.roofline.backend import RooflineBackend
from hantc.core.backend_api import Artefact, BuildSpec, Capabilities
from hantc.core.config import Budget
from hantc.core.errors import UsageError
from hantc.core.lut import read_lut, write_lut
from hantc.core.types import Plan
from hantc.dialect.floats import floats_of
from hantc.passes.ceilings import measure_ceilings
from hantc.passes.cost import Cost
from hantc.passes.distill import Distill, wanted_ms
from hantc.passes.emit import Emit
from hantc.passes.meter import Meter
from hantc.passes.select import Select
from hantc.passes.verify import Verify
from tests.passes.conftest import COUNTING

if TYPE_CHECKING:
    from pathlib import Path

    from hantc.passes.state import Context, State
    from tests.passes.conftest import Lab

FAST = 4.0  # times FP32


class Halved(RooflineBackend):
    """Counts, and takes marked files to be so much faster."""

    def __init__(self) -> None:
        super().__init__(COUNTING)
        self.quick = RooflineBackend(replace(COUNTING, peak_fp32=FAST * COUNTING.peak_fp32))

    def capabilities(self) -> Capabilities:
        """Pretends to measure."""
        here = super().capabilities()
        return replace(here, measures=True, precisions=(*here.precisions, "bf16"))

    def build(self, model: ModelProto, spec: BuildSpec) -> Artefact:
        """By the mark."""
        return self.quick.build(model, spec) if floats_of(model) == "bf16" else super().build(model, spec)


def bf16(lab: Lab, **options: object) -> Context:
    return lab.context(backend=Halved(), data=lab.labelled, precisions=("bf16", "int8"), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def costed(lab: Lab) -> State:
    return Cost().call(replace(lab.costed, costs=None), bf16(lab))


def test_the_table_is_in_bf16_and_knows_the_teacher_in_fp32(lab: Lab, costed: State) -> None:
    table = costed.costs
    assert table is not None and table.fp32_ms is not None and lab.costed.costs is not None
    assert {r.precision for r in table.rows} == {"bf16", "int8"}
    assert table.fp32_ms == pytest.approx(lab.costed.costs.teacher_ms, rel=0.01)
    assert table.teacher_ms == pytest.approx(table.fp32_ms / FAST, rel=0.05)
    plain, half = lab.costed.costs.by_key(), table.by_key()
    for region in ("r01", "r02", "r03"):
        want = plain[region, "teacher", "fp32"].latency_ms / FAST
        assert half[region, "teacher", "bf16"].latency_ms == pytest.approx(want, rel=0.05)


def test_budgets_are_shares_of_the_teacher_in_fp32(lab: Lab, costed: State) -> None:
    assert costed.costs is not None and costed.costs.fp32_ms is not None
    asked = wanted_ms(costed.costs, bf16(lab, budget=Budget.parse("0.2")))
    assert asked == pytest.approx(0.2 * costed.costs.fp32_ms)
    unasked = wanted_ms(costed.costs, bf16(lab))
    assert unasked == pytest.approx(0.5 * costed.costs.teacher_ms), "half of what it takes anyway"


def test_a_budget_that_the_teacher_meets_trains_nothing(lab: Lab, costed: State) -> None:
    ctx = bf16(lab, budget=Budget.parse("0.4"))
    state = Distill().call(costed, ctx)
    assert state.weights == {}
    assert [n for n in ctx.notes if "the teacher as it is takes" in n and "no candidate was trained" in n]
    bounded = bf16(lab, budget=Budget.parse("0.4"), max_drop=1.0)
    assert Distill().call(costed, bounded).weights


def test_figures_of_other_floats_are_not_mixed(lab: Lab, costed: State) -> None:
    ctx = bf16(lab)
    other = replace(ctx, precisions=("fp32", "int8"))
    assert Meter(ctx).key(border=(1,)) != Meter(other).key(border=(1,))


def test_the_student_is_marked_and_compared_with_both_teachers(lab: Lab, costed: State) -> None:
    ctx, state = bf16(lab), lab.rewritten()
    assert state.plan is not None and costed.costs is not None
    choices = tuple(replace(c, precision="bf16" if c.precision == "fp32" else c.precision) for c in state.plan.choices)
    state = replace(state, costs=costed.costs, plan=Plan(choices, 1.0, 1.0, 0.0))
    state = Emit().call(state, ctx)
    assert state.emitted is not None and floats_of(state.emitted) == "bf16"
    done = Verify().call(state, ctx)
    s: Any = done.summary
    assert s["teacher"]["latency_ms"] == pytest.approx(FAST * s["baseline_bf16"]["latency_ms"], rel=0.05)
    assert s["speedup"] == pytest.approx(s["teacher"]["latency_ms"] / s["student"]["latency_ms"])
    assert s["speedup"] > FAST and s["baseline_int8"]["latency_ms"] > 0
    assert s["baseline_bf16"]["accuracy"] == s["teacher"]["accuracy"]
    assert set(s["teacher_by_backend"]) == {"roofline", "roofline bf16"}
    assert not [n for n in ctx.notes if "compiles for it" in n], "it is what was compiled for"


def test_in_fp32_a_teacher_that_is_faster_in_bf16_is_named(lab: Lab) -> None:
    ctx = lab.context(backend=Halved(), data=lab.labelled, precisions=("fp32", "int8"))
    Verify().call(Emit().call(replace(lab.rewritten(), costs=lab.costed.costs), ctx), ctx)
    (note,) = [n for n in ctx.notes if "compiles for it" in n]
    assert "roofline in BF16 runs the teacher" in note and "--target xeon-bf16" in note


def test_without_data_the_teacher_itself_is_marked(lab: Lab, costed: State) -> None:
    ctx = lab.context(backend=Halved(), precisions=("bf16",))
    assert costed.costs is not None
    state = replace(
        lab.matched, costs=Cost().call(replace(lab.costed, costs=None), ctx).costs, proposals=(), weights={}, scores=()
    )
    state = Select().call(state, ctx)
    assert state.plan is not None and {c.precision for c in state.plan.choices} == {"bf16"}


def test_the_peak_is_that_of_bf16(lab: Lab) -> None:
    peaks = dict(measure_ceilings(Halved(), 1).peaks)
    assert peaks["bf16"] == pytest.approx(FAST * peaks["fp32"], rel=0.05)


def test_a_table_of_other_floats_is_refused(lab: Lab, costed: State, tmp_path: Path) -> None:
    assert costed.costs is not None
    path, ctx = tmp_path / "t.json", bf16(lab, lut=tmp_path / "t.json")
    write_lut(path, replace(costed.costs, fp32_ms=None), ctx.capabilities.device)
    assert Cost().call(replace(costed, costs=None), ctx).costs is not None
    with pytest.raises(UsageError, match="is of bf16, int8, and fp32 is asked for"):
        Cost().call(replace(costed, costs=None), replace(ctx, precisions=("fp32", "int8")))


def test_a_table_keeps_the_fp32_teacher(costed: State, tmp_path: Path) -> None:
    assert costed.costs is not None
    path = tmp_path / "t.json"
    write_lut(path, costed.costs, Halved().capabilities().device)
    assert read_lut(path).table.fp32_ms == costed.costs.fp32_ms
    write_lut(path, replace(costed.costs, fp32_ms=0.0), Halved().capabilities().device)
    with pytest.raises(UsageError, match="fp32_ms"):
        read_lut(path)
