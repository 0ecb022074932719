"""Latency tables for the terminal and for scripts, for `hantc lut`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from hantc.core.lut import Compared, Lut, conditions
from hantc.core.types import UNUSABLE_MS, CostRow, untouched

_SHOWN = 20  # rows of a comparison, those that differ most


def lut_data(lut: Lut) -> dict[str, Any]:
    """What a table was measured under, and what it holds: rows and the cheapest candidate by region."""
    regions: dict[str, list[CostRow]] = {}
    for row in lut.table.rows:
        regions.setdefault(row.region, []).append(row)
    return {
        "lut": str(lut.path),
        **conditions(lut),
        "rows": len(lut.table.rows),
        "predicted": sum(r.predicted for r in lut.table.rows),
        "teacher_ms": lut.table.teacher_ms,
        "glue_ms": lut.table.glue_ms,
        "fetching": asdict(lut.table.fetching),
        "regions": [_region(name, rows) for name, rows in regions.items()],
    }


def _region(name: str, rows: list[CostRow]) -> dict[str, Any]:
    own = next((r.latency_ms for r in rows if untouched(r.candidate, r.precision)), None)
    others = [r for r in rows if r.candidate != "teacher"]
    best = min(others, key=lambda r: r.latency_ms, default=None)
    return {
        "region": name,
        "candidates": len({r.candidate for r in others}),
        "rows": dict(Counter(r.precision for r in rows)),
        "teacher_ms": own,
        "cheapest": None if best is None else f"{best.candidate} {best.precision}",
        "cheapest_ms": None if best is None else best.latency_ms,
    }


def lut_table(lut: Lut) -> Group:
    """`lut_data` as tables."""
    data = lut_data(lut)
    head = Table("what", "value", title=Text(data["lut"]))
    for name in ("cpu", "flags", "cores", "versions", "backend", "threads", "batch", "pinned", "floats"):
        head.add_row(name, Text(_plain(data[name])))
    if data["predicted"]:
        head.add_row(
            "predicted", f"{data['predicted']} of {data['rows']} rows, from a model of the machine, not a clock"
        )
    head.add_row("teacher", f"{data['teacher_ms']:.3f} ms, {data['glue_ms']:.3f} ms of it outside all regions")
    if data["fetching"]["ms_per_mb"]:
        of = "{ms_per_mb:.3f} ms for each MB of the regions' weights"
        of += (
            " and of what others are taken to bring in ({mb_per_ms:.1f} MB a ms)"
            if data["fetching"]["mb_per_ms"]
            else ""
        )
        of += " above {free_mb:.1f}"
        again = ", and as much again above {steep_mb:.1f}" if data["fetching"]["steep_mb"] is not None else ""
        head.add_row("fetching", (of + again).format(**data["fetching"]))
    body = Table("region", "candidates", "rows", "teacher ms", "cheapest", "ms")
    for r in data["regions"]:
        counts = " ".join(f"{n} {p}" for p, n in r["rows"].items())
        cells = [r["region"], str(r["candidates"]), counts, _ms(r["teacher_ms"]), r["cheapest"] or "–"]
        body.add_row(*(Text(c) for c in cells), _ms(r["cheapest_ms"]))
    return Group(head, body)


def diff_data(found: Compared) -> dict[str, Any]:
    """Two tables compared."""
    return {
        "in_both": len(found.rows),
        "only_in_first": found.only[0],
        "only_in_second": found.only[1],
        "conditions": list(found.conditions),
        "clock_factor": found.factor,
        "median_difference": found.median_difference if found.rows else None,
        "rows": [
            {"region": r, "candidate": c, "precision": p, "first_ms": a, "second_ms": b} for r, c, p, a, b in found.rows
        ],
    }


def diff_table(found: Compared) -> Group:
    """The rows that differ most, and what the tables have in common."""
    median = f"{100 * found.median_difference:.1f} %" if found.rows else "–"
    title = (
        f"{len(found.rows)} rows in both, {found.only[0]} only in the first, {found.only[1]} only in the second; "
        f"median difference {median}, the second's clock × {found.factor:.3f}"
    )
    table = Table("region", "candidate", "precision", "first ms", "second ms", "ratio", title=Text(title))
    ranked = sorted((r for r in found.rows if r[3] > 0), key=lambda r: -abs(r[4] / r[3] - 1))
    for region, candidate, precision, a, b in ranked[:_SHOWN]:
        table.add_row(region, candidate, precision, _ms(a), _ms(b), f"{b / a:.2f}")
    return Group(table, *(Text(f"note: {line}") for line in found.conditions))


def _ms(value: float | None) -> str:
    return "–" if value is None or value >= UNUSABLE_MS else f"{value:.4f}"


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join("-".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value) or "none"
    return str(value)
