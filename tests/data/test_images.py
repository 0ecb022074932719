"""Fitting one image: colour, resize, crop, depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hantc.core.errors import DataError
from hantc.core.progress import Reporter
from hantc.core.types import TensorSpec
from hantc.data.images import Plan, fit, fit_array, in_threads, open_image
from hantc.data.preprocess import Preprocess


def plan(channels: int = 3, **keys: Any) -> Plan:
    pre = Preprocess(**keys)
    h, w = pre.output_size or ("h", "w")
    return Plan.of(pre, TensorSpec("input", "float32", ("N", channels, h, w)), "here")


def picture(h: int, w: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


def test_colour_orders() -> None:
    red = Image.new("RGB", (4, 4), (200, 10, 20))
    assert fit(red, plan(), "x")[0, 0].tolist() == [200, 10, 20]
    assert fit(red, plan(color="BGR"), "x")[0, 0].tolist() == [20, 10, 200]
    grey = fit(red, plan(1, color="GRAY"), "x")
    assert grey.shape == (4, 4, 1) and grey[0, 0, 0] == round(200 * 0.299 + 10 * 0.587 + 20 * 0.114)
    assert fit(Image.new("L", (4, 4), 7), plan(), "x")[0, 0].tolist() == [7, 7, 7]
    assert fit(Image.new("RGBA", (4, 4), (1, 2, 3, 0)), plan(), "x")[0, 0].tolist() == [1, 2, 3]


def test_resize_is_pillows() -> None:
    image = picture(10, 20)
    got = fit(image, plan(resize=(8, 6), interpolation="bicubic"), "x")
    assert np.array_equal(got, np.asarray(image.resize((6, 8), Image.Resampling.BICUBIC)))
    assert fit(image, plan(resize=8), "x").shape == (8, 8, 3)


def test_int_resize_before_a_crop_keeps_the_aspect() -> None:
    image = picture(20, 40)
    got = fit(image, plan(resize=10, crop=8), "x")
    full = np.asarray(image.resize((20, 10), Image.Resampling.BILINEAR))
    assert np.array_equal(got, full[1:9, 6:14])
    assert fit(picture(41, 20), plan(resize=10, crop=10), "x").shape == (10, 10, 3)


def test_crop_larger_than_the_image() -> None:
    with pytest.raises(DataError, match=r"cat\.png: image is 4x6, too small to crop 5x5"):
        fit(picture(4, 6), plan(crop=5), "cat.png")


def test_wrong_size_without_resize() -> None:
    fixed = Plan.of(Preprocess(), TensorSpec("input", "float32", ("N", 3, 8, "w")), "here")
    assert fit(picture(8, 5), fixed, "x").shape == (8, 5, 3)
    with pytest.raises(DataError, match=r"9x5, where 8x\? is needed"):
        fit(picture(9, 5), fixed, "x")


def test_sixteen_bit_greys_keep_their_upper_byte(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x8012, np.uint16)).save(tmp_path / "deep.png")
    assert open_image(str(tmp_path / "deep.png"), plan(1, color="GRAY")).max() == 0x80


def test_large_jpeg_is_reduced_without_visible_harm(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 512).astype(np.uint8)
    image = Image.fromarray(np.stack([np.tile(ramp, (512, 1))] * 3, 2))
    image.save(tmp_path / "a.jpg", quality=95)
    got = open_image(str(tmp_path / "a.jpg"), plan(resize=16)).astype(int)
    want = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
    assert got.shape == (16, 16, 3) and np.abs(got - want).max() <= 2


def test_arrays_of_other_channel_counts() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 5), dtype=np.uint8)
    got = fit_array(pixels, plan(5, resize=4), "x")
    assert got.shape == (4, 4, 5)
    assert np.array_equal(got[..., 2:3], fit_array(pixels[..., 2:3], plan(1, color="GRAY", resize=4), "x"))


def test_not_an_image_input() -> None:
    with pytest.raises(DataError, match="2 dimensions"):
        Plan.of(Preprocess(), TensorSpec("input", "float32", ("N", 16)), "here")


def test_threads_do_each_item_once_and_raise() -> None:
    seen = np.zeros(1000, int)

    def mark(i: int) -> None:
        seen[i] += 1

    in_threads(1000, mark, "t", Reporter())
    assert (seen == 1).all()

    def fail(i: int) -> None:
        raise DataError(f"item {i}")

    with pytest.raises(DataError, match="item 0"):
        in_threads(10, fail, "t", Reporter())
