"""What everything costs, on the real engine and on one that counts."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import fx

from hantc.backends.roofline.backend import RooflineBackend
from hantc.core.backend_api import Capabilities
from hantc.core.errors import HantcError, UnsupportedError
from hantc.core.types import CandidateSpec, Fetching
from hantc.dialect import emitter
from hantc.ops.registry import build
from hantc.passes import cost
from hantc.passes.ceilings import ceilings_of
from hantc.passes.cost import Cost
from hantc.passes.fetching import Balance
from hantc.passes.meter import Meter, Work
from hantc.passes.propose import Propose
from tests.passes.conftest import COUNTING

if TYPE_CHECKING:
    from tests.passes.conftest import Lab


def test_real_figures_are_measured_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = lab.fresh(backend=lab.ort)
    state = replace(lab.costed, costs=None)
    first = Cost().call(state, ctx).costs
    assert first is not None
    assert len(first.by_key()) == len(first.rows)
    assert all(0 < r.latency_ms < math.inf and not r.predicted for r in first.rows)
    assert {r.precision for r in first.rows} == {"fp32", "int8"}
    assert first.teacher_ms > 0
    assert first.glue_ms > 0
    assert {s for s, _ in first.transitions} == {(3, 12, 12), (16, 12, 12), (32, 6, 6)}
    assert all(ms >= 0 for _, ms in first.transitions)

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    built: list[str] = []

    def watch(spec: CandidateSpec, *args: Any, **kwargs: Any) -> fx.GraphModule:
        built.append(spec.family)
        return build(spec, *args, **kwargs)

    monkeypatch.setattr(type(lab.ort), "measure", never)
    monkeypatch.setattr(cost, "quantize_for_timing", never)
    monkeypatch.setattr(cost, "build", watch)
    assert Cost().call(state, lab.fresh(backend=lab.ort, store=ctx.store)).costs == first
    assert not built, "the whole table was at hand"

    assert state.proposals is not None
    fewer = replace(state, proposals=state.proposals[1:])
    rest = Cost().call(fewer, lab.fresh(backend=lab.ort, store=ctx.store)).costs
    left = {(p.region, p.spec.name) for p in state.proposals[:1]}
    assert rest is not None
    assert rest.rows == tuple(r for r in first.rows if (r.region, r.candidate) not in left)
    assert set(built) == {"identity"}, "which has no figure in INT8"


def test_a_teacher_trained_anew_takes_the_time_that_it_took(lab: Lab) -> None:
    """And so do blocks that are alike: a file's time hangs on what it computes, not on its weights."""
    ctx = lab.fresh()
    state = replace(lab.costed, costs=None)
    first = Cost().call(state, ctx).costs
    measured = ctx.reporter.last("cost")["measured"]  # type: ignore[attr-defined]
    other = copy.deepcopy(state.network)
    assert other is not None and first is not None and measured > 0
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    again = lab.fresh(store=ctx.store)
    found = Cost().call(replace(state, network=other), again).costs
    assert found is not None and found.rows == first.rows
    assert again.reporter.last("cost")["measured"] == 0  # type: ignore[attr-defined]


def test_parts_that_are_alike_are_timed_once(lab: Lab) -> None:
    """A region of the network, and the same of another one with other weights."""
    state, ctx = lab.matched, lab.fresh()
    assert state.match is not None
    other = copy.deepcopy(state.network)
    assert other is not None
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-0.5)
    meter, region = Meter(ctx), state.match.region("r02")
    work = Cost()._teacher(state, ctx, meter, region)
    twin = Cost()._teacher(replace(state, network=other), ctx, meter, replace(region, name="twin"))
    elsewhere = Cost()._teacher(state, ctx, meter, state.match.region("r01"))
    assert [w.key for w in twin] == [w.key for w in work] != [w.key for w in elsewhere]
    rows = meter.rows([*work, *twin])
    assert meter.measured == len(work) == len(ctx.precisions)
    assert [r.latency_ms for r in rows[: len(work)]] == [r.latency_ms for r in rows[len(work) :]]


