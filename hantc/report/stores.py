"""The store as tables, for `hantc store`."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from hantc.core.errors import UsageError
from hantc.core.store import Entry, Store

KINDS = {
    "cost": "latencies of candidates",
    "network": "latencies of whole networks",
    "border": "costs of quantising at borders",
    "weights": "trained candidates",
    "verdict": "candidates, or one of their precisions, found pointless, or broken in training",
    "score": "scores of candidates",
    "plan": "selections",
    "redistilled": "students with fitted regions",
    "finetuned": "fine-tuned students",
    "history": "courses of fine-tuning",
    "verify": "figures of finished files",
    "partial": "training in progress",
}


def parse_age(text: str) -> float:
    """`30d`, `12h` → seconds. UsageError otherwise."""
    m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([dh])\s*", text)
    if not m:
        raise UsageError(f"--unused-for {text!r} is not an age", hint="write 30d or 12h")
    return float(m.group(1)) * (86400 if m.group(2) == "d" else 3600)


def store_data(store: Store, entries: Sequence[Entry] | None = None) -> dict[str, Any]:
    """Entries (by default all) summed by kind: count, bytes, and seconds since the oldest one was used."""
    entries = store.ls() if entries is None else entries
    now = time.time()
    kinds = {}
    for kind in sorted({e.kind for e in entries}):
        own = [e for e in entries if e.kind == kind]
        kinds[kind] = {
            "what": KINDS.get(kind, ""),
            "entries": len(own),
            "size_bytes": sum(e.size_bytes for e in own),
            "unused_s": max(0.0, now - min(e.used_at for e in own)),
        }
    size = sum(e.size_bytes for e in entries)
    return {"store": str(store.root), "entries": len(entries), "size_bytes": size, "kinds": kinds}


def store_table(data: dict[str, Any], title: str) -> Table:
    """`store_data` for the terminal."""
    table = Table(title=Text(f"{title}: {data['entries']} entries, {_size(data['size_bytes'])}"))
    for column in ("kind", "what"):
        table.add_column(column)
    for column in ("entries", "size", "oldest use"):
        table.add_column(column, justify="right")
    for kind, row in data["kinds"].items():
        days = row["unused_s"] / 86400
        age = f"{days:.0f} d ago" if days >= 1 else f"{24 * days:.0f} h ago"
        table.add_row(*map(Text, (kind, row["what"], str(row["entries"]), _size(row["size_bytes"]), age)))
    return table


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return ""
