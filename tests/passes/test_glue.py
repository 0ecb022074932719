"""What lies outside the regions, timed apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from hantc.core.types import Correction, CostRow, CostTable, Fetching, MatchResult
from hantc.passes.glue import glue_shares, inner_glue, line_of, measure_glue, weights_in
from hantc.passes.meter import Meter, Work
from hantc.passes.program import make_problem, teachers_footprint
from hantc.search.problem import evaluate
from tests.passes.conftest import CLASSES
from tests.passes.test_program import chain, cost, score, state_of

if TYPE_CHECKING:
    from hantc.passes.state import State
    from tests.passes.conftest import Lab

ROWS = [cost(r.name, "teacher", "fp32", 2.0 * len(r.atoms)) for r in chain()]  # three atoms: 6 ms


def any_row(state: State) -> CostRow:
    assert state.costs is not None
    return state.costs.rows[0]


def test_the_toys_glue_is_its_head(lab: Lab) -> None:
    """Pool, flatten and a 32 → 4 product, on a machine that counts products: two operations each."""
    found = measure_glue(Meter(lab.fresh()), lab.costed, [any_row(lab.costed)])
    assert found is not None
    assert 2 * 32 * CLASSES / 1e6 <= found.ms <= 2 * 32 * CLASSES / 1e6 + 0.01
    assert found.ms == pytest.approx(found.start_ms + found.last_ms) and not any(found.before_ms.values())


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
    assert more.ms - whole.ms == pytest.approx(2 * match.region("r02").macs / 1e6, rel=0.1)
    gap = {name: ms for name, ms in more.before_ms.items() if ms}
    assert list(gap) == ["r03"] and gap["r03"] == pytest.approx(more.ms - whole.ms, rel=0.1)


def test_regions_that_are_not_one_row_have_none(lab: Lab) -> None:
    """Between the second and the first region nothing leads back."""
    match = lab.costed.match
    assert match is not None
    turned = MatchResult(tuple(reversed(match.regions)), (), match.n_atoms)
    assert measure_glue(Meter(lab.fresh()), replace(lab.costed, match=turned), [any_row(lab.costed)]) is None


def nested() -> MatchResult:
    """Three blocks; the first two and a node of its own are a whole, all three and another one are the whole of it."""
    blocks = [replace(r, nodes=(r.output,)) for r in chain()[:3]]
    first = replace(chain()[3], name="w2", nodes=("a", "b", "cat"))
    both = replace(first, name="w3", output="c", nodes=("a", "b", "cat", "c", "cat2"), atoms=(0, 1, 2))
    return MatchResult((*blocks, first, both), (), n_atoms=3)


def test_what_lies_inside_counts_once_and_blocks_bear_it() -> None:
    """The inner whole takes 3 ms beyond its blocks' 4, the outer one 1.5 beyond 6 and those 3."""
    match, rows = nested(), [*ROWS[:3], cost("w2", "teacher", "fp32", 7.0), cost("w3", "teacher", "fp32", 10.5)]
    assert inner_glue(match, rows) == pytest.approx({"w2": 3.0, "w3": 1.5})
    assert [r.name for r in line_of(match)] == ["w3"]
    wanted = {"r00": 1.5 + 0.5, "r01": 1.5 + 0.5, "r02": 0.5, "w2": 1.0, "w3": 0.0}
    shares, outside = glue_shares(match, CostTable(tuple(rows), teacher_ms=11.0, glue_ms=5.0))
    assert shares == pytest.approx(wanted) and outside == pytest.approx(0.5)
    rows[3] = cost("w2", "teacher", "fp32", 1e9)
    assert inner_glue(match, rows) == pytest.approx({"w2": 0.0, "w3": 4.5}), "the engine does not take it alone"


