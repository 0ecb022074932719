"""Decoding and fitting of single images, and the thread pool that does it for many."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hantc.core.errors import DataError
from hantc.core.progress import Reporter
from hantc.core.types import TensorSpec
from hantc.data.preprocess import Preprocess, Size, as_size, channel_dim, spatial_dims

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"))

_CHUNK = 64
_MAX_WORKERS = 8
# Pillow documents that a JPEG reduced while decoding to three times the target is not told from the full one.
_DRAFT_MARGIN = 3


@dataclass(frozen=True)
class Plan:
    """What every image of a load must become: uint8 (size, channels). `size` None: whatever the first image has."""

    preprocess: Preprocess
    channels: int
    size: tuple[int | None, int | None]

    @classmethod
    def of(cls, preprocess: Preprocess, spec: TensorSpec, where: str) -> Plan:
        """The plan for feeding `spec`. DataError when the input is not an image tensor."""
        if len(spec.shape) != 4:
            raise DataError(
                f"holds images, but the model's input {spec.name} has {len(spec.shape)} dimensions",
                where=where,
                hint="give an .npz whose float array x is fed as it is",
            )
        channels = channel_dim(spec, preprocess.layout)
        if not isinstance(channels, int):
            channels = 1 if preprocess.color == "GRAY" else 3
        if preprocess.output_size is not None:
            return cls(preprocess, channels, preprocess.output_size)
        h, w = (d if isinstance(d, int) else None for d in spatial_dims(spec, preprocess.layout))
        return cls(preprocess, channels, (h, w))

    def with_size(self, size: Size) -> Plan:
        """The same plan with open dimensions of the size taken from `size`."""
        h, w = self.size
        return Plan(self.preprocess, self.channels, (h or size[0], w or size[1]))


def open_image(path: str, plan: Plan) -> NDArray[np.uint8]:
    """Decode a file and fit it. As torchvision's loader does, an EXIF orientation is not applied."""
    with Image.open(path) as image:
        pre = plan.preprocess
        if image.format == "JPEG" and pre.resize is not None and pre.interpolation != "nearest":
            h, w = _resized(image, pre)
            image.draft(image.mode, (w * _DRAFT_MARGIN, h * _DRAFT_MARGIN))
        return fit(image, plan, path)


def fit(image: Image.Image, plan: Plan, where: str) -> NDArray[np.uint8]:
    """Colour, resize, centre crop: uint8 (H, W, C), ordered as `color`. DataError on a size other than the plan's."""
    pre = plan.preprocess
    image = _eight_bit(image).convert("L" if plan.channels == 1 else "RGB")
    if pre.resize is not None:
        h, w = _resized(image, pre)
        if image.size != (w, h):
            image = image.resize((w, h), _filter(pre))
    if pre.crop is not None:
        image = _centre_crop(image, as_size(pre.crop), where)
    _check_size(image, plan, where)
    pixels = np.asarray(image)
    if plan.channels == 1:
        return pixels[:, :, None]
    return pixels[:, :, ::-1] if pre.color == "BGR" else pixels


def fit_array(pixels: NDArray[np.uint8], plan: Plan, where: str) -> NDArray[np.uint8]:
    """The same for a uint8 array (H, W, C): grey or RGB, or exactly the plan's channel count."""
    channels = pixels.shape[2]
    if channels == 1:
        return fit(Image.fromarray(pixels[:, :, 0]), plan, where)
    if channels == 3 and plan.channels in (1, 3):
        return fit(Image.fromarray(pixels), plan, where)
    # More channels than Pillow's modes hold: colour does not apply, each is fitted alone.
    single = Plan(plan.preprocess, 1, plan.size)
    parts = [fit(Image.fromarray(np.ascontiguousarray(pixels[:, :, c])), single, where) for c in range(channels)]
    return np.concatenate(parts, axis=2)


def in_threads(count: int, work: Callable[[int], None], title: str, reporter: Reporter) -> None:
    """Call `work(i)` for i in 0…count-1 on a few threads, with a progress bar. The first exception is raised."""

    def chunk(start: int) -> int:
        stop = min(start + _CHUNK, count)
        for i in range(start, stop):
            work(i)
        return stop - start

    workers = min(_MAX_WORKERS, os.cpu_count() or 1)
    with reporter.bar(title, count) as bar, ThreadPoolExecutor(workers) as pool:
        for done in pool.map(chunk, range(0, count, _CHUNK)):
            bar.advance(done)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit greys to 255 when it converts them; keep the upper byte instead."""
    if image.mode.startswith("I;16"):
        wide: NDArray[Any] = np.asarray(image)
        return Image.fromarray((wide >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise OSError(f"32-bit pixels (mode {image.mode}) are not supported")
    return image


def _filter(pre: Preprocess) -> Image.Resampling:
    return Image.Resampling[pre.interpolation.upper()]


def _resized(image: Image.Image, pre: Preprocess) -> Size:
    """Height and width after the resize alone."""
    assert pre.resize is not None
    if not isinstance(pre.resize, int) or pre.crop is None:
        return as_size(pre.resize)
    w, h = image.size
    long = int(pre.resize * max(w, h) / min(w, h))
    return (long, pre.resize) if h >= w else (pre.resize, long)


def _centre_crop(image: Image.Image, size: Size, where: str) -> Image.Image:
    (h, w), (image_w, image_h) = size, image.size
    if h > image_h or w > image_w:
        raise DataError(
            f"image is {image_h}x{image_w}, too small to crop {h}x{w} from",
            where=where,
            hint="set 'resize' in the preprocessing to at least the crop",
        )
    top, left = round((image_h - h) / 2), round((image_w - w) / 2)
    return image.crop((left, top, left + w, top + h))


def _check_size(image: Image.Image, plan: Plan, where: str) -> None:
    got = (image.size[1], image.size[0])
    if any(want is not None and want != have for want, have in zip(plan.size, got, strict=True)):
        want_text = "x".join("?" if d is None else str(d) for d in plan.size)
        raise DataError(
            f"image is {got[0]}x{got[1]}, where {want_text} is needed",
            where=where,
            hint="set 'resize' (and 'crop') in the preprocessing, so that all images get the network's input size",
        )
