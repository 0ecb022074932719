"""Drawing rows: sizes, proportions, disjointness."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hantc.data.splits import complement, draw, mingle, not_in, search_size


@pytest.mark.parametrize(("n", "size"), [(2, 1), (3, 1), (100, 50), (200, 64), (1000, 150), (50_000, 2000)])
def test_search_size(n: int, size: int) -> None:
    assert search_size(n) == size


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.floats(0, 1), st.integers(0, 9))
def test_draw_is_proportional_and_complement_is_the_rest(labels: list[int], share: float, seed: int) -> None:
    y = np.array(labels)
    count = round(share * len(y))
    rows = draw(len(y), count, y, np.random.default_rng(seed))
    assert len(np.unique(rows)) == count and (np.diff(rows) > 0).all()
    for c in np.unique(y):
        assert abs((y[rows] == c).sum() - count * (y == c).mean()) <= 3.5
    rest = complement(len(y), rows)
    assert sorted([*rows, *rest]) == list(range(len(y)))


def test_draw_is_exact_for_balanced_classes_and_repeats() -> None:
    y = np.repeat(np.arange(10), 30)
    rows = draw(300, 100, y, np.random.default_rng(1))
    assert np.bincount(y[rows]).tolist() == [10] * 10
    assert np.array_equal(rows, draw(300, 100, y, np.random.default_rng(1)))
    assert not np.array_equal(rows, draw(300, 100, y, np.random.default_rng(2)))
    assert len(draw(300, 100, None, np.random.default_rng(1))) == 100


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(0, 9), st.data())
def test_every_beginning_and_end_has_all_classes_in_proportion(
    labels: list[int], seed: int, data: st.DataObject
) -> None:
    y = np.sort(np.array(labels))  # class by class, as folders are read
    rows = mingle(len(y), y, np.random.default_rng(seed))
    assert sorted(rows) == list(range(len(y)))
    cut = data.draw(st.integers(0, len(y)))
    for part in (rows[:cut], rows[cut:]):
        for c in np.unique(y):
            assert abs((y[part] == c).sum() - len(part) * (y == c).mean()) <= 2


def test_without_labels_the_order_is_random() -> None:
    rows = mingle(100, None, np.random.default_rng(0))
    assert sorted(rows) == list(range(100)) and not (np.diff(rows) > 0).all()


def test_not_in() -> None:
    a = np.arange(24, dtype=np.uint8).reshape(6, 4)
    assert not_in(a, a[[1, 4]]).tolist() == [0, 2, 3, 5]
    assert not_in(a, a[:0]).tolist() == list(range(6))
    assert not_in(a, a.astype(np.float32)).tolist() == list(range(6))
