"""Training in progress, kept in the store, so that a run that is killed loses a minute of it at most."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hantc.core.store import Store

KIND = "partial"
EVERY_S = 60.0


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: tensors by name, the share of the training that was done, and whatever else."""

    tensors: Mapping[str, Tensor]
    progress: float
    extra: Mapping[str, Any]


@dataclass
class Checkpoint:
    """One training's place in the store. `key` must tell all that the training depends on."""

    store: Store
    key: str
    every_s: float = EVERY_S
    clock: Callable[[], float] = time.monotonic
    _last: float = field(init=False)

    def __post_init__(self) -> None:
        self._last = self.clock()

    def load(self) -> Saved | None:
        """What an interrupted run left; None if nothing, or nothing usable."""
        found, meta = self.store.get_tensors(KIND, self.key), self.store.get_meta(KIND, self.key)
        if found is None or not meta:
            return None
        tensors = {k: torch.from_numpy(v) for k, v in found.items()}
        return Saved(tensors, float(meta["progress"]), json.loads(meta["extra"]))

    def due(self) -> bool:
        """Whether it is time to save."""
        return self.clock() - self._last >= self.every_s

    def save(self, tensors: Mapping[str, Tensor], progress: float, extra: Mapping[str, Any] | None = None) -> None:
        """Replace what was saved before."""
        plain = {k: v.detach().cpu().contiguous().numpy() for k, v in tensors.items()}
        meta = {"progress": repr(progress), "extra": json.dumps(extra or {})}
        self.store.put_tensors(KIND, self.key, plain, meta)
        self._last = self.clock()

    def clear(self) -> None:
        """The training is finished, and its result kept elsewhere."""
        self.store.remove(KIND, self.key, ".safetensors")


def prefixed(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Several modules' states in one: `part/name`."""
    return {f"{part}/{name}": value for part, state in parts.items() for name, value in state.items()}


def part_of(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """One module's state of `prefixed`."""
    head = f"{part}/"
    return {name.removeprefix(head): value for name, value in tensors.items() if name.startswith(head)}
