"""Progress with time left, and the event log. Passes report through `Reporter`; the CLI decides what shows."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol


class Bar(Protocol):
    """One running progress bar."""

    def advance(self, n: float = 1) -> None:
        """n more units are done."""
        ...


class Reporter:
    """Silent base: keeps the event log when given a path. `hantc.cli` subclasses it with rich."""

    def __init__(self, log_path: Path | None = None) -> None:
        self.log_path = log_path
        self._t0 = time.time()

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        """A progress bar over `total` units."""
        yield _SilentBar()

    def say(self, text: str) -> None:
        """A line for the user."""

    def warn(self, text: str) -> None:
        """A warning for the user; also an event."""
        self.event("warning", text=text)

    def event(self, kind: str, **fields: Any) -> None:
        """Append an event to `log.jsonl`."""
        if self.log_path is not None:
            record = {"t": round(time.time() - self._t0, 3), "event": kind, **fields}
            with self.log_path.open("a") as f:
                f.write(json.dumps(record, default=str) + "\n")


class _SilentBar:
    def advance(self, n: float = 1) -> None:
        return None
