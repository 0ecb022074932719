"""Atomic file writes: a reader sees the old file or the new one, never a half-written one.

The data goes to a temporary file in the same folder, which then replaces the target (`os.replace`). A
process killed in between leaves a `.<hex>.tmp` file behind and the target untouched. There is no fsync:
the files are reproducible, and thousands of small rows must be quick; a power cut may cost the newest ones.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from hantc.core.errors import UsageError

TMP_SUFFIX = ".tmp"


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically, creating its folder. UsageError if that is not possible."""
    tmp = path.parent / f".{uuid.uuid4().hex}{TMP_SUFFIX}"
    try:
        try:
            _write_new(tmp, data)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_new(tmp, data)
        os.replace(tmp, path)
    except OSError as e:
        raise UsageError(
            f"cannot write: {e.strerror or e}", where=str(path), hint="check the folder's permissions and free space"
        ) from e
    finally:  # also when interrupted; after os.replace there is nothing left to remove
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically. UsageError if that is not possible."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as strict JSON to `path` atomically.

    Dataclasses, paths and numpy scalars and arrays are accepted; NaN and infinities become null, since JSON
    has neither. TypeError for anything else that JSON does not know; UsageError if the file cannot be written.
    """
    text = json.dumps(to_jsonable(value), indent=indent, allow_nan=False, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode("utf-8"))


def to_jsonable(value: Any) -> Any:
    """`value` made of dict, list, str, int, finite float, bool and None. TypeError if it cannot be."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [to_jsonable(v) for v in items]
    if is_dataclass(value) and not isinstance(value, type):
        return to_jsonable(asdict(value))
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy arrays and scalars, without importing numpy here
        return to_jsonable(value.tolist())
    raise TypeError(f"{type(value).__name__} is not JSON: {value!r}")


def _write_new(path: Path, data: bytes) -> None:
    # not tempfile.mkstemp: its mode 0600 would hide shared files from other users
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(fd, "wb") as f:
        f.write(data)
