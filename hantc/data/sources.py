"""Where images come from: what a source is, shared by image folders and .npz files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hantc.core.progress import Reporter
from hantc.core.types import TensorSpec
from hantc.data.preprocess import Preprocess

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Loaded:
    """Images in memory: uint8 (N, H, W, C), fitted, or float32 as given. `rows`: which source rows they are."""

    images: NDArray[Any]
    rows: Rows
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """Images that have been listed but not decoded."""

    @property
    def where(self) -> str:
        """The path (and array) for messages."""
        ...

    @property
    def y(self) -> NDArray[np.int64] | None:
        """Class index of every row, or None."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by index; empty for arrays and unlabelled images."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about this source."""
        ...

    @property
    def stamp(self) -> str:
        """Content hash."""
        ...

    def __len__(self) -> int: ...

    def load(self, rows: Rows, preprocess: Preprocess, spec: TensorSpec, title: str, reporter: Reporter) -> Loaded:
        """Decode and fit `rows`. Raises DataError where they cannot become the model's input."""
        ...

    def row_bytes(self, preprocess: Preprocess, spec: TensorSpec) -> int:
        """Memory that one loaded row takes."""
        ...
