"""Training candidates against the teacher: it learns, it is kept, and one that diverges harms no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import fx

from hantc.core.config import Budget
from hantc.core.types import CandidateSpec, CostRow, CostTable, Signature
from hantc.dialect.graph import with_taps
from hantc.ops import registry
from hantc.passes import distill, training
from hantc.passes.distill import Distill, wanted_ms, weights_key
from hantc.passes.engine import relative_mse
from hantc.passes.plug import origin_of, trained
from hantc.passes.state import Clock, Context, Proposal, State
from hantc.passes.training import Job, train
from tests.passes.conftest import Recorder, warnings

if TYPE_CHECKING:
    from tests.passes.conftest import Lab

STACK = CandidateSpec.make("cb_stack", k=3, w=0.5)
BOTTLE = CandidateSpec.make("cb_bottle", k=3, w=0.5)
IDENTITY = CandidateSpec.make("identity")


def offering(state: State, *offers: tuple[str, CandidateSpec]) -> State:
    """`state` with these proposals alone: each at half the latency and half the size of the one before."""
    assert state.match is not None

    def row(region: str, candidate: str, ms: float) -> CostRow:
        return CostRow(region, candidate, "fp32", ms, 0.0, 5, "test", "d", 1, 1)

    rows = [row(r.name, "teacher", 1.0) for r in state.match.regions] + [
        row(r, s.name, 0.5**i) for i, (r, s) in enumerate(offers, 1)
    ]
    proposals = tuple(Proposal(r, s, 1024 >> i, 10) for i, (r, s) in enumerate(offers))
    return replace(state, proposals=proposals, costs=CostTable(tuple(rows), 4.0, 0.0))


def done(state: State, ctx: Context) -> tuple[State, Mapping[tuple[str, str], Any]]:
    after = Distill().call(state, ctx)
    assert after.weights is not None
    return after, after.weights


def error(lab: Lab, state: State, region_name: str, spec: CandidateSpec) -> float:
    """Relative error of a trained candidate on the search split's activations."""
    assert state.network is not None and state.match is not None and state.weights is not None
    region = state.match.region(region_name)
    x, _ = lab.labelled.search.batch(list(range(64)))
    candidate = trained(region, spec, state.weights[region_name, spec.name])
    with torch.no_grad():
        _, (source, target) = with_taps(state.network, [region.input, region.output])(x)
        return float(relative_mse(candidate(source), target))


OFFERS = (("r03", STACK), ("r03", BOTTLE), ("r03", IDENTITY))


def test_more_training_makes_better_candidates(lab: Lab) -> None:
    long = lab.scored
    short, _ = done(lab.costed, lab.fresh(effort={"distill_epochs": 1}))
    assert long.weights is not None and short.weights is not None
    assert set(long.weights) == set(short.weights)
    regions = [r for r, c in long.weights if c == STACK.name]
    assert len(regions) == 4
    for region in regions:
        before, after = error(lab, short, region, STACK), error(lab, long, region, STACK)
        assert after < 0.9 * before, region
        assert after < 0.9, "better than the mean of what it shall produce"


def test_what_has_no_weights_is_not_trained(lab: Lab) -> None:
    ctx = lab.fresh()
    _, weights = done(offering(lab.matched, ("r03", IDENTITY)), ctx)
    assert weights == {("r03", "identity"): {}}
    assert ctx.store.ls("weights") == []


def test_the_teacher_is_not_touched(lab: Lab) -> None:
    state = offering(lab.matched, ("r03", STACK))
    assert state.network is not None
    before = {k: v.clone() for k, v in state.network.state_dict().items()}
    done(state, lab.fresh(effort={"distill_epochs": 1}))
    assert all(torch.equal(v, before[k]) for k, v in state.network.state_dict().items())
    assert not any(p.grad is not None for p in state.network.parameters())


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(distill, "train", never)


def test_trained_weights_are_stored_and_reused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = lab.fresh(effort={"distill_epochs": 1})
    state = offering(lab.matched, *OFFERS)
    _, first = done(state, ctx)
    assert isinstance(ctx.reporter, Recorder)
    spent = ctx.reporter.last("steps")
    assert spent["steps"] > 0 and 0 < spent["teacher_seconds"] < spent["seconds"]
    for p in (p for p in state.proposals or () if p.spec != IDENTITY):
        stored = ctx.store.get_tensors("weights", weights_key(state, ctx, p))
        assert stored is not None
        want = first[p.region, p.spec.name]
        assert set(stored) == set(want)
        assert all(torch.equal(torch.from_numpy(v), want[k]) for k, v in stored.items())
    forbid(monkeypatch)
    again = lab.fresh(effort={"distill_epochs": 1}, store=ctx.store)
    _, second = done(state, again)
    assert set(second) == set(first)
    assert all(torch.equal(v, second[k][n]) for k, part in first.items() for n, v in part.items())


