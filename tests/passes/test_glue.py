"""What lies outside the regions, timed apart."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from hantc.core.types import CostRow, MatchResult
from hantc.passes.glue import balance, measure_glue
from hantc.passes.meter import Meter
from tests.passes.conftest import CLASSES
from tests.passes.test_program import chain, cost

if TYPE_CHECKING:
    from hantc.passes.state import State
    from tests.passes.conftest import Lab

ROWS = [cost(r.name, "teacher", "fp32", 2.0 * len(r.atoms)) for r in chain()]  # three atoms: 6 ms


def any_row(state: State) -> CostRow:
    assert state.costs is not None
    return state.costs.rows[0]


def test_whole_and_parts_differ_by_a_factor() -> None:
    glue, scale = balance(chain(), ROWS, teacher_ms=7.0, glue_ms=0.5)
    assert scale == pytest.approx(7.0 / 6.5)
    assert 6 * scale + glue == pytest.approx(7.0)


def test_without_a_glue_of_its_own_it_is_what_is_left() -> None:
    assert balance(chain(), ROWS, teacher_ms=7.0, glue_ms=None) == pytest.approx((1.0, 1.0))
    glue, scale = balance(chain(), ROWS, teacher_ms=5.0, glue_ms=None)
    assert glue == pytest.approx(0.1) and 6 * scale + glue == pytest.approx(5.0)


@pytest.mark.parametrize("teacher_ms", [3.0, 20.0])
def test_a_whole_far_from_its_parts_is_not_scaled_to_them(teacher_ms: float) -> None:
    found = balance(chain(), ROWS, teacher_ms, glue_ms=0.5)
    assert found == balance(chain(), ROWS, teacher_ms, glue_ms=None)


def test_a_network_without_regions_is_all_glue() -> None:
    assert balance((), [], 4.0, None) == (4.0, 1.0)


def test_the_toys_glue_is_its_head(lab: Lab) -> None:
    """Pool, flatten and a 32 → 4 product, on a machine that counts products: two operations each."""
    found = measure_glue(Meter(lab.fresh()), lab.costed, [any_row(lab.costed)])
    assert found is not None
    assert 2 * 32 * CLASSES / 1e6 <= found <= 2 * 32 * CLASSES / 1e6 + 0.01


def test_it_is_measured_once(lab: Lab) -> None:
    ctx = lab.fresh(backend=lab.ort)
    first = Meter(ctx)
    found = measure_glue(first, lab.costed, [any_row(lab.costed)])
    again = Meter(lab.fresh(backend=lab.ort, store=ctx.store))
    assert measure_glue(again, lab.costed, [any_row(lab.costed)]) == found
    assert first.measured == 1 and again.measured == 0


def test_a_gap_between_regions_is_glue_too(lab: Lab) -> None:
    match = lab.costed.match
    assert match is not None
    fewer = MatchResult(tuple(r for r in match.regions if 2 not in r.atoms), (), match.n_atoms)
    meter = Meter(lab.fresh())
    whole, more = (measure_glue(meter, replace(lab.costed, match=m), [any_row(lab.costed)]) for m in (match, fewer))
    assert whole is not None and more is not None
    assert more - whole == pytest.approx(2 * match.region("r02").macs / 1e6, rel=0.1)


def test_regions_that_are_not_one_row_have_none(lab: Lab) -> None:
    """Between the second and the first region nothing leads back."""
    match = lab.costed.match
    assert match is not None
    turned = MatchResult(tuple(reversed(match.regions)), (), match.n_atoms)
    assert measure_glue(Meter(lab.fresh()), replace(lab.costed, match=turned), [any_row(lab.costed)]) is None
