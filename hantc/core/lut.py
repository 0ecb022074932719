"""Latency tables as files: measured once, read back on the same device, for `--lut`.

One JSON object: the fields of `CostTable`, beside `schema_version` and the `device` in full (the rows hold its
digest alone). `hantc profile` writes such a file, and so does every run, as `lut.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from hantc.core.atomic import to_jsonable, write_json
from hantc.core.errors import UsageError
from hantc.core.types import CostTable, Device, Region, digest, untouched

SCHEMA_VERSION = 1
_MEASURE = "measure here: hantc profile MODEL --target TARGET [--backend B] --lut FILE"


@dataclass(frozen=True)
class Lut:
    """A latency table read from `path`, and the device that it was measured on."""

    path: Path
    table: CostTable
    device: Device

    def check_device(self, device: Device, *, backend: str, threads: int, batch: int) -> None:
        """UsageError, naming each difference, unless the rows hold for this device and these settings."""
        pairs = [(f.name, getattr(self.device, f.name), getattr(device, f.name)) for f in fields(Device)]
        for name, here in (("backend", backend), ("threads", threads), ("batch", batch)):
            pairs += [(name, there, here) for there in sorted({getattr(r, name) for r in self.table.rows}, key=str)]
        # versions are (library, version) pairs; compared as written, since JSON has no tuples
        wrong = [(n, a, b) for n, a, b in pairs if to_jsonable(a) != to_jsonable(b)]
        if not wrong and any(r.device != digest(device) for r in self.table.rows):
            raise UsageError("its rows were measured on several devices", where=f"--lut {self.path}", hint=_MEASURE)
        if wrong:
            text = "; ".join(f"{n} {_show(a)} there, {_show(b)} here" for n, a, b in wrong)
            raise UsageError(f"measured under other conditions: {text}", where=f"--lut {self.path}", hint=_MEASURE)

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
    return Lut(path, table, device)
