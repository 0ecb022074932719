"""The matcher's findings for the terminal."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hantc.core.types import MatchResult
from hantc.report.text import clean, fmt_count


def regions_json(found: MatchResult) -> dict[str, Any]:
    """The same for machines."""
    regions = [{**asdict(r), "flops_per_byte": r.flops_per_byte} for r in found.regions]
    return {**asdict(found), "regions": regions}


def regions_table(found: MatchResult, *, why: bool = False) -> RenderableType:
    """Regions with kinds, shapes, sizes and nesting; then what is no region, and why; `why`: also what nearly was one
    of another kind."""
    table = Table(title=f"{len(found.regions)} regions", padding=(0, 0, 0, 1))
    for name in ("region", "kind", "input", "output", "MACs", "params", "FLOP/B", "ops", "part of"):
        table.add_column(name, no_wrap=name == "region")
    for r in found.regions:
        table.add_row(
            Text(clean(r.name)),
            r.kind,
            "×".join(map(str, r.in_shape)),
            "×".join(map(str, r.out_shape)),
            fmt_count(r.macs),
            fmt_count(r.params),
            f"{r.flops_per_byte:.2g}" if r.flops_per_byte < 10 else f"{r.flops_per_byte:.0f}",
            str(len(r.nodes)),
            r.parent or "",
        )
    rest = Table("cannot be replaced", "why", title="the rest")
    for j in found.rejections:
        rest.add_row(Text(clean(j.where)), Text(clean(j.reason)))
    parts: list[RenderableType] = [table, rest] if found.rejections else [table]
    if why:
        near = Table("nearly", "why not", title="near misses" if found.misses else "no near misses")
        for m in found.misses:
            near.add_row(Text(clean(m.where)), Text(clean(m.reason)))
        parts.append(near)
    return Group(*parts)
