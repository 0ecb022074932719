"""What one candidate alone does to the network's output."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import fx

from hantc.core.types import CandidateSpec, CostRow, CostTable, ScoreRow, Signature
from hantc.ops.registry import build
from hantc.passes import score
from hantc.passes.score import Score
from hantc.passes.state import Context, Proposal, State, WeightMap

if TYPE_CHECKING:
    from tests.passes.conftest import Lab

STACK = CandidateSpec.make("cb_stack", k=3, w=0.5)
Rows = dict[tuple[str, str, str], ScoreRow]


def weights_of(state: State, region: str, spec: CandidateSpec, fill: float | None = None) -> WeightMap:
    """Fresh weights of a candidate, the first tensor filled on request."""
    assert state.match is not None
    torch.manual_seed(0)
    module = build(spec, Signature.of(state.match.region(region)))
    with torch.no_grad():
        if fill is not None:
            next(module.parameters()).fill_(fill)
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def offering(
    state: State, *offers: tuple[str, CandidateSpec, WeightMap], precisions: tuple[str, ...] = ("fp32",)
) -> State:
    """`state` with trained candidates, cheapest in the last of `precisions`."""
    assert state.match is not None
    names = [(r.name, "teacher") for r in state.match.regions] + [(r, s.name) for r, s, _ in offers]
    rows = tuple(
        CostRow(r, c, p, 1.0 / (i + 1), 0.0, 5, "test", "d", 1, 1) for r, c in names for i, p in enumerate(precisions)
    )
    return replace(
        state,
        costs=CostTable(rows, 4.0, 0.0),
        proposals=tuple(Proposal(r, s, 1, 1) for r, s, _ in offers),
        weights={(r, s.name): w for r, s, w in offers},
    )


def scored(state: State, ctx: Context) -> Rows:
    after = Score().call(state, ctx)
    assert after.scores is not None
    rows = {(r.region, r.candidate, r.precision): r for r in after.scores}
    assert len(rows) == len(after.scores)
    return rows


def test_the_teacher_scores_nothing_in_fp32_and_little_in_int8(lab: Lab) -> None:
    assert lab.scored.match is not None and lab.scored.scores is not None
    rows = {(r.region, r.candidate, r.precision): r for r in lab.scored.scores}
    for region in lab.scored.match.regions:
        plain = rows[region.name, "teacher", "fp32"]
        assert (plain.score, plain.accuracy_drop, plain.agreement, plain.mse) == (0.0, 0.0, 1.0, 0.0)
        assert not plain.dropped
        rounded = rows.get((region.name, "teacher", "int8"))
        if len(region.atoms) > 1:
            assert rounded is None, "its parts are scored"
            continue
        assert rounded is not None
        assert 0 < rounded.mse < 0.01, "rounded, but not by much"
        assert abs(rounded.score) < 0.05
        assert rounded.agreement > 0.9
        assert not rounded.dropped


def test_int8_rows_come_with_int8_alone(lab: Lab) -> None:
    rows = scored(offering(lab.matched), lab.context(data=lab.labelled))
    assert {p for _, _, p in rows} == {"fp32"}


def test_better_candidates_score_better(lab: Lab) -> None:
    """Trained weights against fresh ones of the same candidate."""
    offer = ("r03", STACK, weights_of(lab.matched, "r03", STACK))
    fresh = scored(offering(lab.matched, offer, precisions=("fp32", "int8")), lab.fresh())["r03", STACK.name, "int8"]
    trained = next(r for r in lab.scored.scores or () if (r.region, r.candidate) == ("r03", STACK.name))
    assert trained.precision == "int8"
    assert trained.mse < fresh.mse
    assert trained.score < fresh.score


def test_the_cheaper_precision_is_scored(lab: Lab) -> None:
    offer = ("r03", STACK, weights_of(lab.matched, "r03", STACK))
    for precisions in (("fp32", "int8"), ("int8", "fp32")):
        rows = scored(offering(lab.matched, offer, precisions=precisions), lab.fresh())
        assert {p for r, c, p in rows if c == STACK.name} == {precisions[-1]}


def twice(lab: Lab, **costs: float) -> State:
    """One candidate, in two precisions that are both faster than the teacher."""
    offer = ("r03", STACK, weights_of(lab.matched, "r03", STACK))
    state = offering(lab.matched, offer, precisions=("fp32", "int8"))
    assert state.costs is not None
    rows = [replace(r, latency_ms=costs[r.precision]) if r.candidate == STACK.name else r for r in state.costs.rows]
    return replace(state, costs=replace(state.costs, rows=tuple(rows)))


def test_the_dearer_precision_counts_where_it_is_nearer_to_the_teacher(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for candidates that do not survive INT8."""

    def broken(module: fx.GraphModule, quant: object) -> fx.GraphModule:
        made = copy.deepcopy(module)
        for p in made.parameters():
            p.data.zero_()
        return made

    monkeypatch.setattr(score, "fake_quantize", broken)
    rows = scored(twice(lab, fp32=0.5, int8=0.25), lab.fresh())
    assert rows["r03", STACK.name, "fp32"].score < 0.8 * rows["r03", STACK.name, "int8"].score
    slow = scored(twice(lab, fp32=0.95, int8=0.25), lab.fresh())
    assert ("r03", STACK.name, "fp32") not in slow, "no faster than the teacher"


