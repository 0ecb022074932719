"""The other files of a run folder, read back into records. Each may be absent; a broken one is named."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from hantc.core.types import CostTable, Plan, Region, Rejection, ScoreRow
from hantc.report.summary import Summary, broken, load, read_json
from hantc.report.text import finite

T = TypeVar("T")


@dataclass(frozen=True)
class Solution:
    """One evaluated student: latencies in ms, accuracy in percent. `chosen` marks the one that was emitted."""

    predicted_ms: float | None
    measured_ms: float | None = None
    score: float | None = None
    accuracy: float | None = None
    chosen: bool = False

    @property
    def latency_ms(self) -> float | None:
        """Measured where it was, else predicted."""
        return finite(self.predicted_ms) if finite(self.measured_ms) is None else self.measured_ms


@dataclass(frozen=True)
class RunRecords:
    """A run folder's content. None or empty: the file is not there."""

    folder: Path
    summary: Summary
    plan: Plan | None
    costs: CostTable | None
    scores: tuple[ScoreRow, ...]
    regions: tuple[Region, ...]
    rejections: tuple[Rejection, ...]
    solutions: tuple[Solution, ...]
    warnings: tuple[str, ...]

    def region_names(self) -> list[str]:
        """Every region that any file of the run speaks of, matched ones first, each once."""
        rows = [r.region for r in self.costs.rows] if self.costs else []
        names = [*(r.name for r in self.regions), *(c.region for c in self.summary.choices), *rows]
        return list(dict.fromkeys(names))


def read_run(run_folder: str | os.PathLike[str]) -> RunRecords:
    """Read all of a run folder; UsageError names the file that is missing (the summary) or broken (any)."""
    folder = Path(run_folder)
    summary = load(folder)
    matched = _read(folder / "regions.json", dict[str, Any], {})
    return RunRecords(
        folder=folder,
        summary=summary,
        plan=_read(folder / "plan.json", Plan | None, None),
        costs=_read(folder / "lut.json", CostTable | None, None),
        scores=_rows(folder / "scores.json", "rows", ScoreRow),
        regions=_parse(folder / "regions.json", tuple[Region, ...], matched.get("regions", [])),
        rejections=_parse(folder / "regions.json", tuple[Rejection, ...], matched.get("rejections", [])),
        solutions=_rows(folder / "front.json", "solutions", Solution),
        warnings=_warnings(folder / "log.jsonl"),
    )


def _rows(path: Path, key: str, kind: type[T]) -> tuple[T, ...]:
    content = _read(path, dict[str, Any], {})
    return _parse(path, tuple[kind, ...], content.get(key, []))  # type: ignore[valid-type]


def _read(path: Path, kind: Any, default: Any) -> Any:
    return _parse(path, kind, read_json(path)) if path.is_file() else default


def _parse(path: Path, kind: Any, value: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as e:
        raise broken(path, e) from e


def _warnings(path: Path) -> tuple[str, ...]:
    """Texts of the log's warnings, each once. A line cut off by a crash is skipped."""
    if not path.is_file():
        return ()
    texts: dict[str, None] = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and event.get("event") == "warning" and event.get("text"):
                texts[str(event["text"])] = None
    return tuple(texts)
