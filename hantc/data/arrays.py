""".npz files: `x`, optional `y`, `x_val`, `y_val`. Never unpickles."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hantc.core.errors import DataError
from hantc.core.progress import Reporter
from hantc.core.types import TensorSpec
from hantc.data.images import Plan, fit_array, in_threads
from hantc.data.preprocess import Preprocess
from hantc.data.sources import Loaded, Rows

_KEYS = ("x", "y", "x_val", "y_val")
_SCAN_ROWS = 1024  # rows looked at in one go for NaN and infinity


@dataclass(frozen=True)
class ArraySource:
    """Rows of one array: uint8 images (N, H, W, C) or (N, H, W), or float arrays fed as they are."""

    where: str
    x: NDArray[Any]
    y: NDArray[np.int64] | None
    stamp: str
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def row_bytes(self, preprocess: Preprocess, spec: TensorSpec) -> int:
        """Bytes of one row as it will be held."""
        if self.x.dtype != np.uint8:
            return math.prod(self.x.shape[1:]) * 4
        plan = self._plan(preprocess, spec)
        return math.prod(d or 0 for d in plan.size) * plan.channels

    def load(self, rows: Rows, preprocess: Preprocess, spec: TensorSpec, title: str, reporter: Reporter) -> Loaded:
        """Fit uint8 images; check float arrays against the model's input and take them as float32."""
        x = self.x if np.array_equal(rows, np.arange(len(self.x))) else self.x[rows]
        if x.dtype != np.uint8:
            return Loaded(_as_input(x, spec, self.where), rows)
        plan = self._plan(preprocess, spec)
        pixels = x[:, :, :, None] if x.ndim == 3 else x
        untouched = pixels.shape[3] == plan.channels and preprocess.crop is None
        if untouched and pixels.shape[1:3] == plan.size:
            bgr = plan.channels == 3 and preprocess.color == "BGR"
            return Loaded(np.ascontiguousarray(pixels[..., ::-1] if bgr else pixels), rows)
        h, w = plan.size
        out = np.empty((len(pixels), h or 0, w or 0, plan.channels), np.uint8)

        def work(i: int) -> None:
            out[i] = fit_array(pixels[i], plan, f"{self.where}[{rows[i]}]")

        in_threads(len(pixels), work, title, reporter)
        return Loaded(out, rows)

    def _plan(self, preprocess: Preprocess, spec: TensorSpec) -> Plan:
        """The plan for uint8 images; DataError when their shape cannot be images for this model."""
        plan = Plan.of(preprocess, spec, self.where)
        shape = self.x.shape
        if len(shape) == 4 and shape[3] not in (1, 3, plan.channels) and shape[1] in (1, 3, plan.channels):
            raise DataError(
                f"uint8 images of shape {_dims(shape)} look like NCHW",
                where=self.where,
                hint="store them as NHWC: x.transpose(0, 2, 3, 1)",
            )
        channels = 1 if len(shape) == 3 else shape[3] if len(shape) == 4 else None
        if channels is None:
            raise DataError(
                f"uint8 array of shape {_dims(shape)} is not images", where=self.where, hint="(N, H, W, C) or (N, H, W)"
            )
        if channels != plan.channels and not (channels in (1, 3) and plan.channels in (1, 3)):
            raise DataError(
                f"images have {channels} channels, the model's input {spec.name} takes {plan.channels}",
                where=self.where,
                hint="grey and RGB are converted into each other, other channel counts must match",
            )
        return plan.with_size((shape[1], shape[2]))


def read_npz(path: Path) -> tuple[ArraySource | None, ArraySource | None]:
    """The sources of (x, y) and (x_val, y_val), None where the file has no such x. DataError on a bad file."""
    arrays, unknown = _read(path)
    train = _source(path, "x", arrays.get("x"), arrays.get("y"), unknown)
    val = _source(path, "x_val", arrays.get("x_val"), arrays.get("y_val"), ())
    for x, y in (("x", "y"), ("x_val", "y_val")):
        if y in arrays and x not in arrays:
            raise DataError(f"has {y} but no {x}", where=str(path), hint=f"store the images as {x}")
    if train is None and val is None:
        keys = ", ".join(unknown) or "nothing"
        raise DataError(f"has no array x (it holds {keys})", where=str(path), hint="np.savez(path, x=images, y=labels)")
    return train, val


