"""Which rows go where: stratified drawing, and keeping validation apart from everything else."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hantc.data.sources import Rows

VAL_SHARE = 0.2
SEARCH_SHARE = 0.15
SEARCH_MAX = 2000
SEARCH_MIN = 64


def search_size(n: int) -> int:
    """How many of `n` training images the search split takes: 15 %, within 64…2000 and at most half."""
    return min(max(min(SEARCH_MAX, round(SEARCH_SHARE * n)), SEARCH_MIN), n // 2)


def mingle(n: int, y: NDArray[np.int64] | None, rng: np.random.Generator) -> Rows:
    """The rows 0…n-1 at random; with labels `y`, in an order whose every beginning (and end) has all classes in
    proportion, so that whoever takes the first images of a split takes of all classes."""
    if y is None:
        return rng.permutation(n).astype(np.int64)
    # A row's key is its relative position in its own shuffled class, so the smallest keys take from all
    # classes alike; the second random order settles ties without favouring a class.
    order = rng.permutation(n)
    by_class = order[np.argsort(y[order], kind="stable")]
    _, starts, sizes = np.unique(y[by_class], return_index=True, return_counts=True)
    key = np.empty(n)
    key[by_class] = (np.arange(n) - np.repeat(starts, sizes) + 0.5) / np.repeat(sizes, sizes)
    tie = rng.permutation(n)
    return np.lexsort((tie, key)).astype(np.int64)


def draw(n: int, count: int, y: NDArray[np.int64] | None, rng: np.random.Generator) -> Rows:
    """`count` of the rows 0…n-1 at random, sorted; with labels `y`, every class in proportion."""
    return np.sort(mingle(n, y, rng)[:count])


def complement(n: int, rows: Rows) -> Rows:
    """The rows 0…n-1 that are not in `rows`, sorted."""
    keep = np.ones(n, bool)
    keep[rows] = False
    return np.flatnonzero(keep).astype(np.int64)


def not_in(images: NDArray[Any], others: NDArray[Any]) -> Rows:
    """The rows of `images` whose content occurs nowhere in `others`."""
    if images.shape[1:] != others.shape[1:] or images.dtype != others.dtype:
        return np.arange(len(images))
    seen = {_content(row) for row in others}
    return np.array([i for i, row in enumerate(images) if _content(row) not in seen], np.int64)


def _content(row: NDArray[Any]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(row).data, digest_size=16).digest()