@pytest.mark.parametrize(("glue_ms", "scale"), [(5.0, 1.0), (5.0, 0.9), (2.0, 1.0), (0.0, 1.1)])
def test_every_cover_of_the_teachers_own_parts_is_the_teacher(glue_ms: float, scale: float) -> None:
    """Also where the glue was not measured and is less than what lies inside the wholes."""
    match = nested()
    rows = (*ROWS[:3], cost("w2", "teacher", "fp32", 7.0), cost("w3", "teacher", "fp32", 10.5))
    table = CostTable(rows, teacher_ms=6.0 * scale + glue_ms, glue_ms=glue_ms, scale=scale)
    scores = tuple(score(r.region, r.candidate, r.precision, 0.0) for r in rows)
    for correction in (Correction(), Correction(own=1.2, floats=1.2, int8=1.2, borders=1.2, glue=1.2)):
        costs = replace(table, correction=correction)
        problem = make_problem(replace(state_of(chain()), match=match, costs=costs, scores=scores), math.inf)
        blocks = [i.cost for i in problem.items if len(i.atoms) == 1]
        assert problem.fixed_cost + sum(blocks) == pytest.approx(correction.own * table.teacher_ms)


def test_what_replaces_a_whole_is_rid_of_what_lies_inside() -> None:
    """A dense block's concatenations take 3 ms, and what takes its place 0.2: it was priced at nothing, on top of the
    concatenations."""
    match = nested()
    rows = [*ROWS[:3], cost("w2", "teacher", "fp32", 7.0), cost("w3", "teacher", "fp32", 10.5)]
    rows += [cost("w2", "cheap", "fp32", 0.2), cost("r00", "cheap", "fp32", 0.2)]
    table = CostTable(tuple(rows), teacher_ms=11.0, glue_ms=5.0)
    scores = tuple(score(r.region, r.candidate, r.precision, 0.0) for r in rows)
    state = replace(state_of(chain()), match=match, costs=table, scores=scores)
    problem = make_problem(state, math.inf)
    assert problem.fixed_cost == pytest.approx(0.5)
    price = {(i.region, i.candidate): i.cost for i in problem.items}
    assert price["w2", "cheap"] == pytest.approx(0.2 + 1.0)
    assert price["r00", "cheap"] == pytest.approx(0.2 + 2.0)
    for cover in (("w3",), ("w2", "r02"), ("r00", "r01", "r02")):
        assert problem.fixed_cost + sum(price[name, "teacher"] for name in cover) == pytest.approx(11.0)


def test_every_cover_of_the_teacher_loads_the_caches_alike() -> None:
    """12 MB of weights and 10.5 ms, what lies inside wholes with it: 33 MB, of which the caches hold 10."""
    match = nested()
    parts = (*ROWS[:3], cost("w2", "teacher", "fp32", 7.0), cost("w3", "teacher", "fp32", 10.5))
    rows = tuple(replace(r, params=n * 1_000_000) for r, n in zip(parts, (1, 1, 1, 2, 3), strict=True))
    table = CostTable(rows, teacher_ms=13.0, glue_ms=5.0, fetching=Fetching(10.0, 0.05, 16.0, 2.0))
    assert teachers_footprint(match, table) == pytest.approx((12.0, 10.5))
    scores = tuple(score(r.region, r.candidate, r.precision, 0.0) for r in rows)
    problem = make_problem(replace(state_of(chain()), match=match, costs=table, scores=scores), math.inf)
    at = {item.region: k for k, item in enumerate(problem.items)}
    for cover in (("w3",), ("w2", "r02"), ("r00", "r01", "r02")):
        assert evaluate(problem, [at[name] for name in cover])[1] == pytest.approx(11.0 + 0.05 * (23.0 + 17.0)), cover


class Listening(Meter):
    """Keeps what it is given to time."""

    def rows(self, work: Sequence[Work], progress: Callable[[float], None] = lambda share: None) -> list[CostRow]:
        self.given = list(work)
        return super().rows(work, progress)


def test_a_heavy_head_counts_its_own_weights(lab: Lab) -> None:
    """They decide how many copies of it are timed together."""
    meter = Listening(lab.fresh())
    heavy = replace(any_row(lab.costed), params=50_000_000)
    assert measure_glue(meter, lab.costed, [heavy, *(lab.costed.costs.rows if lab.costed.costs else ())[1:]])
    assert [w.row.params for w in meter.given] == [weights_in(w.model) for w in meter.given]
    assert 0 < max(w.row.params for w in meter.given) < 50_000_000
