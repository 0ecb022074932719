"""Which measured candidates are worth training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from hantc.core.types import CandidateSpec, CostRow, CostTable, Fetching, Region
from hantc.passes.shortlist import shortlist
from hantc.passes.state import Proposal

Skipped = dict[str, str]


def region(name: str, *atoms: int) -> Region:
    return Region(name, "residual", "a", "b", (), (8, 4, 4), (8, 4, 4), 100, 10, atoms)


REGIONS = {r.name: r for r in (region("r0", 0), region("r1", 1), region("r0_r1", 0, 1))}


def choose(
    options: Mapping[str, tuple[float, ...]],
    *,
    where: str = "r0",
    places: tuple[int, int] = (2, 1),
    budget: float = 0.5,
    teacher: tuple[float, ...] = (1.0,),
    whole: bool = False,
    fetching: Fetching | None = None,
    params: Mapping[str, int] | None = None,
) -> tuple[list[str], Skipped]:
    """`options`: candidate → latency in FP32 (and INT8); a candidate called "c40" has 40 MACs, "identity" none.
    Returns the names of the kept ones and the reasons of the others."""

    def rows(name: str, times: tuple[float, ...]) -> list[CostRow]:
        pairs = zip(("fp32", "int8"), times, strict=False)
        size = (params or {}).get(name, 0)
        return [CostRow(where, name, p, t, 0.0, 5, "test", "d", 1, 1, params=size) for p, t in pairs]

    specs = {name: CandidateSpec("identity" if name == "identity" else name) for name in options}
    proposals = [Proposal(where, s, 0 if n == "identity" else int(n[1:]), 0) for n, s in specs.items()]
    table = CostTable(tuple(r for n, t in {"teacher": teacher, **options}.items() for r in rows(n, t)), 1.0, 0.0)
    table = replace(table, fetching=fetching or Fetching())
    kept, skipped = shortlist(proposals, table, REGIONS, places, budget, whole=whole)
    assert all(p.region == where for p in kept)
    assert {(r, p) for r, _, p, _ in skipped} <= {(where, "*")}
    names = [p.spec.name for p in kept]
    assert sorted(names + [c for _, c, _, _ in skipped]) == sorted(options), "each is kept once or explained once"
    return names, {c: reason for _, c, _, reason in skipped}


def test_what_is_lighter_than_the_teacher_saves_what_its_weights_take_to_fetch() -> None:
    """The teacher's 4 MB cost 0.08 ms where the caches do not hold them, and those of what is no faster a quarter."""
    options, params = {"c40": (0.98,), "c30": (0.98,)}, {"teacher": 1_000_000, "c40": 250_000, "c30": 1_000_000}
    names, skipped = choose(options, params=params)
    assert names == [] and set(skipped) == {"c40", "c30"}
    names, skipped = choose(options, params=params, fetching=Fetching(1.0, 0.02, 2.0))
    assert names == ["c40"] and set(skipped) == {"c30"}, "0.98 + 0.04 is below 0.92 of 1 + 0.16, 0.98 + 0.16 is not"


def test_what_is_not_clearly_faster_than_the_teacher_is_left_out() -> None:
    kept, why = choose({"c10": (0.5,), "c20": (1.0,), "c30": (0.99,), "c40": (2.0,)})
    assert kept == ["c10"]
    assert all(reason.startswith("not faster") for reason in why.values())
    assert "2.000 ms" in why["c40"]
    assert "1.000 ms" in why["c40"]


def test_the_best_precisions_are_compared() -> None:
    # the teacher's own INT8 form is what a candidate must beat, in either of its own precisions
    kept, why = choose({"c10": (0.5, 0.3), "c20": (0.6, 0.45), "c30": (0.5,)}, teacher=(1.0, 0.4))
    assert kept == ["c10"]
    assert set(why) == {"c20", "c30"}


def test_what_was_never_measured_is_left_out() -> None:
    kept, why = choose({"c10": (), "c20": (0.5,)})
    assert kept == ["c20"]
    assert "inf ms" in why["c10"]