def test_a_table_at_hand_says_what_the_first_said(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise HantcError("not to be rounded")

    monkeypatch.setattr(cost, "quantize_for_timing", refuse)
    ctx, state = lab.fresh(backend=lab.ort), replace(lab.costed, costs=None, proposals=())
    first = Cost().call(state, ctx).costs
    again = lab.fresh(backend=lab.ort, store=ctx.store)
    assert Cost().call(state, again).costs == first
    assert again.notes == ctx.notes
    assert any("stays in FP32: not to be rounded" in n for n in again.notes)


@pytest.mark.parametrize("broken", [[], {"table": 1, "notes": []}, {"table": {"rows": []}, "notes": []}, {}])
def test_a_broken_table_is_made_again(lab: Lab, monkeypatch: pytest.MonkeyPatch, broken: object) -> None:
    ctx, state = lab.fresh(backend=lab.ort), replace(lab.costed, costs=None, proposals=())
    first = Cost().call(state, ctx).costs
    (entry,) = ctx.store.ls("table")
    ctx.store.put_json("table", entry.key, broken)
    assert Cost().call(state, lab.fresh(backend=lab.ort, store=ctx.store)).costs == first


def test_what_could_not_be_timed_is_tried_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, state = lab.fresh(backend=lab.ort), replace(lab.costed, costs=None)
    assert state.proposals is not None
    state = replace(state, proposals=tuple(p for p in state.proposals if p.spec.family != "identity")[:1])
    real = Meter._group

    def refuse(meter: Meter, group: Sequence[Work]) -> dict[str, dict[str, object]]:
        own = [w for w in group if w.row.candidate in ("teacher", "glue")]
        lost: dict[str, object] = {"latency_ms": 1e9, "iqr_ms": 0.0, "samples": 0}
        return {**{w.key: lost for w in group if w not in own}, **(real(meter, own) if own else {})}

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "_group", refuse)
        first = Cost().call(state, ctx).costs
    assert first is not None and {r.samples > 0 for r in first.rows} == {True, False}
    assert not ctx.store.ls("table")
    second = Cost().call(state, lab.fresh(backend=lab.ort, store=ctx.store)).costs
    assert second is not None and all(r.samples > 0 for r in second.rows)
    assert len(ctx.store.ls("table")) == 1


def test_counted_figures_follow_the_products(lab: Lab) -> None:
    assert lab.costed.costs is not None and lab.costed.match is not None
    rows = lab.costed.costs.by_key()
    for (region, candidate, precision), row in rows.items():
        assert row.predicted
        if candidate != "identity" and precision == "int8":
            plain = rows[region, candidate, "fp32"]
            assert row.latency_ms == pytest.approx(plain.latency_ms / 4, rel=0.15)
            assert (row.macs, row.params) == (plain.macs, plain.params)
        if precision == "fp32":
            # 10⁹ operations a second, two of them a product; activations and sums come on top
            assert 2 * row.macs / 1e6 <= row.latency_ms <= 2 * row.macs / 1e6 * 1.1 + 0.01
    assert {k for k in rows if k[1] == "identity"} == {(r, "identity", "fp32") for r in ("r01", "r03")}


def test_the_table_has_what_weights_cost(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "balance", lambda *_: Balance(0.1, 1.2, Fetching(0.001, 0.2)))
    table = Cost().call(replace(lab.costed, costs=None), lab.fresh()).costs
    assert table is not None
    assert (table.glue_ms, table.scale, table.fetching) == (0.1, 1.2, Fetching(0.001, 0.2))
    assert table.pinned is False
    pinned = Cost().call(replace(lab.costed, costs=None), replace(lab.fresh(), cores=(0,))).costs
    assert pinned is not None and pinned.pinned


