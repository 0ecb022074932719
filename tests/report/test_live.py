"""Progress where there is no terminal."""

from __future__ import annotations

import pytest

from hantc.core.progress import Reporter
from hantc.report import live


class Said(Reporter):
    """Keeps the lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_lines_tell_the_time_left_once_enough_is_done_to_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("hantc.report.live.time.monotonic", lambda: now[0])
    said = Said()
    bar = live._Lines(said, "working", 1000)
    for seconds, n in ((10, 1), (40, 1), (100, 248), (110, 100), (200, 650)):
        now[0] = seconds
        bar.advance(n)
    bar.finish()
    assert said.lines == ["working: 0%", "working: 25%, 5 min 00 s left", "working: done in 3 min 20 s"]