def test_the_most_capable_under_each_ceiling_is_kept() -> None:
    options = {"c90": (0.9,), "c50": (0.55,), "c45": (0.5,), "c20": (0.3,), "c15": (0.1,)}
    kept, why = choose(options)
    assert kept == ["c50", "c20"], "under 1.2 of the budget, and under 0.6 of that"
    assert "capacity" in why["c45"]
    assert choose(options, places=(1, 1))[0] == ["c50"]
    assert choose(options, places=(1, 1), budget=0.3)[0] == ["c20"]


def test_of_a_whole_pool_all_that_are_faster_are_kept_but_not_of_spans() -> None:
    options = {"c90": (0.95,), "c50": (0.55,), "c45": (0.5,), "c20": (0.3,), "c15": (0.1,)}
    kept, why = choose(options, whole=True)
    assert kept == ["c50", "c45", "c20", "c15"]
    assert list(why) == ["c90"] and why["c90"].startswith("not faster")
    assert choose(options, whole=True, where="r0_r1")[0] == choose(options, where="r0_r1")[0] == ["c50"]


def test_capacity_counts_before_latency_and_latency_breaks_ties() -> None:
    assert choose({"c50": (0.5,), "c60": (0.55,)}, places=(1, 1))[0] == ["c60"]
    kept, _ = choose({"c50": (0.5, 0.45), "c51": (0.5, 0.5)}, places=(1, 1))
    assert kept == ["c51"]


def test_one_candidate_may_serve_several_ceilings() -> None:
    assert choose({"c20": (0.1,), "c10": (0.05,)}, places=(3, 1))[0] == ["c20"]


def test_where_none_is_under_the_ceiling_the_cheapest_is_kept() -> None:
    kept, _ = choose({"c50": (0.8,), "c40": (0.7,)}, budget=0.1)
    assert kept == ["c40"]


def test_spans_have_places_of_their_own() -> None:
    options = {"c50": (0.5,), "c20": (0.2,)}
    assert choose(options, where="r0_r1", places=(2, 1))[0] == ["c50"]
    assert choose(options, where="r0_r1", places=(1, 2))[0] == ["c50", "c20"]


def test_the_identity_needs_no_place_but_must_be_faster_too() -> None:
    kept, _ = choose({"identity": (0.01,), "c50": (0.5,), "c20": (0.2,)})
    assert set(kept) == {"identity", "c50", "c20"}
    kept, why = choose({"identity": (0.95,)})
    assert kept == []
    assert "not faster" in why["identity"]


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5, 0.8, 1.0])
def test_a_larger_budget_never_asks_for_less_capacity(budget: float) -> None:
    options = {f"c{10 * i}": (i / 12,) for i in range(1, 11)}
    most = max(int(n[1:]) for n in choose(options, budget=budget)[0])
    assert most >= max(int(n[1:]) for n in choose(options, budget=budget / 2)[0])


def test_nothing_proposed_nothing_kept() -> None:
    assert choose({}) == ([], {})


def test_derived_candidates_have_places_of_their_own() -> None:
    """Under ceilings 0.6, 0.36 and 0.216 of the teacher (budget 0.5): two for those from scratch without derived
    ones beside them, else one; three for derived ones."""
    slim = [CandidateSpec.make("slim", keep=k) for k in (0.9, 0.7, 0.5, 0.3)]
    proposals = [Proposal("r0", s, 90 - 20 * i, 0) for i, s in enumerate(slim)]
    times = {s.name: ms for s, ms in zip(slim, (0.59, 0.35, 0.34, 0.2), strict=True)}
    scratch = [Proposal("r0", CandidateSpec(f"c{m}"), m, 0) for m in (50, 30)]
    times |= {"c50": 0.5, "c30": 0.3, "teacher": 1.0}
    table = CostTable(tuple(CostRow("r0", n, "fp32", t, 0.0, 5, "test", "d", 1, 1) for n, t in times.items()), 1.0, 0.0)
    kept, _ = shortlist([*proposals, *scratch], table, REGIONS, (2, 1), 0.5)
    assert [p.spec.name for p in kept] == ["slim_keep0.9", "slim_keep0.7", "slim_keep0.3", "c50"]
    kept, _ = shortlist(scratch, table, REGIONS, (2, 1), 0.5)
    assert [p.spec.name for p in kept] == ["c50", "c30"]