def test_regions_and_glue_make_up_the_network(lab: Lab) -> None:
    table, match = lab.costed.costs, lab.costed.match
    assert table is not None and match is not None
    rows = table.by_key()
    atoms = sum(rows[r.name, "teacher", "fp32"].latency_ms for r in match.regions if len(r.atoms) == 1)
    assert table.scale * atoms + table.glue_ms == pytest.approx(table.teacher_ms)
    assert 0 < table.glue_ms < 0.1 * table.teacher_ms
    for span in (r for r in match.regions if len(r.atoms) > 1):
        parts = sum(rows[f"r{a:02d}", "teacher", "fp32"].latency_ms for a in span.atoms)
        assert rows[span.name, "teacher", "fp32"].latency_ms == pytest.approx(parts, rel=0.02)


def test_one_precision_needs_no_borders(lab: Lab) -> None:
    table = Cost().call(replace(lab.costed, costs=None, proposals=()), lab.context()).costs
    assert table is not None
    assert table.transitions == ()
    assert {(r.candidate, r.precision) for r in table.rows} == {("teacher", "fp32")}


class Pretender(RooflineBackend):
    """Takes its counts for measurements."""

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), measures=True)


def test_of_a_whole_pool_only_what_the_ceilings_allow_is_measured(lab: Lab) -> None:
    ctx = lab.fresh(backend=Pretender(COUNTING), pool="whole")
    state = Propose().call(lab.matched, ctx)
    assert state.match is not None and state.proposals is not None
    table = Cost().call(state, ctx).costs
    assert table is not None and table.skipped
    own = {r.name: r.macs for r in state.match.regions}
    macs = {(p.region, p.spec.name): p.macs for p in state.proposals}
    for region, candidate, precision, reason in table.skipped:
        assert precision == "*" and "at the machine's peak" in reason
        assert macs[region, candidate] > 1.05 * own[region], "the teacher reaches the peak here, but for its borders"
        assert not [r for r in table.rows if (r.region, r.candidate) == (region, candidate)]
    # a machine that counts products has no candidate that is faster with clearly more of them
    measured = {(r.region, r.candidate) for r in table.rows if r.candidate != "teacher"}
    assert all(macs[key] < 1.6 * own[key[0]] for key in measured)
    assert measured | {(r, c) for r, c, _, _ in table.skipped} == set(macs)


def test_a_sample_asks_for_no_ceilings(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("asked for")

    monkeypatch.setattr("hantc.passes.cost.ceilings_of", never)
    ctx = lab.fresh(backend=Pretender(COUNTING))
    assert Cost().call(Propose().call(lab.matched, ctx), ctx).costs is not None


def test_ceilings_are_measured_once(lab: Lab) -> None:
    ctx = lab.fresh(backend=Pretender(COUNTING))
    first = ceilings_of(ctx)
    assert first is not None and dict(first.peaks)["fp32"] == pytest.approx(1e9, rel=0.05)
    other = lab.fresh(backend=lab.counting, store=ctx.store)
    assert ceilings_of(other) is None, "it predicts"
    blind = Pretender(COUNTING)
    blind.measure = None  # type: ignore[assignment,method-assign]
    assert ceilings_of(lab.fresh(backend=blind, store=ctx.store)) == first


def test_what_cannot_be_written_in_an_opset_with_int8_stays_in_floats(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = emitter.emit

    def refuse(module: fx.GraphModule, *, opset: int | None = None) -> Any:
        if opset is not None:
            raise UnsupportedError("Softmax of opset 11 cannot be written in opset 13")
        return real(module)

    monkeypatch.setattr(cost, "emit", refuse)
    ctx, state = lab.fresh(), replace(lab.costed, costs=None, proposals=())
    table = Cost().call(state, ctx).costs
    assert table is not None and {r.precision for r in table.rows} == {"fp32"} and not table.transitions
    assert any("nothing is quantised: Softmax" in note for note in ctx.notes)
