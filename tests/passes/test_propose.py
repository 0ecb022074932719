"""Which candidates are worth measuring."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from hantc.core.types import CandidateSpec, MatchResult, Region
from hantc.ops.registry import DERIVED
from hantc.passes.propose import Propose, spec_of, spread
from hantc.passes.state import Proposal, State

if TYPE_CHECKING:
    from tests.passes.conftest import Lab


def proposal(macs: int, family: str = "f") -> Proposal:
    return Proposal("r00", CandidateSpec.make(family, m=macs), macs, 0)


def with_regions(state: State, *regions: Region) -> State:
    return replace(state, match=MatchResult(regions, (), len(regions)))


def test_without_data_there_are_no_candidates_and_a_reason(lab: Lab) -> None:
    state = Propose().call(lab.matched, lab.context())
    assert state.proposals == ()
    assert state.match is not None
    every = [(r, reason) for r, c, reason in state.skipped if c == "*"]
    assert [r for r, _ in every] == [r.name for r in state.match.regions]
    assert all("--data" in reason for _, reason in every)
    looked_at = {c.partition("_form")[0] for _, c, _ in state.skipped}
    assert looked_at == {"*", "teacher_s2d", "exact"}, "exact rewrites are looked at, and none fits"


def test_no_candidate_has_far_more_products_than_the_teacher(lab: Lab) -> None:
    state = Propose().call(lab.matched, lab.context(data=lab.labelled, effort={"measured_per_region": 10_000}))
    assert state.proposals
    assert state.match is not None
    for p in state.proposals:
        assert p.macs <= 1.5 * state.match.region(p.region).macs
    slow = [reason for _, _, reason in state.skipped if "cannot be faster" in reason]
    assert slow
    assert all(float(reason.split("×")[0]) >= 1.5 for reason in slow)


def test_a_tiny_region_has_only_what_multiplies_nothing(lab: Lab) -> None:
    assert lab.matched.match is not None
    tiny = replace(lab.matched.match.region("r01"), macs=1)
    state = Propose().call(with_regions(lab.matched, tiny), lab.context(data=lab.labelled))
    from_scratch = [p for p in state.proposals or () if p.spec.family not in DERIVED]
    assert [p.spec.name for p in from_scratch] == ["identity"]


def test_every_grid_point_is_either_proposed_or_explained(lab: Lab) -> None:
    state = Propose().call(lab.matched, lab.context(data=lab.labelled))
    assert state.match is not None
    proposed = [(p.region, p.spec.name) for p in state.proposals or ()]
    skipped = [(r, c) for r, c, reason in state.skipped if reason]
    assert len(skipped) == len(state.skipped)
    assert len(set(proposed + skipped)) == len(proposed) + len(skipped)
    counts = Counter(r for r, _ in proposed + skipped)
    assert set(counts) == {r.name for r in state.match.regions}
    assert len(set(counts.values())) == 1, "every region goes through the same grids"


def test_derived_candidates_are_proposed_where_they_fit(lab: Lab) -> None:
    state = Propose().call(lab.matched, lab.context(data=lab.labelled))
    found = {(p.region, p.spec.family): p for p in state.proposals or () if p.spec.family in DERIVED}
    assert {r for r, f in found if f == "slim"} == {"r01", "r02", "r03"}
    assert state.match is not None
    assert {r for r, f in found if f == "merged"} == {r.name for r in state.match.regions if len(r.atoms) > 1}
    for (region, _), p in found.items():
        assert 0 < p.macs < state.match.region(region).macs


def test_blocks_that_are_alike_are_looked_at_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lab.matched.match is not None
    first = lab.matched.match.region("r01")
    twin = replace(first, name="r77")
    looked: list[str] = []
    derived = Propose._derived

    def watch(region: Region, *args: Any, **kwargs: Any) -> Any:
        looked.append(region.name)
        return derived(region, *args, **kwargs)

    monkeypatch.setattr(Propose, "_derived", staticmethod(watch))
    state = Propose().call(with_regions(lab.matched, first, twin), lab.context(data=lab.labelled))
    assert looked == ["r01"]
    made, other = ([replace(p, region="") for p in state.proposals or () if p.region == r] for r in ("r01", "r77"))
    assert made == other != []
    reasons, others = ([(c, why) for n, c, why in state.skipped if n == r] for r in ("r01", "r77"))
    assert reasons == others != []


def test_the_effort_limits_what_is_measured_and_all_families_get_a_share(lab: Lab) -> None:
    def from_scratch(limit: int) -> tuple[dict[str, Counter[str]], State]:
        state = Propose().call(lab.matched, lab.context(data=lab.labelled, effort={"measured_per_region": limit}))
        by_region: dict[str, Counter[str]] = {}
        for p in state.proposals or ():
            if p.spec.family not in DERIVED:  # those are few, so that all of them are measured
                by_region.setdefault(p.region, Counter())[p.spec.family] += 1
        return by_region, state

    everything, _ = from_scratch(10_000)
    some, state = from_scratch(20)
    assert set(some["r01"]) == set(everything["r01"]) >= {"identity", "cb_stack", "cb_bottle", "efn", "repvgg"}
    assert {sum(c.values()) for c in some.values()} == {20}
    assert some["r01"]["identity"] == 1
    most = max(some["r01"].values())
    assert all(n >= min(most - 1, everything["r01"][f]) for f, n in some["r01"].items()), "equal shares"
    assert any("--effort" in reason for _, _, reason in state.skipped)


def test_a_whole_pool_leaves_out_nothing_of_single_regions_that_could_be_faster(lab: Lab) -> None:
    ctx = lab.context(data=lab.labelled, effort={"measured_per_region": 20})
    whole = Propose().call(lab.matched, replace(ctx, config=ctx.config.model_copy(update={"pool": "whole"})))
    spans = {p.region for p in whole.proposals or () if "_" in p.region}
    sampled_out = {r for r, _, reason in whole.skipped if "not in the sample" in reason}
    assert spans and sampled_out and sampled_out <= spans
    sample = Propose().call(lab.matched, ctx)
    advised = {r for r, _, reason in sample.skipped if "--pool whole" in reason}
    assert advised and not advised & spans
    more = Counter(p.region for p in whole.proposals or ())
    less = Counter(p.region for p in sample.proposals or ())
    assert all(more[r] == n for r, n in less.items() if r in spans)
    assert all(more[r] > 2 * n for r, n in less.items() if r not in spans)


def test_spans_do_not_get_the_identity(lab: Lab) -> None:
    state = Propose().call(lab.matched, lab.context(data=lab.labelled))
    assert state.match is not None
    with_identity = {p.region for p in state.proposals or () if p.spec.family == "identity"}
    assert with_identity == {r.name for r in state.match.regions if len(r.atoms) == 1}
    reasons = {reason for r, c, reason in state.skipped if c == "identity" and "_" in r}
    assert len(reasons) == 1
    assert "each block" in reasons.pop()


def test_feature_vectors_have_no_candidates(lab: Lab) -> None:
    assert lab.matched.match is not None
    flat = replace(lab.matched.match.region("r01"), in_shape=(16,), out_shape=(16,))
    state = Propose().call(with_regions(lab.matched, flat), lab.context(data=lab.labelled))
    assert state.proposals == ()
    for _, candidate, reason in state.skipped:
        assert ("(T, C)" if candidate.startswith("mixer") else "feature vector") in reason


def test_token_sequences_have_mixers_and_the_identity(lab: Lab) -> None:
    assert lab.matched.match is not None
    tokens = replace(lab.matched.match.region("r01"), in_shape=(17, 32), out_shape=(17, 32), final_act="")
    state = Propose().call(with_regions(lab.matched, tokens), lab.context(data=lab.labelled))
    from_scratch = {p.spec.family for p in state.proposals or () if p.spec.family not in DERIVED}
    assert from_scratch == {"identity", "mixer"}


def test_shares_are_equal_and_what_small_families_leave_goes_to_the_others() -> None:
    def families(**sizes: int) -> dict[str, list[Proposal]]:
        return {name: [proposal(i, name) for i in range(n)] for name, n in sizes.items()}

    assert Propose._shares(families(a=1, b=10, c=10), 7) == {"a": 1, "b": 3, "c": 3}
    assert Propose._shares(families(a=2, b=3), 100) == {"a": 2, "b": 3}
    assert Propose._shares(families(a=2, b=3), 1) == {"a": 1, "b": 0}
    assert Propose._shares({}, 5) == {}


@pytest.mark.parametrize(
    ("n", "steps"), [(1, [4]), (2, [2, 6]), (3, [1, 4, 7]), (5, [1, 2, 4, 6, 7]), (9, list(range(9)))]
)
def test_a_sample_is_spread_evenly_in_the_logarithm(n: int, steps: list[int]) -> None:
    everything = [proposal(10 * 2**i) for i in range(9)]
    assert [p.macs for p in spread(everything, n)] == [10 * 2**i for i in steps]


def test_a_sample_of_all_or_of_none() -> None:
    assert [p.macs for p in spread([proposal(3), proposal(1)], 5)] == [1, 3]
    assert spread([proposal(3), proposal(1)], 0) == []
    same = [proposal(4, f) for f in "abcd"]
    assert len(spread(same, 3)) == 3


def test_specs_are_found_by_name() -> None:
    assert spec_of("f_m7", [proposal(3), proposal(7)]) == CandidateSpec.make("f", m=7)
    with pytest.raises(KeyError):
        spec_of("f_m8", [proposal(3)])
