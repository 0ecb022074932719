"""Who is not worth training on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hantc.passes.contest import RUNGS, SAME_COST, Entrant, Rung, outdone

HALF = Rung(0.1, 0.5, 100)


def test_a_clearly_better_and_no_dearer_rival_ends_it() -> None:
    found = outdone([Entrant("r", "a", 1.0, 0.5), Entrant("r", "b", 1.0, 0.2)], HALF)
    assert found == ["b", ""]


@pytest.mark.parametrize(
    "rival",
    [
        Entrant("r", "b", 1.5, 0.01),  # dearer
        Entrant("r", "b", 0.5, 0.3),  # not clearly better
        Entrant("other", "b", 0.5, 0.01),  # another region's
        Entrant("r", "b", 0.5, float("nan")),  # unknown
    ],
    ids=["dearer", "near", "elsewhere", "unknown"],
)
def test_others_do_not(rival: Entrant) -> None:
    assert outdone([Entrant("r", "a", 1.0, 0.5), rival], HALF)[0] == ""


def test_the_best_of_several_rivals_is_named() -> None:
    entrants = [Entrant("r", "a", 1.0, 0.9), Entrant("r", "b", 1.0, 0.3), Entrant("r", "c", 0.9, 0.1)]
    assert outdone(entrants, HALF) == ["c", "c", ""]


def test_the_cheapest_of_a_region_always_stays() -> None:
    entrants = [Entrant("r", str(i), 1.0 + i, 0.5 / (i + 1)) for i in range(5)]
    assert outdone(entrants, RUNGS[0])[0] == ""


def test_of_more_than_have_places_those_with_most_rivals_go() -> None:
    entrants = [Entrant("r", str(i), 1.0, 0.5 + 0.01 * i) for i in range(6)]  # none clearly better
    assert outdone(entrants, HALF) == [""] * 6
    assert outdone(entrants, Rung(0.1, 0.5, 2)) == ["", "", "0", "0", "0", "0"]


def test_what_nothing_outdoes_stays_beyond_the_places() -> None:
    front = [Entrant("r", str(i), 1.0 + i, 0.5 / (i + 1)) for i in range(5)]
    behind = [Entrant("r", "behind", 3.5, 0.49), Entrant("elsewhere", "x", 9.0, 0.9)]
    assert outdone([*front, *behind], Rung(0.1, 0.001, 3)) == [""] * 5 + ["2", ""]


def test_a_chain_of_small_steps_in_cost_does_not_lead_far() -> None:
    """Each a little dearer, by less than measuring can tell, and a little better."""
    chain = [Entrant("r", str(i), 1.019**i, 0.99**i) for i in range(20)]
    assert outdone(chain, Rung(0.6, 0.85, 8)) == [""] * 20


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.floats(0.1, 2), st.floats(0.01, 2)), min_size=1, max_size=12),
    st.integers(1, 6),
)
def test_each_region_keeps_its_front_and_no_more_than_it_must(
    rows: list[tuple[str, float, float]], places: int
) -> None:
    entrants = [Entrant(r, str(i), cost, loss) for i, (r, cost, loss) in enumerate(rows)]
    rivals = outdone(entrants, Rung(0.1, 0.5, places))
    named = {e.candidate: e for e in entrants}
    for region in "ab":
        stay = [e for e, rival in zip(entrants, rivals, strict=True) if e.region == region and not rival]
        mine = [e for e in entrants if e.region == region]
        front = [e for e in mine if not any(r.cost <= SAME_COST * e.cost and r.loss < e.loss for r in mine)]
        assert set(front) <= set(stay)
        ahead = [e for e in mine if not any(r.cost <= e.cost and r.loss < e.loss for r in mine)]
        assert len(stay) <= max(places, len(ahead))  # places are lost to what costs no more at all
    for e, rival in zip(entrants, rivals, strict=True):
        if rival:
            r = named[rival]
            assert r.region == e.region and r.cost <= SAME_COST * e.cost and r.loss < e.loss
