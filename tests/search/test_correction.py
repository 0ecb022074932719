"""Latencies of whole networks told apart into factors of their parts."""

from __future__ import annotations

import numpy as np
import pytest

from hantc.search.correction import fit_factors

SPREAD = (0.1, 0.5, 1.0)


def test_a_true_table_is_left_alone() -> None:
    parts = [(3.0, 1.0, 0.5), (1.0, 2.0, 0.1)]
    assert fit_factors(parts, [sum(p) for p in parts], SPREAD) == pytest.approx((1, 1, 1))


def test_many_networks_tell_each_kind_apart() -> None:
    rng = np.random.default_rng(0)
    parts, truth = rng.uniform(0.5, 4.0, (60, 3)), np.array([1.05, 0.7, 2.2])
    measured = parts @ truth * (1 + 0.01 * rng.standard_normal(60))
    assert fit_factors(parts.tolist(), measured.tolist(), SPREAD) == pytest.approx(truth, abs=0.03)


def test_one_network_moves_what_is_least_sure() -> None:
    """All parts are as large; the one whose factor may be anything takes the blame."""
    sure, doubtful, unknown = fit_factors([(1.0, 1.0, 1.0)], [3.6], SPREAD)
    assert 1 < sure < doubtful < unknown
    assert sure + doubtful + unknown == pytest.approx(3.6, rel=0.02)


def test_what_no_network_has_stays() -> None:
    assert fit_factors([(2.0, 0.0, 1.0)], [6.0], SPREAD)[1] == 1.0


def test_a_factor_stays_above_nothing() -> None:
    assert min(fit_factors([(1.0, 0.0, 5.0)], [0.2], SPREAD)) == 0.05


def test_no_networks_no_change() -> None:
    assert fit_factors([], [], SPREAD) == (1.0, 1.0, 1.0)


def test_what_is_common_to_all_moves_kinds_that_no_network_has() -> None:
    """Three networks of the first two kinds, 10 % slower than their tables: so will the third kind be."""
    parts = [(3.0, 1.0, 0.0), (1.0, 3.0, 0.0), (2.0, 2.0, 0.0)]
    apart = fit_factors(parts, [4.4] * 3, (0.01, 0.01, 0.01))
    together = fit_factors(parts, [4.4] * 3, (0.01, 0.01, 0.01), 0.1)
    assert apart[2] == 1.0 and together == pytest.approx((1.1, 1.1, 1.1), abs=0.01)
