"""Padding and widths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hantc.core.types import Signature
from hantc.ops.geometry import Misfit, divides, pads_for, resize_pads, round_width, strides

SIZES = st.integers(1, 80)


@given(SIZES, SIZES, st.sampled_from([1, 3, 5, 7, 9]), st.integers(1, 8))
def test_pads_are_exact_or_there_is_no_fit(before: int, after: int, kernel: int, stride: int) -> None:
    fits = {
        total: (before + total - kernel) // stride + 1
        for total in range(kernel)  # at most kernel // 2 on each side
        if before + total >= kernel
    }
    try:
        begin, end = pads_for(before, after, kernel, stride)
    except Misfit:
        assert after not in fits.values() or after > before
        return
    assert fits[begin + end] == after
    assert 0 <= begin <= end <= begin + 1
    even = [total for total, out in fits.items() if out == after and total % 2 == 0]
    assert begin == end or not even


@given(SIZES, st.sampled_from([1, 3, 5, 7]), st.integers(1, 4))
def test_floor_and_ceil_of_strides_are_reached(before: int, kernel: int, stride: int) -> None:
    begin, end = pads_for(before, -(-before // stride), kernel, stride)
    assert begin + end <= kernel - 1


def test_usual_padding_where_it_fits() -> None:
    assert pads_for(8, 8, 3, 1) == (1, 1)
    assert pads_for(8, 4, 3, 2) == (1, 1)
    assert pads_for(7, 4, 3, 2) == (1, 1)
    assert pads_for(7, 3, 3, 2) == (0, 0)
    assert pads_for(15, 7, 5, 2) == (1, 1)
    assert pads_for(10, 7, 7, 1) == (1, 2)


def test_each_dim_has_its_own_stride() -> None:
    signature = Signature((8, 15, 8), (8, 8, 8))
    assert strides(signature) == (2, 1)
    assert resize_pads(signature, 3) == (1, 1, 1, 1)
    assert resize_pads(Signature((8, 7, 9), (8, 3, 5)), 3) == (0, 1, 0, 1)


@given(SIZES, st.integers(1, 12))
def test_rounded_ratios_have_an_integer_stride(before: int, stride: int) -> None:
    for after in {max(1, before // stride), -(-before // stride)}:
        (found, _) = strides(Signature((1, before, 1), (1, after, 1)))
        assert divides(before, after, found)


@pytest.mark.parametrize(("before", "after", "kernel"), [(7, 5, 1), (7, 14, 3), (32, 20, 3), (14, 10, 3)])
def test_misfits(before: int, after: int, kernel: int) -> None:
    with pytest.raises(Misfit):
        resize_pads(Signature((1, before, before), (1, after, after)), kernel)


@pytest.mark.parametrize(("width", "rounded"), [(0.1, 8), (8, 8), (11.9, 8), (12, 16), (20, 24), (51.2, 48)])
def test_width(width: float, rounded: int) -> None:
    assert round_width(width) == rounded
