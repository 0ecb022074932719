"""The range to round over: all of it, unless a few images would blur the others."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hantc.dialect.ranges import robust_range


def test_images_alike_keep_the_whole_range() -> None:
    rng = np.random.default_rng(0)
    low, high = -rng.uniform(3, 5, 200), rng.uniform(3, 5, 200)
    assert robust_range(low, high, np.ones(200)) == (low.min(), high.max())


def test_two_images_a_hundred_times_beyond_are_cut_off() -> None:
    low, high, variance = -np.full(100, 4.0), np.full(100, 5.0), np.ones(100)
    low[7], high[30] = -400.0, 500.0
    variance[[7, 30]] = 1e4
    assert robust_range(low, high, variance) == (-4.0, 5.0)


def test_where_half_the_images_reach_far_nothing_is_cut_off() -> None:
    high, variance = np.full(100, 5.0), np.ones(100)
    high[:50], variance[:50] = 500.0, 1e4
    assert robust_range(np.zeros(100), high, variance) == (0.0, 500.0)


def test_a_larger_image_whose_details_matter_is_not_cut_off() -> None:
    """Twice the others' reach costs them little resolution, and cutting would cost it half."""
    high, variance = np.full(100, 5.0), np.ones(100)
    high[4], variance[4] = 10.0, 4.0
    assert robust_range(-high, high, variance) == (-10.0, 10.0)


def test_an_image_on_the_other_side_of_zero_is_not_cut_off() -> None:
    low, high = np.zeros(100), np.full(100, 10.0)
    low[6], high[6] = -11.0, 0.0
    assert robust_range(low, high, np.ones(100)) == (-11.0, 10.0)


def test_zero_is_always_within() -> None:
    ones = np.ones(10)
    assert robust_range(2 * ones, 3 * ones, ones) == (0.0, 3.0)
    assert robust_range(-3 * ones, -2 * ones, ones) == (-3.0, 0.0)


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.floats(0, 1e12)), min_size=1, max_size=60))
def test_it_lies_within_what_the_images_need_and_holds_nine_in_ten(rows: list[tuple[float, float, float]]) -> None:
    low = np.array([r[0] for r in rows])
    high = low + np.array([r[1] for r in rows])
    lowest, highest = robust_range(low, high, np.array([r[2] for r in rows]))
    assert min(0.0, low.min()) <= lowest <= 0.0 <= highest <= max(0.0, high.max())
    held = (low >= lowest) & (high <= highest)
    assert held.sum() >= np.floor(0.9 * len(rows))
