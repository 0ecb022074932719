"""Latency tables as files: measured once, read back on the same device, for `--lut`.

One JSON object: the fields of `CostTable`, beside `schema_version` and the `device` in full (the rows hold its
digest alone). `hantc profile` writes such a file, and so does every run, as `lut.json`. docs/lut.md describes the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median

from pydantic import TypeAdapter, ValidationError

from hantc.core.atomic import to_jsonable, write_json
from hantc.core.errors import UsageError
from hantc.core.types import UNUSABLE_MS, CostRow, CostTable, Device, Region, digest, untouched

SCHEMA_VERSION = 1
_MEASURE = "measure here: hantc profile MODEL --target TARGET [--backend B] --lut FILE"


@dataclass(frozen=True)
class Lut:
    """A latency table read from `path`, and the device that it was measured on."""

    path: Path
    table: CostTable
    device: Device

    def check_device(self, device: Device, *, backend: str, threads: int, batch: int, pinned: bool = False) -> None:
        """UsageError, naming each difference, unless the rows hold for this device and these settings."""
        pairs = [(f.name, getattr(self.device, f.name), getattr(device, f.name)) for f in fields(Device)]
        for name, here in (("backend", backend), ("threads", threads), ("batch", batch)):
            pairs += [(name, there, here) for there in sorted({getattr(r, name) for r in self.table.rows}, key=str)]
        pairs.append(("pinned", self.table.pinned, pinned))
        # versions are (library, version) pairs; compared as written, since JSON has no tuples
        wrong = [(n, a, b) for n, a, b in pairs if to_jsonable(a) != to_jsonable(b)]
        if [n for n, *_ in wrong] == ["pinned"]:
            hint = "--pin" if self.table.pinned else "leave --pin (or the target's pin = true) out"
            why = f"its threads were {'' if self.table.pinned else 'not '}kept on cores of their own"
            raise UsageError(why, where=f"--lut {self.path}", hint=f"{hint}; or {_MEASURE}")
        if not wrong and any(r.device != digest(device) for r in self.table.rows):
            raise UsageError("its rows were measured on several devices", where=f"--lut {self.path}", hint=_MEASURE)
        if wrong:
            text = "; ".join(f"{n} {_show(a)} there, {_show(b)} here" for n, a, b in wrong)
            hint = f"{_MEASURE}; or compile for the machine that the table is of: --foreign-lut"
            raise UsageError(f"measured under other conditions: {text}", where=f"--lut {self.path}", hint=hint)

    def check_regions(self, regions: tuple[Region, ...]) -> None:
        """UsageError unless every region has its teacher's row, of the same size."""
        rows = self.table.by_key()
        for region in regions:
            row = next((r for (name, c, p), r in rows.items() if name == region.name and untouched(c, p)), None)
            if row is None or (row.macs, row.params) != (region.macs, region.params):
                flaw = "no row" if row is None else "a row of another size"
                raise UsageError(
                    f"the table is of another network: it has {flaw} for region {region.name}",
                    where=f"--lut {self.path}",
                    hint=_MEASURE,
                )


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join("-".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value) or "none"
    return str(value)


def write_lut(path: Path, table: CostTable, device: Device) -> None:
    """Write a table atomically. UsageError if the file cannot be written."""
    write_json(path, {"schema_version": SCHEMA_VERSION, "device": device, **to_jsonable(table)})


def read_lut(path: Path) -> Lut:
    """Read a table. UsageError, naming the file, if it is missing, broken or of another kind."""
    where, hint = f"--lut {path}", "write it with: hantc profile MODEL --lut FILE"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"cannot be read: {getattr(e, 'strerror', None) or e}", where=where, hint=hint) from e
    except (ValueError, RecursionError) as e:
        raise UsageError(f"is not JSON: {e}", where=where, hint=hint) from e
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
        raise UsageError("is not a latency table of this hantc's kind", where=where, hint=hint)
    try:
        table = TypeAdapter(CostTable).validate_python(value)
        device = TypeAdapter(Device).validate_python(value.get("device"))
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(map(str, first["loc"])) or "device"
        raise UsageError(f"holds a wrong entry, {place}: {first['msg']}", where=where, hint=hint) from e
    if not table.rows:
        raise UsageError("holds no rows", where=where, hint=hint)
    factors = {f"correction.{k}": v for k, v in asdict(table.correction).items()}
    whole = {"teacher_ms": table.teacher_ms, "fp32_ms": table.reference_ms}
    if table.clock_ms is not None:
        whole["clock_ms"] = table.clock_ms
    for name, x in {**whole, "scale": table.scale, "pace": table.pace, **factors}.items():
        if not (math.isfinite(x) and x > 0):
            raise UsageError(f"holds a wrong entry, {name}: {x}", where=where, hint=hint)
    unknown = set(value.get("correction") or ()) - set(asdict(table.correction))
    if unknown:
        raise UsageError(f"holds a wrong entry, correction.{min(unknown)}: there is none", where=where, hint=hint)
    if unknown := set(value.get("fetching") or ()) - set(asdict(table.fetching)):
        raise UsageError(f"holds a wrong entry, fetching.{min(unknown)}: there is none", where=where, hint=hint)
    costs = {"glue_ms": table.glue_ms, **{f"transitions.{shape}": ms for shape, ms in table.transitions}}
    costs |= {f"fetching.{k}": v for k, v in asdict(table.fetching).items() if v is not None}
    for name, ms in costs.items():
        if not (math.isfinite(ms) and ms >= 0):
            raise UsageError(f"holds a wrong entry, {name}: {ms}", where=where, hint=hint)
    for row in table.rows:
        if not (math.isfinite(row.latency_ms) and row.latency_ms >= 0):
            flaw = f"the latency of {row.candidate} in {row.region}: {row.latency_ms} ms"
            raise UsageError(f"holds a wrong entry, {flaw}", where=where, hint=hint)
    return Lut(path, table, device)