def test_a_second_run_trains_only_what_is_new(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = lab.fresh(effort={"distill_epochs": 1})
    done(offering(lab.matched, ("r01", STACK)), ctx)
    asked: list[tuple[str, str]] = []
    real = train

    def spy(network: fx.GraphModule, jobs: Sequence[Job], *rest: Any) -> None:
        asked.extend((j.region.name, j.spec.name) for j in jobs)
        real(network, jobs, *rest)

    monkeypatch.setattr(distill, "train", spy)
    done(offering(lab.matched, ("r01", STACK), ("r03", STACK)), ctx)
    assert asked == [("r03", STACK.name)]


def test_what_a_longer_run_trained_serves_a_shorter_one(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the other way: who gives more time gets what it buys, and keeps it."""
    state = offering(lab.matched, ("r03", STACK))
    long, short = ({"distill_epochs": 1, "time_limit_s": s} for s in (600.0, 7.0))
    ctx = lab.fresh(effort=short)
    done(state, ctx)
    asked: list[str] = []
    real = train

    def spy(network: fx.GraphModule, jobs: Sequence[Job], *rest: Any) -> None:
        asked.extend(j.spec.name for j in jobs)
        real(network, jobs, *rest)

    monkeypatch.setattr(distill, "train", spy)
    done(state, lab.fresh(effort=long, store=ctx.store))
    assert asked == [STACK.name]
    forbid(monkeypatch)
    for effort in (short, long):
        done(state, lab.fresh(effort=effort, store=ctx.store))


def test_a_verdict_of_a_shorter_run_does_not_bind_a_longer_one(lab: Lab) -> None:
    state = offering(lab.matched, ("r03", STACK), ("r01", STACK))
    for limit, n in (("7.0", 2), ("600.0", 1)):
        ctx = lab.fresh(effort={"distill_epochs": 1})
        key = weights_key(state, ctx, Proposal("r03", STACK, 1, 1))
        ctx.store.put_json("verdict", key, {"dead": "its training diverged", "limit": limit})
        assert len(done(state, ctx)[1]) == n


def test_keys_tell_apart_what_training_depends_on(lab: Lab) -> None:
    state, plain = lab.matched, lab.fresh(data=lab.plain)
    ctx = lab.fresh()
    keys = [
        weights_key(state, ctx, Proposal("r01", STACK, 1, 1)),
        weights_key(state, ctx, Proposal("r03", STACK, 1, 1)),
        weights_key(state, ctx, Proposal("r01", BOTTLE, 1, 1)),
        weights_key(state, plain, Proposal("r01", STACK, 1, 1)),
        weights_key(state, lab.fresh(seed=1), Proposal("r01", STACK, 1, 1)),
        weights_key(replace(state, model_hash="other"), ctx, Proposal("r01", STACK, 1, 1)),
    ]
    assert len(set(keys)) == len(keys)
    assert weights_key(state, lab.fresh(), Proposal("r01", STACK, 5, 5)) == keys[0]


def test_the_same_seed_gives_the_same_weights(lab: Lab) -> None:
    state = offering(lab.matched, ("r03", BOTTLE))
    (_, a), (_, b) = (done(state, lab.fresh(effort={"distill_epochs": 1})) for _ in range(2))
    assert all(torch.equal(v, b["r03", BOTTLE.name][k]) for k, v in a["r03", BOTTLE.name].items())


def test_a_candidate_that_diverges_is_dropped_with_a_note(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.build

    def poisoned(spec: CandidateSpec, signature: Signature, **options: Any) -> fx.GraphModule:
        module = real(spec, signature, **options)
        if spec == BOTTLE:
            with torch.no_grad():
                next(module.parameters()).fill_(float("inf"))
        return module

    monkeypatch.setattr(distill, "build", poisoned)
    ctx = lab.fresh(effort={"distill_epochs": 2})
    state, weights = done(offering(lab.matched, ("r03", BOTTLE), ("r03", STACK)), ctx)
    assert set(weights) == {("r03", STACK.name)}
    assert all(torch.isfinite(v).all() for v in weights["r03", STACK.name].values())
    assert len(ctx.notes) == 1
    assert "r03" in ctx.notes[0]
    assert BOTTLE.name in ctx.notes[0]
    assert "non-finite" in ctx.notes[0]
    assert state.costs is not None
    assert [(r, c) for r, c, _, reason in state.costs.skipped if "diverged" in reason] == [("r03", BOTTLE.name)]
    assert len(ctx.store.ls("weights")) == 1, "what diverged is not kept"


SLIM = CandidateSpec.make("slim", keep=0.5)


def test_derived_candidates_start_near_the_teacher_and_get_nearer(lab: Lab) -> None:
    untrained, _ = done(offering(lab.matched, ("r03", SLIM)), lab.fresh(effort={"distill_epochs": 1}))
    trained_, _ = done(offering(lab.matched, ("r03", SLIM)), lab.fresh(effort={"distill_epochs": 24}))
    before, after = (derived_error(lab, state, "r03", SLIM) for state in (untrained, trained_))
    assert after < before < 0.5


def derived_error(lab: Lab, state: State, region_name: str, spec: CandidateSpec) -> float:
    assert state.network is not None and state.match is not None and state.weights is not None
    region = state.match.region(region_name)
    x, _ = lab.labelled.search.batch(list(range(64)))
    origin = origin_of(state.network, state.match, region)
    candidate = trained(region, spec, state.weights[region_name, spec.name], origin=origin)
    with torch.no_grad():
        _, (source, target) = with_taps(state.network, [region.input, region.output])(x)
        return float(relative_mse(candidate(source), target))


def test_what_a_rival_outdoes_is_left_untrained_and_so_is_it_the_next_time(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "outdone", lambda entrants, clearly: [
        "slim_keep0.5" if e.candidate == STACK.name else "" for e in entrants
    ])  # fmt: skip
    ctx = lab.fresh(effort={"distill_epochs": 2})
    state = offering(lab.matched, ("r03", STACK), ("r03", SLIM))
    after, weights = done(state, ctx)
    assert set(weights) == {("r03", SLIM.name)}
    assert after.costs is not None
    assert [(c, "slim_keep0.5 costs no more" in why) for _, c, _, why in after.costs.skipped] == [(STACK.name, True)]
    forbid(monkeypatch)
    again, second = done(state, lab.fresh(effort={"distill_epochs": 2}, store=ctx.store))
    assert set(second) == set(weights)
    assert again.costs is not None and again.costs.skipped == after.costs.skipped


def test_what_was_outdone_is_trained_where_its_rival_is_missing(lab: Lab) -> None:
    ctx = lab.fresh(effort={"distill_epochs": 1})
    state = offering(lab.matched, ("r03", STACK))
    key = weights_key(state, ctx, (state.proposals or ())[0])
    ctx.store.put_json("verdict", key, {"rival": "slim_keep0.5", "limit": "1e9"})
    _, weights = done(state, ctx)
    assert set(weights) == {("r03", STACK.name)}


def offers(*sizes: tuple[str, int]) -> list[distill.Keyed]:
    return [(Proposal(r, CandidateSpec.make("f", m=i), 1, n), f"{r}{i}") for i, (r, n) in enumerate(sizes)]


def test_what_does_not_fit_into_memory_is_trained_in_parts_of_whole_regions() -> None:
    todo = offers(("a", 10), ("b", 20), ("a", 30), ("c", 10))

    def cut(room: int) -> list[list[str]]:
        return [[key for _, key in part] for part in distill.parts(todo, room)]

    each = 1 << 19
    assert cut(1 << 40) == [["a0", "a2", "b1", "c3"]]
    assert cut(2 * each + 16 * 40) == [["a0", "a2"], ["b1", "c3"]]
    assert cut(2 * each + 16 * 40 - 1) == [["a0", "a2"], ["b1", "c3"]], "one region is never torn apart"
    assert cut(each) == [["a0", "a2"], ["b1"], ["c3"]]
    assert distill.parts([], 1 << 30) == []


def test_parts_end_as_what_is_trained_together(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate of every part is stored, and the time is shared among them."""
    shares: list[tuple[float, float]] = []
    real = train

    def spy(*rest: Any) -> None:
        shares.append(rest[-1])
        real(*rest)

    state = offering(lab.matched, ("r01", STACK), ("r01", BOTTLE), ("r02", STACK), ("r03", STACK))
    _, together = done(state, lab.fresh(effort={"distill_epochs": 1}))
    monkeypatch.setattr(distill, "train", spy)
    ctx = lab.fresh(effort={"distill_epochs": 1})
    ctx = replace(ctx, config=ctx.config.model_copy(update={"memory": 1 << 10}))
    _, apart = done(state, ctx)
    assert shares == [(1 / 2, 1 / 2), (1 / 4, 1 / 2), (1 / 4, 1.0)]
    assert set(apart) == set(together)
    for at, weights in together.items():
        assert all(torch.allclose(v, apart[at][k], atol=1e-4) for k, v in weights.items() if v.is_floating_point())
    key = weights_key(state, ctx, (state.proposals or ())[2])  # as if it had been killed in the second part
    for path in ctx.store.root.rglob(f"*{key}*"):
        path.unlink()
    shares.clear()
    again, _ = done(state, replace(ctx, clock=Clock(600.0)))
    assert shares == [(1 / 4, 1.0)], "no more time than the undisturbed run gave it"
    assert again.weights is not None and set(again.weights) == set(together)


def test_a_whole_pool_and_a_sample_do_not_share_what_was_trained(lab: Lab) -> None:
    ctx = lab.fresh()
    state = offering(lab.matched, ("r01", STACK))
    offer = (state.proposals or ())[0]
    whole = replace(ctx, config=ctx.config.model_copy(update={"pool": "whole"}))
    assert weights_key(state, ctx, offer) != weights_key(state, whole, offer)


def test_too_short_a_training_is_told(lab: Lab) -> None:
    ctx = lab.fresh(effort={"distill_epochs": 24, "distill_share": 1e-6})
    done(offering(lab.matched, ("r01", STACK)), ctx)
    assert any("steps only" in text for text in warnings(ctx))
    ctx = lab.fresh(effort={"distill_epochs": 1})
    done(offering(lab.matched, ("r01", STACK)), ctx)
    assert not warnings(ctx)


def test_without_data_nothing_is_trained(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch)
    state = Distill().call(offering(lab.matched), lab.context())
    assert state.weights == {}


def test_labels_are_not_needed(lab: Lab) -> None:
    _, weights = done(offering(lab.matched, ("r03", STACK)), lab.fresh(data=lab.plain, effort={"distill_epochs": 1}))
    assert set(weights) == {("r03", STACK.name)}


def test_the_wanted_latency() -> None:
    table = CostTable((), teacher_ms=8.0, glue_ms=0.0)

    class _Ctx:
        def __init__(self, budget: Budget | None, limited: bool) -> None:
            self.config = type("C", (), {"budget": budget, "limited": limited})()

    def wanted(budget: Budget | None, table: CostTable = table, *, limited: bool = False) -> float:
        ctx: Any = _Ctx(budget, limited)
        return wanted_ms(table, ctx)

    assert (wanted(None, limited=True), wanted(Budget(fraction=0.25), limited=True)) == (8.0, 2.0)

    assert (wanted(None), wanted(Budget(fraction=0.25)), wanted(Budget(ms=3.0))) == (4.0, 2.0, 3.0)
    slow = replace(table, pace=1.5)  # the teacher took 12 ms on the wall
    assert (wanted(Budget(fraction=0.25), slow), wanted(Budget(ms=3.0), slow)) == (2.0, 2.0)


def test_deriving_ends_where_training_would_have_no_time(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """All regions by turns; what needs no deriving is always there."""
    slims = [CandidateSpec.make("slim", keep=k) for k in (0.5, 0.25)]
    offers = [("r01", s) for s in slims] + [("r02", s) for s in slims] + [("r02", STACK)]
    state, ctx = offering(lab.matched, *offers), lab.fresh(effort={"distill_epochs": 1})
    clock = iter(range(100))
    monkeypatch.setattr(distill, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    assert state.network is not None and ctx.data is not None
    keyed = [(p, weights_key(state, ctx, p)) for p in state.proposals or ()]
    jobs, still, late = Distill._jobs(state, ctx, ctx.data, keyed, 2.0)
    assert [(j.region.name, j.spec.name) for j in jobs] == [
        ("r01", "slim_keep0.5"),
        ("r02", "slim_keep0.5"),
        ("r02", STACK.name),
    ]
    assert not still
    assert [(p.region, p.spec.name) for p in late] == [("r01", "slim_keep0.25"), ("r02", "slim_keep0.25")]


def test_what_was_not_derived_is_told(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "seconds_for", lambda *_: -1.0)
    ctx = lab.fresh(effort={"distill_epochs": 1})
    after, weights = done(offering(lab.matched, ("r01", SLIM), ("r01", STACK)), ctx)
    assert set(weights) == {("r01", STACK.name)}
    assert ("r01", SLIM.name, "*", "no time was left to derive it") in after.costs.skipped if after.costs else False
    assert any("1 candidates were not derived" in n for n in ctx.notes)