def _read(path: Path) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    """The arrays that hantc knows, and the names of the others."""
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise DataError("is a single array, not an .npz", where=str(path), hint="np.savez(path, x=images)")
        with opened as archive:
            arrays = {k: archive[k] for k in _KEYS if k in archive.files}
            names = tuple(k for k in archive.files if k not in _KEYS)
        # numpy hands out members that are not arrays as bytes
        if wrong := [k for k, v in arrays.items() if not isinstance(v, np.ndarray)]:
            raise DataError(f"{wrong[0]} is not an array", where=str(path), hint="write the file with np.savez")
        return arrays, names
    except MemoryError as e:
        raise DataError("is larger than the memory", where=str(path), hint="store fewer images") from e
    except ValueError as e:
        if "pickle" in str(e):
            raise DataError(
                "holds Python objects, or is not an .npz; hantc never unpickles",
                where=str(path),
                hint="store plain uint8 or float arrays of one shape with np.savez",
            ) from e
        raise DataError(f"is damaged ({e})", where=str(path), hint="write the file again") from e
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, NotImplementedError, SyntaxError) as e:
        raise DataError(f"is not a readable .npz ({e})", where=str(path), hint="is the file complete?") from e


def _source(
    path: Path, name: str, x: NDArray[Any] | None, y: NDArray[Any] | None, unknown: tuple[str, ...]
) -> ArraySource | None:
    if x is None:
        return None
    where = f"{path}:{name}"
    if x.ndim < 2 or len(x) == 0:
        raise DataError(f"has shape {_dims(x.shape)}, which is no images", where=where, hint="(N, H, W, C), N > 0")
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise DataError(f"has dtype {x.dtype}", where=where, hint="store uint8 images, or float arrays fed as they are")
    labels = None if y is None else _labels(y, len(x), f"{path}:{name.replace('x', 'y')}", name)
    notes = []
    if unknown:
        notes.append(f"{path}: array(s) not used: {', '.join(unknown)}")
    if labels is not None and len(np.unique(labels)) == 1:
        notes.append(f"{where}: all labels are {labels[0]}")
    h = hashlib.sha256(f"{x.dtype}{x.shape}".encode())
    h.update(np.ascontiguousarray(x).data.cast("B"))
    if labels is not None:
        h.update(labels.data.cast("B"))
    return ArraySource(where, x, labels, h.hexdigest()[:32], tuple(notes))


def _labels(y: NDArray[Any], count: int, where: str, x_name: str) -> NDArray[np.int64]:
    """Class indices (N,) from (N,) or (N, 1) integers."""
    if y.shape not in ((count,), (count, 1)):
        hint = f"one class index per image of {x_name}"
        raise DataError(f"has shape {_dims(y.shape)} for {count} images", where=where, hint=hint)
    if y.dtype.kind not in "iub":
        raise DataError(
            f"has dtype {y.dtype}", where=where, hint="labels are integer class indices; leave y out for other tasks"
        )
    labels = np.ascontiguousarray(y.reshape(count), dtype=np.int64)
    if labels.min() < 0:
        raise DataError(f"holds the label {labels.min()}", where=where, hint="class indices start at 0")
    return labels


def _as_input(x: NDArray[Any], spec: TensorSpec, where: str) -> NDArray[np.float32]:
    """Float rows as float32 in the model's shape. DataError on another shape, NaN or infinity."""
    want = spec.shape[1:]
    got = x.shape[1:]
    if not _matches(got, want) and len(got) == 2 and len(want) == 3:
        # Grey images without a channel dim: put it where the model has it.
        if want[0] == 1:
            x = x[:, None]
        elif want[2] == 1:
            x = x[..., None]
        got = x.shape[1:]
    if not _matches(got, want):
        raise DataError(
            f"float rows of shape {_dims(got)} do not fit the model's input {spec.name} {_dims(want)}",
            where=where,
            hint=_shape_hint(got, want),
        )
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(x, dtype=np.float32)
    for start in range(0, len(out), _SCAN_ROWS):
        finite = np.isfinite(out[start : start + _SCAN_ROWS]).reshape(len(out[start : start + _SCAN_ROWS]), -1).all(1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise DataError(f"row {row} holds NaN or infinity", where=where, hint="clean the array before storing it")
    return out


def _matches(got: tuple[int, ...], want: tuple[int | str | None, ...]) -> bool:
    return len(got) == len(want) and all(not isinstance(w, int) or w == g for g, w in zip(got, want, strict=True))


def _shape_hint(got: tuple[int, ...], want: tuple[int | str | None, ...]) -> str:
    if len(got) == 3 and len(want) == 3:
        if _matches((got[2], got[0], got[1]), want):
            return "the rows are HWC, the model takes CHW: x.transpose(0, 3, 1, 2)"
        if _matches((got[1], got[2], got[0]), want):
            return "the rows are CHW, the model takes HWC: x.transpose(0, 2, 3, 1)"
    return "float arrays are fed as they are; store uint8 images to have them resized"


def _dims(shape: tuple[int | str | None, ...]) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"
