"""Image folders: one folder per class, optionally under train/ and val/, or images alone (unlabelled)."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hantc.core.errors import DataError
from hantc.core.progress import Reporter
from hantc.core.types import TensorSpec
from hantc.data.images import EXTENSIONS, Plan, in_threads, open_image
from hantc.data.preprocess import Preprocess, Size
from hantc.data.sources import Loaded, Rows

_MAX_UNREADABLE = 0.1
_SPLIT_NAMES = frozenset({"train", "val", "valid", "validation", "test"})


@dataclass(frozen=True)
class FolderSource:
    """The images below `where`, sorted by path; class index = position of the sorted class folder's name."""

    where: str
    paths: tuple[str, ...]
    y: NDArray[np.int64] | None
    classes: tuple[str, ...]
    stamp: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def unlabelled(self) -> FolderSource:
        """The same images without labels."""
        return replace(self, y=None, classes=())

    def with_classes(self, classes: tuple[str, ...]) -> FolderSource:
        """The same images with labels by `classes`, so that training and validation agree.

        Raises DataError for a class folder that is not among them."""
        if self.y is None:
            return self
        present = sorted(set(self.y.tolist()))
        if missing := [self.classes[k] for k in present if self.classes[k] not in classes]:
            raise DataError(
                f"class folder {missing[0]!r} has no counterpart among the training classes",
                where=self.where,
                hint="use the same class folder names for training and validation",
            )
        table = np.array([classes.index(c) if c in classes else -1 for c in self.classes], np.int64)
        return replace(self, y=table[self.y], classes=classes)

    def row_bytes(self, preprocess: Preprocess, spec: TensorSpec) -> int:
        """Bytes of one fitted image (from the first readable one where only the images know their size)."""
        plan = _plan(self, preprocess, spec)
        return math.prod(d or 0 for d in plan.size) * plan.channels

    def load(self, rows: Rows, preprocess: Preprocess, spec: TensorSpec, title: str, reporter: Reporter) -> Loaded:
        """Decode `rows` on threads. Unreadable images are left out with a note; more than a tenth is a DataError."""
        plan = _plan(self, preprocess, spec)
        h, w = plan.size
        images = np.empty((len(rows), h or 0, w or 0, plan.channels), np.uint8)
        failed: dict[int, str] = {}

        def work(i: int) -> None:
            try:
                images[i] = open_image(self.paths[rows[i]], plan)
            except DataError:
                raise
            except Exception as e:  # a decoder given a corrupt file may raise anything at all
                failed[i] = str(e) or type(e).__name__

        in_threads(len(rows), work, title, reporter)
        if not failed:
            return Loaded(images, rows)
        first = min(failed)
        detail = f"first: {self.paths[rows[first]]}, {failed[first]}"
        if len(failed) > _MAX_UNREADABLE * len(rows):
            raise DataError(
                f"{len(failed)} of {len(rows)} images cannot be read ({detail})",
                where=self.where,
                hint="remove or repair them: hantc leaves out unreadable images only up to a tenth",
            )
        kept = np.array([i for i in range(len(rows)) if i not in failed], np.int64)
        note = f"{self.where}: {len(failed)} unreadable image(s) left out ({detail})"
        return Loaded(images[kept], rows[kept], (note,))


@dataclass
class _Found:
    """What one walk over a folder saw."""

    files: list[tuple[str, int, int]] = field(default_factory=list)  # path, bytes, mtime in ns
    hidden: int = 0
    other: int = 0


def split_roots(root: Path) -> tuple[Path, Path | None, tuple[str, ...]]:
    """The training root, the validation root if `root` has one, and notes.

    `train/` and `val/` are splits only where nothing but splits lies beside them: a data set may well have a
    class called "train"."""
    names = set(_subfolders(root))
    if not names or not names <= _SPLIT_NAMES or not names & {"train", "val"}:
        return root, None, ()
    if "train" not in names:
        raise DataError(
            "has val/ but no train/", where=str(root), hint="name the folder of images itself, or add train/"
        )
    notes = tuple(f"{root / n}: not used (only train/ and val/ are)" for n in sorted(names - {"train", "val"}))
    return root / "train", root / "val" if "val" in names else None, notes


