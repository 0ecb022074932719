"""Data sets as the passes see them: three honest splits, normalised batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hantc.core.errors import DataError
from hantc.core.progress import Reporter
from hantc.core.types import TensorSpec, digest
from hantc.data.arrays import read_npz
from hantc.data.augment import Augment
from hantc.data.folders import FolderSource, scan_folder, split_roots
from hantc.data.preprocess import Preprocess
from hantc.data.sources import Loaded, Rows, Source
from hantc.data.splits import VAL_SHARE, complement, draw, mingle, not_in, search_size

__all__ = ["Augment", "Dataset", "Split", "load_dataset"]

# Decoded images of one pool may take this much memory; larger sets are sampled down, with a note.
MAX_POOL_BYTES = 6 << 30
_SEED_VAL, _SEED_SEARCH, _SEED_LIMIT = 1, 2, 3
_ORDER = 2  # of the images in a split; what was trained and scored on another order is not reused


@dataclass(frozen=True, eq=False)
class Split:
    """Some rows of an image array that several splits may share.

    `images`: uint8 (N, H, W, C), fitted and in the network's colour order, or float32 as the network takes
    them; `rows`: this split's rows in it; `y`: int64 class indices of those rows, or None.
    """

    images: NDArray[Any]
    rows: Rows
    y: NDArray[np.int64] | None
    preprocess: Preprocess

    def __len__(self) -> int:
        return len(self.rows)

    def batch(
        self,
        indices: Sequence[int] | NDArray[Any] | torch.Tensor,
        *,
        augment: Augment | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Input (B, …), float32, contiguous, in the model's layout, and int64 labels (B,) if there are any.

        `indices` count within this split. `augment` needs a (CPU) `generator` (ValueError), so that runs
        repeat; float rows that are not images (not three-dimensional) are never augmented.
        """
        if augment is not None and generator is None:
            raise ValueError("augment needs a generator")
        picked = np.asarray(indices, dtype=np.int64)
        y = None if self.y is None else torch.from_numpy(self.y[picked])
        x = torch.from_numpy(self.images[self.rows[picked]])
        is_pixels = self.images.dtype == np.uint8
        if augment is not None and generator is not None and x.ndim == 4:
            x = augment.apply(x, "NHWC" if is_pixels else self.preprocess.layout, generator)
        return (self._normalise(x) if is_pixels else x.contiguous()), y

    def batches(
        self,
        size: int,
        *,
        shuffle_generator: torch.Generator | None = None,
        augment: Augment | None = None,
        drop_last: bool = False,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """One pass over the split in batches of `size`, the last one smaller unless dropped; shuffled when
        given a generator, which also drives `augment`."""
        order = torch.arange(len(self))
        if shuffle_generator is not None:
            order = torch.randperm(len(self), generator=shuffle_generator)
        for indices in torch.split(order, size):
            if drop_last and len(indices) < min(size, len(self)):
                return
            yield self.batch(indices, augment=augment, generator=shuffle_generator)

    def subset(self, indices: Sequence[int] | NDArray[Any]) -> Split:
        """A split of some of these rows; shares the images."""
        picked = np.asarray(indices, dtype=np.int64)
        y = None if self.y is None else self.y[picked]
        return Split(self.images, self.rows[picked], y, self.preprocess)

    def _normalise(self, x: torch.Tensor) -> torch.Tensor:
        """(pixel · scale - mean) / std as one multiply and one add per value."""
        pre = self.preprocess
        nchw = pre.layout == "NCHW"
        shape = (-1, 1, 1) if nchw else (-1,)
        mean, std = (torch.tensor(v, dtype=torch.float64).reshape(shape) for v in (pre.mean, pre.std))
        if nchw:
            x = x.permute(0, 3, 1, 2)
        out = x.to(torch.float32, memory_format=torch.contiguous_format)
        return out.mul_((pre.scale / std).float()).add_((-mean / std).float())


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint splits. No image of `val` is, byte for byte, in `train` or `search`.

    `labelled`: all three have labels (validation alone may have them while this is False). `num_classes`:
    the model's if known, else what the labels show, else None. `fingerprint`: hash of names, sizes and
    times (or array bytes), preprocessing, seed and limit. `notes`: what the user should be told. `more`: further
    images to train on, without labels, none of them in `search` or `val`.
    """

    train: Split
    search: Split
    val: Split
    labelled: bool
    num_classes: int | None
    fingerprint: str
    source: str
    notes: tuple[str, ...] = ()
    more: Split | None = None
    more_stamp: str = ""

    @property
    def training_stamp(self) -> str:
        """Hash of all that training depends on."""
        return digest([self.fingerprint, self.more_stamp]) if self.more is not None else self.fingerprint


def load_dataset(
    data: str,
    val: str | None,
    preprocess: Preprocess,
    input_spec: TensorSpec,
    *,
    seed: int,
    num_classes: int | None,
    limit: int | None = None,
    unlabelled: str | None = None,
    reporter: Reporter,
) -> Dataset:
    """Read what `--data` and `--val` name and split it.

    Validation is `--val`, else the data's own val part, else a fifth of the data. `limit` caps the images
    of train and search together, those of validation, drawn by class, and those of `unlabelled`, which names
    further training images (their labels, if any, are not used). Raises DataError, naming the file, for anything
    that cannot be the model's input.
    """
    train_source, val_source, notes = _open(data, val)
    n = len(train_source)
    train_rows, val_rows = np.arange(n), np.arange(n if val_source is None else len(val_source))
    if val_source is None:
        train_rows, val_rows = _hold_out(train_source, seed)
        notes.append(f"{data}: no validation part, so {len(val_rows)} of the {n} images are kept for validation alone")
        val_source = train_source
    for source in (train_source, val_source):
        _check_labels(source, num_classes)
    notes += _label_notes(train_source, val_source, num_classes)

    def pool(source: Source, rows: Rows, what: str) -> Loaded:
        rows, sampled = _cap(source, rows, limit, preprocess, input_spec, seed)
        notes.extend(f"{source.where}: {what} is a sample of {t}" for t in sampled)
        loaded = source.load(rows, preprocess, input_spec, f"reading {what} images", reporter)
        notes.extend(loaded.notes)
        return loaded

    fitted_val = pool(val_source, val_rows, "validation")
    fitted_train = pool(train_source, train_rows, "training")
    if preprocess.origin == "derived" and fitted_train.images.dtype == np.uint8:
        notes.append(f"no preprocessing given: pixels are scaled by {preprocess.scale:.4g}, without mean and std")
    val_split = Split(fitted_val.images, np.arange(len(fitted_val.rows)), _take(val_source.y, fitted_val), preprocess)
    train, search = _split_train(fitted_train, val_split, train_source, preprocess, seed, notes)
    more, stamp = None, ""
    if unlabelled is not None:
        extra, _, extra_notes = _open_path(unlabelled, "--unlabelled")
        if extra is None:
            raise DataError("has x_val but no x", where=unlabelled, hint="store the training images as x")
        notes += [*extra_notes, *extra.notes]
        loaded, stamp = pool(extra, np.arange(len(extra)), "unlabelled"), extra.stamp
        more = _apart(loaded, (val_split, search), extra, preprocess, seed, notes)
    classes = num_classes if num_classes is not None else _count_classes(train_source, val_source)
    content = {
        "train": train_source.stamp,
        "val": val_source.stamp,
        "preprocess": preprocess.model_dump(mode="json"),
        "seed": seed,
        "limit": limit,
        "order": _ORDER,
    }
    return Dataset(
        train=train,
        search=search,
        val=val_split,
        labelled=train.y is not None and val_split.y is not None,
        num_classes=classes,
        fingerprint=digest(content),
        source=data if val is None else f"{data}, validation {val}",
        notes=tuple(dict.fromkeys(notes)),
        more=more,
        more_stamp=stamp,
    )


def _open(data: str, val: str | None) -> tuple[Source, Source | None, list[str]]:
    """The training source, the validation source if one is named or found, and their notes."""
    train, own_val, notes = _open_path(data, "--data")
    if train is None:
        raise DataError("has x_val but no x", where=data, hint="store the training images as x")
    notes += train.notes
    chosen = own_val
    if val is not None:
        whole, part, val_notes = _open_path(val, "--val")
        chosen = part if part is not None else whole
        notes += val_notes
        if own_val is not None:
            notes.append(f"{own_val.where}: not used, --val {val} is the validation part")
    if isinstance(train, FolderSource) and len(train.classes) == 1:
        notes.append(f"{train.where}: only one class folder ({train.classes[0]}), so the images count as unlabelled")
        train = train.unlabelled()
    if chosen is None:
        return train, None, notes
    if isinstance(chosen, FolderSource):
        if train.classes:
            chosen = chosen.with_classes(train.classes)
        elif len(chosen.classes) == 1:
            chosen = chosen.unlabelled()
    if train.y is not None and chosen.y is None:
        raise DataError(
            f"validation images have no labels, though those of {train.where} do",
            where=chosen.where,
            hint="add y_val, or class folders named as in the training data; or drop the training labels",
        )
    return train, chosen, [*notes, *chosen.notes]


def _open_path(text: str, option: str) -> tuple[Source | None, Source | None, list[str]]:
    """What `text` holds as training and as validation part."""
    if text == "synthetic":
        raise DataError("data-free distillation is not built yet", where=f"{option} synthetic", hint="give real images")
    path = Path(text).expanduser()
    if path.is_dir():
        root, val_root, notes = split_roots(path)
        return scan_folder(root), scan_folder(val_root) if val_root else None, list(notes)
    if not path.exists():
        raise DataError("does not exist", where=f"{option} {text}", hint="name an image folder or an .npz file")
    if path.suffix.lower() != ".npz":
        raise DataError(
            "is neither a folder nor an .npz file", where=f"{option} {text}", hint="unpack archives into a folder first"
        )
    train, val = read_npz(path)
    return train, val, []


def _hold_out(source: Source, seed: int) -> tuple[Rows, Rows]:
    """Training rows and, a fifth of all, validation rows of a source that has no validation part."""
    n = len(source)
    if n < 3:
        raise DataError(f"{n} image(s) cannot be split", where=source.where, hint="give at least 3, better thousands")
    val = draw(n, max(1, round(VAL_SHARE * n)), source.y, np.random.default_rng((seed, _SEED_VAL)))
    return complement(n, val), val


def _check_labels(source: Source, num_classes: int | None) -> None:
    if source.y is None or num_classes is None:
        return
    if source.classes and len(source.classes) > num_classes:
        raise DataError(
            f"has {len(source.classes)} class folders, the model {num_classes} classes",
            where=source.where,
            hint="class index = position of the sorted folder name; remove folders that are not classes",
        )
    if source.y.max() >= num_classes:
        raise DataError(
            f"holds the label {source.y.max()}, the model has {num_classes} classes",
            where=source.where,
            hint=f"labels are 0…{num_classes - 1}, in the model's order",
        )


def _label_notes(train: Source, val: Source, num_classes: int | None) -> Iterator[str]:
    if train.y is None and val.y is not None:
        yield f"{train.where}: training images have no labels; those of validation serve for the reported accuracy"
    if num_classes is not None and train.classes and len(train.classes) < num_classes:
        yield (
            f"{train.where}: {len(train.classes)} class folders for the model's {num_classes} classes; "
            "folder k in sorted order is taken as class k"
        )


def _cap(
    source: Source, rows: Rows, limit: int | None, preprocess: Preprocess, spec: TensorSpec, seed: int
) -> tuple[Rows, list[str]]:
    """At most `limit` rows, and no more than fit into memory."""
    most = max(1, MAX_POOL_BYTES // max(1, source.row_bytes(preprocess, spec)))
    count = min(len(rows), most, limit if limit is not None else len(rows))
    if count == len(rows):
        return rows, []
    why = "to fit into memory" if count == most else "as asked"
    y = None if source.y is None else source.y[rows]
    kept = draw(len(rows), count, y, np.random.default_rng((seed, _SEED_LIMIT)))
    return rows[kept], [f"{count} of {len(rows)} images, {why}"]


def _take(y: NDArray[np.int64] | None, loaded: Loaded) -> NDArray[np.int64] | None:
    return None if y is None else y[loaded.rows]


def _split_train(
    loaded: Loaded, val: Split, source: Source, preprocess: Preprocess, seed: int, notes: list[str]
) -> tuple[Split, Split]:
    """Training and search, without the images that are in validation too."""
    apart = not_in(loaded.images, val.images)
    if repeated := len(loaded.rows) - len(apart):
        notes.append(f"{source.where}: {repeated} image(s) are also in validation and are left out of training")
    if len(apart) < 2:
        raise DataError(
            f"{len(apart)} training image(s) are left"
            + (f" after removing {repeated} that are also in validation" if repeated else ""),
            where=source.where,
            hint="give training images that are not the validation images",
        )
    y = _take(source.y, loaded)
    everything = Split(loaded.images, np.arange(len(loaded.rows)), y, preprocess).subset(apart)
    order = mingle(len(apart), everything.y, np.random.default_rng((seed, _SEED_SEARCH)))
    size = search_size(len(apart))
    return everything.subset(order[size:]), everything.subset(order[:size])


def _apart(
    loaded: Loaded, kept: Sequence[Split], source: Source, preprocess: Preprocess, seed: int, notes: list[str]
) -> Split:
    """All of `loaded` that is in none of the splits `kept`, at random, without labels."""
    apart = np.arange(len(loaded.rows))
    if (loaded.images.dtype, loaded.images.shape[1:]) != (kept[0].images.dtype, kept[0].images.shape[1:]):
        notes.append(f"{source.where}: of another kind than --data, so validation images in it were not found")
    for split in kept:
        apart = np.intersect1d(apart, not_in(loaded.images, split.images[split.rows]))
    if repeated := len(loaded.rows) - len(apart):
        notes.append(f"{source.where}: {repeated} image(s) are also in validation or search and are left out")
    if not len(apart):
        raise DataError("no image is left", where=source.where, hint="give images that are not in --data already")
    order = mingle(len(apart), None, np.random.default_rng((seed, _SEED_SEARCH)))
    return Split(loaded.images, np.arange(len(loaded.rows)), None, preprocess).subset(apart[order])


def _count_classes(*sources: Source) -> int | None:
    counts = [max(len(s.classes), int(s.y.max()) + 1) for s in sources if s.y is not None]
    return max(counts, default=None)
