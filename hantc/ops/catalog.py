"""The candidate pool as tables, for `hantc pool`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from hantc.core.types import ParamValue, Shape, Signature
from hantc.ops.registry import DERIVED, Family, families, get_family


@dataclass(frozen=True)
class Row:
    """One grid point at one signature. `macs` (per sample) and `params` (weights) are None where it is not
    proposed, and `reason` says why."""

    candidate: str
    family: str
    hyper: Mapping[str, ParamValue]
    macs: int | None
    params: int | None
    reason: str


def describe(
    signature: Signature, *, family: str | None = None, among: Mapping[str, Family] | None = None
) -> list[Row]:
    """Every grid point of every family (or of `family` alone). UsageError for an unknown family."""
    known = {**families(), **DERIVED} if among is None else among
    chosen = known.values() if family is None else [get_family(family, among=known)]
    rows = []
    for member in chosen:
        for spec, reason in member.survey(signature):
            macs, params = (None, None) if reason else member.estimate(spec, signature)
            rows.append(Row(spec.name, spec.family, spec.kwargs, macs, params, reason))
    return rows


def pool_data(family: str | None, in_shape: Shape, out_shape: Shape, final_act: str = "") -> list[dict[str, Any]]:
    """`describe` as plain dicts: candidate, family, hyper, macs, params, reason."""
    return [asdict(row) for row in describe(Signature(in_shape, out_shape, final_act), family=family)]


def pool_table(family: str | None, in_shape: Shape, out_shape: Shape, final_act: str = "") -> Table:
    """`describe` for the terminal: MACs per sample and weights, and the reason for what is not proposed."""
    rows = describe(Signature(in_shape, out_shape, final_act), family=family)
    fitting = sum(not row.reason for row in rows)
    title = f"{_shape(in_shape)} → {_shape(out_shape)}: {fitting} of {len(rows)} candidates fit"
    table = Table(title=Text(title))
    for column in ("candidate", "family"):
        table.add_column(column, no_wrap=True)
    for column in ("MACs", "weights"):
        table.add_column(column, justify="right")
    table.add_column("not proposed because")
    for row in rows:
        cells = [row.candidate, row.family, _count(row.macs), _count(row.params), row.reason]
        table.add_row(*map(Text, cells), style="dim" if row.reason else None)
    return table


def families_data() -> list[dict[str, Any]]:
    """Every family: name, source, grid (parameter to values), options (parameter to default), size of the grid."""
    return [
        {
            "family": f.name,
            "source": f.source,
            "grid": {name: list(values) for name, values in f.params.items()},
            "options": dict(f.options),
            "size": len(f.grid()),
        }
        for f in (*families().values(), *DERIVED.values())
    ]


def families_table() -> Table:
    """`families_data` for the terminal."""
    table = Table()
    for column in ("family", "parameters", "grid", "source"):
        table.add_column(column, justify="right" if column == "grid" else "left")
    for row in families_data():
        grid = "\n".join(f"{name}: {' '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)}"
                         for name, values in row["grid"].items())  # fmt: skip
        table.add_row(*map(Text, (row["family"], grid, str(row["size"]), row["source"])))
    return table


def _shape(shape: Shape) -> str:
    return "×".join(map(str, shape))


def _count(value: int | None) -> str:
    if value is None:
        return ""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return str(value)