def test_the_dearer_precision_is_left_where_it_adds_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, state = lab.fresh(), twice(lab, fp32=0.5, int8=0.25)
    assert {p for _, c, p in scored(state, ctx) if c == STACK.name} == {"int8"}
    asked: list[tuple[str, str, str]] = []
    real = Score._score

    def spy(self: Score, state: State, ctx: Context, data: Any, entries: Sequence[Any]) -> list[ScoreRow]:
        asked.extend(e.at for e in entries)
        return real(self, state, ctx, data, entries)

    monkeypatch.setattr(Score, "_score", spy)
    assert {p for _, c, p in scored(state, ctx) if c == STACK.name} == {"int8"}
    assert not asked, "it is known"


def test_what_is_exact_needs_no_score_in_floats(lab: Lab) -> None:
    spec = CandidateSpec.make("exact", form="merged")
    assert lab.matched.match is not None
    row = scored(offering(lab.matched, ("r03", spec, {}), precisions=("fp32",)), lab.fresh())["r03", spec.name, "fp32"]
    assert (row.score, row.mse, row.agreement, row.accuracy_drop) == (0.0, 0.0, 1.0, 0.0)


def test_without_labels_the_score_is_the_distance_from_the_teacher(lab: Lab) -> None:
    offer = ("r03", STACK, weights_of(lab.matched, "r03", STACK))
    state = offering(lab.matched, offer, precisions=("fp32", "int8"))
    blind, sighted = scored(state, lab.fresh(data=lab.plain)), scored(state, lab.fresh())
    assert set(blind) == set(sighted)
    for key, row in blind.items():
        assert row.score >= -1e-6, "a divergence is never negative"
        assert row.accuracy_drop is None
        assert sighted[key].accuracy_drop is not None
        assert row.agreement == sighted[key].agreement
        assert row.mse == pytest.approx(sighted[key].mse)
    bad = ("r03", STACK.name, "int8")
    assert sighted[bad].score == blind[bad].score > 0, "labels do not count: the teacher may know them by heart"
    # the labels are the teacher's own answers
    assert sighted[bad].accuracy_drop == pytest.approx(100 * (1 - sighted[bad].agreement))


def test_a_useless_candidate_is_dropped_with_its_loss(lab: Lab) -> None:
    zero = {k: torch.zeros_like(v) for k, v in weights_of(lab.matched, "r01", STACK).items()}
    row = scored(offering(lab.matched, ("r01", STACK, zero)), lab.context(data=lab.plain))["r01", STACK.name, "fp32"]
    assert "alone it costs" in row.dropped
    assert f"{100 * (1 - row.agreement):.1f} points" in row.dropped
    assert math.isfinite(row.score)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_candidate_that_gives_no_numbers_is_dropped_and_harms_no_other(
    lab: Lab, precision: str, value: float
) -> None:
    sick = ("r03", STACK, weights_of(lab.matched, "r03", STACK, value))
    well = ("r01", STACK, weights_of(lab.matched, "r01", STACK))
    precisions = ("fp32",) if precision == "fp32" else ("fp32", "int8")
    state, ctx = offering(lab.matched, sick, well, precisions=precisions), lab.fresh(precisions=precisions)
    rows = scored(state, ctx)
    row = rows["r03", STACK.name, precision]
    assert row.dropped == "non-finite score"
    assert all(math.isfinite(v) for r in rows.values() for v in (r.score, r.stderr, r.mse))
    assert not rows["r01", STACK.name, precision].dropped.startswith("non-finite")
    assert scored(state, lab.fresh(precisions=precisions, store=ctx.store)) == rows


def test_scores_are_stored_and_reused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    offer = ("r03", STACK, weights_of(lab.matched, "r03", STACK))
    state, ctx = offering(lab.matched, offer, precisions=("fp32", "int8")), lab.fresh()
    first = scored(state, ctx)

    def never(*_: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(Score, "_score", never)
    assert scored(state, lab.fresh(store=ctx.store)) == first


def test_what_has_no_price_is_not_scored(lab: Lab) -> None:
    state = offering(lab.matched, ("r03", STACK, weights_of(lab.matched, "r03", STACK)))
    assert state.costs is not None
    unpriced = replace(state.costs, rows=tuple(r for r in state.costs.rows if r.candidate == "teacher"))
    rows = scored(replace(state, costs=unpriced), lab.fresh())
    assert {c for _, c, _ in rows} == {"teacher"}


def test_rows_come_in_the_regions_order(lab: Lab) -> None:
    assert lab.scored.match is not None and lab.scored.scores is not None
    order = {r.name: i for i, r in enumerate(lab.scored.match.regions)}
    n = len(order)
    assert [r.region for r in lab.scored.scores[:n]] == list(order)
    positions = [order[r.region] for r in lab.scored.scores[n:]]
    assert positions == sorted(positions)


def test_without_data_only_the_teacher_is_scored(lab: Lab) -> None:
    assert lab.matched.match is not None
    rows = scored(offering(lab.matched), lab.context())
    assert list(rows) == [(r.name, "teacher", "fp32") for r in lab.matched.match.regions]
    assert {r.score for r in rows.values()} == {0.0}