def scan_folder(root: Path) -> FolderSource:
    """List the images below `root`. DataError when there are none."""
    found = _Found()
    class_dirs = _subfolders(root)
    per_class: list[list[tuple[str, int, int]]] = []
    for name in class_dirs:
        before = len(found.files)
        _walk(root / name, found)
        per_class.append(sorted(found.files[before:]))
    loose = _Found()
    _collect(root, loose)
    notes: list[str] = []
    files, y = sorted(loose.files), None
    classes: tuple[str, ...] = ()
    if any(per_class):
        files, classes = [f for group in per_class for f in group], tuple(class_dirs)
        y = np.repeat(np.arange(len(class_dirs)), [len(g) for g in per_class]).astype(np.int64)
        if loose.files:
            notes.append(f"{root}: {len(loose.files)} image(s) outside the class folders are ignored")
    if not files:
        raise DataError(
            "no images found" + (f" ({loose.other + found.other} other files)" if loose.other + found.other else ""),
            where=str(root),
            hint=f"images end in {' '.join(sorted(EXTENSIONS))}",
        )
    if ignored := found.hidden + found.other + loose.hidden + loose.other:
        notes.append(f"{root}: {ignored} hidden or non-image file(s) are ignored")
    notes += _class_notes(root, classes, [len(g) for g in per_class])
    return FolderSource(str(root), tuple(f[0] for f in files), y, classes, _stamp(root, files), tuple(notes))


def _class_notes(root: Path, classes: tuple[str, ...], sizes: list[int]) -> Iterator[str]:
    if empty := [c for c, n in zip(classes, sizes, strict=True) if n == 0]:
        yield f"{root}: class folder(s) without images: {', '.join(empty[:5])}; they still count as classes"
    if all(c.isdecimal() for c in classes) and sorted(classes, key=int) != list(classes):
        yield (
            f"{root}: class folders are numbers and are sorted as text ({', '.join(classes[:3])}, …); "
            "pad them with zeros if the model counts them as numbers"
        )


def _subfolders(root: Path) -> list[str]:
    """Names of the folders (also linked ones) directly in `root`, sorted."""
    try:
        return sorted(e.name for e in root.iterdir() if not _ignored(e.name) and e.is_dir())
    except OSError as e:
        raise DataError(f"cannot be listed ({e.strerror})", where=str(root)) from e


def _ignored(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _walk(folder: Path, found: _Found) -> None:
    """Collect `folder` and, without following links, all below it."""
    for below in _collect(folder, found):
        _walk(below, found)


def _collect(folder: Path, found: _Found) -> list[Path]:
    """Collect the files directly in `folder`; returns its folders."""
    folders = []
    try:
        with os.scandir(folder) as entries:
            for e in entries:
                if e.is_dir(follow_symlinks=False):
                    if not _ignored(e.name):
                        folders.append(Path(e.path))
                elif _ignored(e.name):
                    found.hidden += 1
                elif os.path.splitext(e.name)[1].lower() in EXTENSIONS and e.is_file():
                    status = e.stat()
                    found.files.append((e.path, status.st_size, status.st_mtime_ns))
                else:
                    found.other += 1
    except OSError as e:
        raise DataError(f"cannot be listed ({e.strerror})", where=str(folder)) from e
    return sorted(folders)


def _stamp(root: Path, files: list[tuple[str, int, int]]) -> str:
    h = hashlib.sha256()
    for path, size, mtime in files:
        h.update(f"{os.path.relpath(path, root)}\0{size}\0{mtime}\n".encode(errors="surrogateescape"))
    return h.hexdigest()[:32]


def _plan(source: FolderSource, preprocess: Preprocess, spec: TensorSpec) -> Plan:
    plan = Plan.of(preprocess, spec, source.where)
    if plan.channels not in (1, 3):
        raise DataError(
            f"image files have 1 or 3 channels, the model's input {spec.name} takes {plan.channels}",
            where=source.where,
            hint="give an .npz whose array x has that many channels",
        )
    return plan if None not in plan.size else plan.with_size(_first_size(source))


def _first_size(source: FolderSource) -> Size:
    """The size of the first readable image: only the header is read."""
    for path in source.paths:
        try:
            with Image.open(path) as image:
                return image.size[1], image.size[0]
        except Exception:  # unreadable images are counted when they are loaded
            continue
    raise DataError("not one image can be read", where=source.where, hint="are these really image files?")
