"""The other files of a run folder, read back into records. Each may be absent; a broken one is named."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from hantc.core.types import Choice, CostRow, CostTable, Plan, Region, Rejection, ScoreRow
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
        plan=_table(folder / "plan.json", Plan, "choices", Choice),
        costs=_table(folder / "lut.json", CostTable, "rows", CostRow),
        scores=_rows(folder / "scores.json", "rows", ScoreRow),
        regions=_parse(folder / "regions.json", tuple[Region, ...], matched.get("regions", [])),
        rejections=_parse(folder / "regions.json", tuple[Rejection, ...], matched.get("rejections", [])),
        solutions=_rows(folder / "front.json", "solutions", Solution),
        warnings=_warnings(folder / "log.jsonl"),
    )


def _rows(path: Path, key: str, kind: type[T]) -> tuple[T, ...]:
    content = _read(path, dict[str, Any], {})
    rows: tuple[T, ...] = _parse(path, tuple[kind, ...], _with_nan(content.get(key, []), kind))  # type: ignore[valid-type]
    return rows


def _table(path: Path, kind: type[T], key: str, row_kind: type) -> T | None:
    """A record that holds rows of another under `key`; None if the file is not there."""
    if not path.is_file():
        return None
    content = _with_nan(_read(path, dict[str, Any], {}), kind)
    table: T = _parse(path, kind, {**content, key: _with_nan(content.get(key, []), row_kind)})
    return table


def _with_nan(value: Any, kind: type) -> Any:
    """Put NaN back where JSON, which has none, holds null for a plain float field of `kind`."""
    if isinstance(value, list):
        return [_with_nan(v, kind) for v in value]
    if not isinstance(value, dict):
        return value
    names = {f.name for f in fields(kind) if f.type == "float"}  # annotations are strings there
    return {k: math.nan if v is None and k in names else v for k, v in value.items()}


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
