"""Progress on standard error: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hantc.core.progress import Bar, Reporter
from hantc.report.text import fmt_seconds

_TELL_S = 30.0  # between progress lines where there is no terminal
_TELLING = 0.01  # share done from which on it says something of the time left


class RichReporter(Reporter):
    """Progress with time left, on standard error: bars on a terminal, plain lines elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__()
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet, soft_wrap=True, emoji=False)

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        """A bar with share done, time spent and time left."""
        total = max(total, 1e-9)
        if not self.console.is_terminal:
            lines = _Lines(self, title, total)
            yield lines
            lines.finish()
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<42}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=total)
            yield _RichBar(progress, task)
            progress.update(task, completed=total)

    def say(self, text: str) -> None:
        """A plain line."""
        self.console.print(text, highlight=False, markup=False)

    def warn(self, text: str) -> None:
        """A warning line, also in the log."""
        super().warn(text)
        self.console.print(f"warning: {text}", style="yellow", highlight=False, markup=False)


class _RichBar:
    def __init__(self, progress: Any, task: Any) -> None:
        self.progress, self.task = progress, task

    def advance(self, n: float = 1) -> None:
        self.progress.advance(self.task, n)


class _Lines:
    """A bar for logs: one line at the end, and one every half minute before."""

    def __init__(self, reporter: Reporter, title: str, total: float) -> None:
        self.reporter, self.title, self.total, self.done = reporter, title, total, 0.0
        self.begun = self.told = time.monotonic()

    def advance(self, n: float = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.told >= _TELL_S and 0 < self.done < self.total:
            self.told = now
            share = self.done / self.total
            left = f", {fmt_seconds((now - self.begun) * (1 / share - 1))} left" if share >= _TELLING else ""
            self.reporter.say(f"{self.title}: {share:.0%}{left}")

    def finish(self) -> None:
        self.reporter.say(f"{self.title}: done in {fmt_seconds(time.monotonic() - self.begun)}")
