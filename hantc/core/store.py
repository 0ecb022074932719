"""The content-addressed store, shared between runs and processes.

`root/<kind>/<first two digits>/<key><suffix>`: one file per entry, sharded so that folders stay small.
Every write is atomic (see `hantc.core.atomic`), so a process killed at any time leaves every entry readable,
and two processes that write the same key both write the same content. Entries are replaced whole, and only
training in progress (`partial`) is replaced by anything else.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from hantc.core.atomic import TMP_SUFFIX, write_bytes
from hantc.core.errors import HantcError, UsageError

Tensors = dict[str, np.ndarray[Any, Any]]

_KIND = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_KEY = re.compile(r"[0-9a-f]{4,128}")
_SUFFIXES = frozenset({".json", ".safetensors", ".bin"})
_STALE_S = 24 * 3600.0  # a temporary file this old belongs to a process that died


@dataclass(frozen=True)
class Entry:
    """One stored file. `format` is json, safetensors or bin."""

    kind: str
    key: str
    format: str
    size_bytes: int
    used_at: float  # seconds since the epoch: when it was last written or read


class Store:
    """Maps (kind, hex key) to JSON values, tensors or bytes. The three formats do not share keys' values."""

    def __init__(self, root: Path) -> None:
        """Open or create the store at `root`. UsageError if it cannot be created or written."""
        self.root = Path(root).expanduser()
        probe = self.root / f".probe-{time.time_ns():x}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.touch(exist_ok=False)
            probe.unlink()
        except OSError as e:
            raise UsageError(
                f"the store cannot be written: {e.strerror or e}",
                where=str(self.root),
                hint="name a writable folder for the store",
            ) from e

    # ---- JSON ----

    def get_json(self, kind: str, key: str) -> Any | None:
        """The value, or None if it is absent or corrupt (a corrupt file is removed)."""
        path = self._path(kind, key, ".json")
        data = _read(path)
        if data is None:
            return None
        try:
            return json.loads(data)
        except ValueError:
            _discard(path)
            return None

    def put_json(self, kind: str, key: str, value: Any) -> None:
        """Store a JSON-able value. TypeError if it is not one."""
        text = json.dumps(value, separators=(",", ":"), default=_plain)
        write_bytes(self._path(kind, key, ".json"), text.encode())

    def get_many(self, kind: str, keys: Iterable[str]) -> dict[str, Any]:
        """The JSON values that are there, by key."""
        found = ((key, self.get_json(kind, key)) for key in dict.fromkeys(keys))
        return {key: value for key, value in found if value is not None}

    def put_many(self, kind: str, values: Mapping[str, Any]) -> None:
        """Store many JSON values. Each write is atomic, the whole is not."""
        for key, value in values.items():
            self.put_json(kind, key, value)

    # ---- tensors ----

    def get_tensors(self, kind: str, key: str) -> Tensors | None:
        """The tensors by name, or None if they are absent or corrupt (a corrupt file is removed)."""
        path = self._path(kind, key, ".safetensors")
        data = _read(path)
        if data is None:
            return None
        try:
            return dict(load_safetensors(data))
        except (SafetensorError, ValueError, KeyError):
            _discard(path)
            return None

    def get_meta(self, kind: str, key: str) -> dict[str, str] | None:
        """What `put_tensors` was given as `meta`; None if the entry is absent or corrupt."""
        data = _read(self._path(kind, key, ".safetensors"))
        if data is None:
            return None
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            return dict(header.get("__metadata__", {}))
        except (ValueError, AttributeError):
            return None

    def put_tensors(
        self, kind: str, key: str, tensors: Mapping[str, np.ndarray[Any, Any]], meta: Mapping[str, str] | None = None
    ) -> None:
        """Store named arrays of any numeric dtype, with optional text metadata."""
        # safetensors writes the buffer as it lies in memory, so the arrays must be C-contiguous
        plain = {name: np.asarray(array, order="C") for name, array in tensors.items()}
        write_bytes(self._path(kind, key, ".safetensors"), save_safetensors(plain, metadata=dict(meta or {})))

    # ---- bytes ----

    def get_bytes(self, kind: str, key: str) -> bytes | None:
        """The bytes, or None if they are absent."""
        return _read(self._path(kind, key, ".bin"))

    def put_bytes(self, kind: str, key: str, data: bytes) -> None:
        """Store bytes."""
        write_bytes(self._path(kind, key, ".bin"), data)

    # ---- the whole ----

    def ls(self, kind: str | None = None) -> list[Entry]:
        """All entries (of one kind), sorted. Also clears away what processes killed long ago left behind."""
        top = self.root / _checked(_KIND, kind, "kind") if kind is not None else self.root
        entries = []
        for path in sorted(top.rglob("*")):
            try:
                if not path.is_file():
                    continue
                stat = path.stat()
            except FileNotFoundError:  # another process replaced or removed it
                continue
            if path.name.startswith("."):
                if path.suffix == TMP_SUFFIX and time.time() - stat.st_mtime > _STALE_S:
                    path.unlink(missing_ok=True)
                continue
            if not self._is_entry(path):
                continue  # somebody's own file: none of ours to list or to remove
            entries.append(
                Entry(path.parent.parent.name, path.stem, path.suffix.lstrip("."), stat.st_size, stat.st_mtime)
            )
        return entries

    def gc(self, *, max_bytes: int | None = None, max_age_s: float | None = None, dry_run: bool = False) -> list[Entry]:
        """Remove the entries that nothing has read or written for `max_age_s`, then the longest unused ones until
        the rest fits in `max_bytes`; returns them, oldest first. With `dry_run` nothing is removed. Safe beside
        running compilations: what they miss is made again."""
        entries = sorted(self.ls(), key=lambda e: (e.used_at, e.kind, e.key))
        now, total = time.time(), sum(e.size_bytes for e in entries)
        removed = []
        for e in entries:
            too_old = max_age_s is not None and now - e.used_at > max_age_s
            too_much = max_bytes is not None and total > max_bytes
            if not (too_old or too_much):
                break  # the others were used later
            total -= e.size_bytes
            removed.append(e)
            if not dry_run:
                self.remove(e.kind, e.key, f".{e.format}")
        return removed

    def remove(self, kind: str, key: str, suffix: str) -> None:
        """Remove one entry, if it is there. UsageError if it cannot be removed."""
        path = self._path(kind, key, suffix)
        try:
            path.unlink(missing_ok=True)
        except OSError as e:
            raise UsageError(f"the store's entry cannot be removed: {e.strerror or e}", where=str(path)) from e

    def _is_entry(self, path: Path) -> bool:
        parts = path.relative_to(self.root).parts
        return (
            len(parts) == 3
            and bool(_KIND.fullmatch(parts[0]) and _KEY.fullmatch(path.stem))
            and parts[1] == path.stem[:2]
            and path.suffix in _SUFFIXES
        )

    def size_bytes(self) -> int:
        """Bytes that all entries take."""
        return sum(e.size_bytes for e in self.ls())

    def _path(self, kind: str, key: str, suffix: str) -> Path:
        _checked(_KEY, key, "key")
        return self.root / _checked(_KIND, kind, "kind") / key[:2] / f"{key}{suffix}"


def _checked(pattern: re.Pattern[str], text: str, what: str) -> str:
    if not pattern.fullmatch(text):
        raise HantcError(f"{text!r} is not a store {what}", hint="keys are lower-case hex digests")
    return text


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
        with suppress(OSError):  # a store that can only be read
            os.utime(path)  # entries are evicted by last use; access times are mostly switched off
        return data
    except FileNotFoundError:
        return None
    except OSError as e:
        raise UsageError(f"the store cannot be read: {e.strerror or e}", where=str(path)) from e


def _discard(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # read-only store: the entry counts as absent all the same


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
