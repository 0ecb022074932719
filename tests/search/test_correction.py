"""Latencies of whole networks told apart into factors of their parts."""

from __future__ import annotations

import numpy as np
import pytest

from hantc.search.correction import Fit, fit_factors

SPREAD = (0.1, 0.5, 1.0)


def test_a_true_table_is_left_alone() -> None:
    parts = [(3.0, 1.0, 0.5), (1.0, 2.0, 0.1)]
    assert fit_factors(parts, [sum(p) for p in parts], SPREAD).factors == pytest.approx((1, 1, 1))


def test_many_networks_tell_each_kind_apart() -> None:
    rng = np.random.default_rng(0)
    parts, truth = rng.uniform(0.5, 4.0, (60, 3)), np.array([1.05, 0.7, 2.2])
    measured = parts @ truth * (1 + 0.01 * rng.standard_normal(60))
    assert fit_factors(parts.tolist(), measured.tolist(), SPREAD).factors == pytest.approx(truth, abs=0.03)


def test_one_network_moves_what_is_least_sure() -> None:
    """All parts are as large; the one whose factor may be anything takes the blame."""
    sure, doubtful, unknown = fit_factors([(1.0, 1.0, 1.0)], [3.6], SPREAD).factors
    assert 1 < sure < doubtful < unknown
    assert sure + doubtful + unknown == pytest.approx(3.6, rel=0.02)


def test_what_no_network_has_stays() -> None:
    assert fit_factors([(2.0, 0.0, 1.0)], [6.0], SPREAD).factors[1] == 1.0


def test_a_factor_stays_above_nothing() -> None:
    assert min(fit_factors([(1.0, 0.0, 5.0)], [0.2], SPREAD).factors) == 0.05


def test_no_networks_no_change() -> None:
    assert fit_factors([], [], SPREAD) == Fit((1.0, 1.0, 1.0), 0.0)


def test_what_is_common_to_all_moves_kinds_that_no_network_has() -> None:
    """Three networks of the first two kinds, 10 % slower than their tables: so will the third kind be."""
    parts = [(3.0, 1.0, 0.0), (1.0, 3.0, 0.0), (2.0, 2.0, 0.0)]
    apart = fit_factors(parts, [4.4] * 3, (0.01, 0.01, 0.01)).factors
    together = fit_factors(parts, [4.4] * 3, (0.01, 0.01, 0.01), 0.1).factors
    assert apart[2] == 1.0 and together == pytest.approx((1.1, 1.1, 1.1), abs=0.01)


def test_of_two_tables_the_true_one_fits_better() -> None:
    """Two kinds told apart rightly, and as if each had a share of the other's."""
    true = [(3.0, 1.0), (1.0, 3.0), (2.5, 0.5)]
    measured = [1.1 * a + 0.9 * b for a, b in true]
    mixed = [(0.5 * (a + b), 0.5 * (a + b)) for a, b in true]
    right, wrong = (fit_factors(parts, measured, (0.1, 0.1)) for parts in (true, mixed))
    assert right.misfit < 3 < wrong.misfit - right.misfit
    assert fit_factors(true, [sum(p) for p in true], (0.1, 0.1)).misfit == pytest.approx(0.0, abs=1e-9)