def conditions(lut: Lut) -> dict[str, object]:
    """What must be equal for rows of two tables to mean the same."""
    found: dict[str, object] = {f.name: getattr(lut.device, f.name) for f in fields(Device)}
    for name in ("backend", "threads", "batch"):
        found[name] = tuple(sorted({getattr(r, name) for r in lut.table.rows}, key=str))
    own = {r.precision for r in lut.table.rows if untouched(r.candidate, r.precision)}
    return {**found, "pinned": lut.table.pinned, "floats": tuple(sorted(own)), "method": lut.table.method}


def differences(a: Lut, b: Lut) -> list[str]:
    """What the two were measured under, where it differs."""
    here, there = conditions(a), conditions(b)
    return [
        f"{name}: {_show(here[name])} in {a.path}, {_show(there[name])} in {b.path}"
        for name in here
        if to_jsonable(here[name]) != to_jsonable(there[name])
    ]


def regions_of(lut: Lut) -> dict[str, tuple[int, int]]:
    """(multiply-accumulates, parameters) of the teacher's operation in each region: tells one network from another."""
    return {r.region: (r.macs, r.params) for r in lut.table.rows if untouched(r.candidate, r.precision)}


def merge(luts: Sequence[Lut]) -> CostTable:
    """One table of several that were measured alike, on the first one's `_clock`. Of a row that several have, the one
    with the most samples stays (of equals the first).

    UsageError if device, settings or network differ.
    """
    first = luts[0]
    rows = {(r.region, r.candidate, r.precision): r for r in first.table.rows}
    borders, skipped = dict(first.table.transitions), list(first.table.skipped)
    for other in luts[1:]:
        where = f"hantc lut merge {first.path} {other.path}"
        if wrong := differences(first, other):
            raise UsageError(f"measured under other conditions: {'; '.join(wrong)}", where=where, hint=_MEASURE)
        if regions_of(other) != regions_of(first):
            raise UsageError("the tables are of two networks: their regions differ", where=where)
        factor = _clock(first.table, other.table)
        for r in other.table.rows:
            key = (r.region, r.candidate, r.precision)
            if key not in rows or r.samples > rows[key].samples:
                timed = r.latency_ms < UNUSABLE_MS
                rows[key] = replace(r, latency_ms=factor * r.latency_ms, iqr_ms=factor * r.iqr_ms) if timed else r
        borders = {**{shape: factor * ms for shape, ms in other.table.transitions}, **borders}
        skipped += [s for s in other.table.skipped if s not in skipped]
    known = {(region, candidate) for region, candidate, _ in rows}
    left = tuple(s for s in skipped if (s[0], s[1]) not in known)
    return replace(first.table, rows=tuple(rows.values()), transitions=tuple(borders.items()), skipped=left)


def _clock(first: CostTable, other: CostTable) -> float:
    """What brings the other one's rows onto the first one's clock: the teacher's own regions tell how fast the machine
    was, each timed apart as all rows are. The whole teacher tells what others did to the caches as well, which rows do
    not suffer from; it is asked where the tables share none of its regions."""
    here, there = first.by_key(), other.by_key()
    both = [k for k in here if k in there and untouched(*k[1:])]
    own = [k for k in both if max(_ms(here, k), _ms(there, k)) < UNUSABLE_MS]
    mine, theirs = (math.fsum(_ms(rows, k) for k in own) for rows in (here, there))
    return mine / theirs if mine > 0 and theirs > 0 else first.teacher_ms / other.teacher_ms


def _ms(rows: Mapping[tuple[str, str, str], CostRow], key: tuple[str, str, str]) -> float:
    return rows[key].latency_ms


@dataclass(frozen=True)
class Compared:
    """Two tables side by side: (region, candidate, precision, ms in the first, ms in the second on the first one's
    clock) of the rows that both have; how many only one has; what they were measured under, where it differs."""

    rows: tuple[tuple[str, str, str, float, float], ...]
    only: tuple[int, int]
    conditions: tuple[str, ...]
    factor: float  # from the second one's clock to the first one's

    @property
    def median_difference(self) -> float:
        """Median of |second / first - 1| over the rows that both have; NaN without any."""
        found = [abs(b / a - 1) for *_, a, b in self.rows if a > 0]
        return median(found) if found else float("nan")


def compare(a: Lut, b: Lut) -> Compared:
    """Row by row. UsageError if the tables are of two networks."""
    if regions_of(a) != regions_of(b):
        where = f"hantc lut diff {a.path} {b.path}"
        raise UsageError("the tables are of two networks: their regions differ", where=where)
    here, there = a.table.by_key(), b.table.by_key()
    factor = _clock(a.table, b.table)
    both = [key for key in here if key in there]
    rows = tuple((*key, here[key].latency_ms, factor * there[key].latency_ms) for key in both)
    return Compared(rows, (len(here) - len(both), len(there) - len(both)), tuple(differences(a, b)), factor)
