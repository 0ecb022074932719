"""What everything costs, on the real engine and on one that counts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from hantc.passes.cost import Cost

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

    again = lab.fresh(backend=lab.ort, store=ctx.store)
    monkeypatch.setattr(type(lab.ort), "measure", never)
    assert Cost().call(state, again).costs == first


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
