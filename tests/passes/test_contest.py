"""Who is not worth training on."""

from __future__ import annotations

import pytest

from hantc.passes.contest import RUNGS, Entrant, outdone


def test_a_clearly_better_and_no_dearer_rival_ends_it() -> None:
    found = outdone([Entrant("r", "a", 1.0, 0.5), Entrant("r", "b", 1.0, 0.2)], 0.5)
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
    assert outdone([Entrant("r", "a", 1.0, 0.5), rival], 0.5)[0] == ""


def test_the_best_of_several_rivals_is_named() -> None:
    entrants = [Entrant("r", "a", 1.0, 0.9), Entrant("r", "b", 1.0, 0.3), Entrant("r", "c", 0.9, 0.1)]
    assert outdone(entrants, 0.5) == ["c", "c", ""]


def test_the_cheapest_of_a_region_always_stays() -> None:
    entrants = [Entrant("r", str(i), 1.0 + i, 0.5 / (i + 1)) for i in range(5)]
    assert outdone(entrants, RUNGS[0][1])[0] == ""
