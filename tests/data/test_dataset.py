""".npz data, batches and the honesty of the splits."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hantc.core.errors import DataError
from hantc.core.progress import Reporter
from hantc.core.types import TensorSpec
from hantc.data import dataset as module
from hantc.data.dataset import Augment, Dataset, Split, load_dataset
from hantc.data.preprocess import Preprocess

SPEC = TensorSpec("input", "float32", ("N", 3, 8, 8))
PRE = Preprocess(resize=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
GREY = TensorSpec("input", "float32", ("N", 1, 8, 8))


def pixels(n: int, *shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, *(shape or (8, 8, 3))), dtype=np.uint8)


def npz(tmp_path: Path, **arrays: Any) -> str:
    path = tmp_path / "d.npz"
    np.savez(path, **arrays)
    return str(path)


def load(path: str, spec: TensorSpec = SPEC, pre: Preprocess = PRE, **kw: Any) -> Dataset:
    kw = {"seed": 0, "num_classes": None, "val": None} | kw
    return load_dataset(path, kw.pop("val"), pre, spec, reporter=Reporter(), **kw)


def rows_of(split: Split) -> set[bytes]:
    return {split.images[r].tobytes() for r in split.rows}


def test_splits_are_disjoint_whole_and_stratified(tmp_path: Path) -> None:
    x, y = pixels(1000), np.arange(1000) % 10
    d = load(npz(tmp_path, x=x, y=y))
    parts = [rows_of(s) for s in (d.train, d.search, d.val)]
    assert [len(p) for p in parts] == [680, 120, 200]
    assert parts[0] | parts[1] | parts[2] == {r.tobytes() for r in x}
    for s in (d.search, d.val):
        assert s.y is not None and len(set(np.bincount(s.y).tolist())) == 1
    table = {r.tobytes(): k for r, k in zip(x, y, strict=True)}
    for s in (d.train, d.search, d.val):
        assert s.y is not None and all(table[s.images[r].tobytes()] == k for r, k in zip(s.rows, s.y, strict=True))


def test_the_first_images_of_a_split_are_of_all_classes(tmp_path: Path) -> None:
    """Scores, ranges and fits look at the first images alone; folders are read class by class."""
    d = load(npz(tmp_path, x=pixels(1000), y=np.repeat(np.arange(10), 100)))
    for split in (d.train, d.search):
        _, y = split.batch(list(range(20)))
        assert y is not None and np.bincount(y.numpy(), minlength=10).tolist() == [2] * 10


def test_given_validation_is_kept_whole_and_in_order(tmp_path: Path) -> None:
    xv = pixels(7, seed=1)
    d = load(npz(tmp_path, x=pixels(50), y=np.zeros((50, 1), int), x_val=xv, y_val=np.arange(7)), num_classes=10)
    assert np.array_equal(d.val.images, xv) and d.labelled and d.num_classes == 10
    assert d.val.y is not None and d.val.y.tolist() == list(range(7))
    assert any("all labels are 0" in n for n in d.notes)


def test_seed_moves_the_splits_and_the_fingerprint(tmp_path: Path) -> None:
    path = npz(tmp_path, x=pixels(100), y=np.arange(100) % 2)
    a, b, c = load(path), load(path), load(path, seed=1)
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert rows_of(a.val) == rows_of(b.val) != rows_of(c.val)
    assert load(path, pre=Preprocess(resize=8)).fingerprint != a.fingerprint


def test_batch_is_normalised_in_both_layouts(tmp_path: Path) -> None:
    path = npz(tmp_path, x=pixels(20), y=np.arange(20) % 4)
    d = load(path)
    x, y = d.train.batch([2, 0])
    raw = d.train.images[d.train.rows[[2, 0]]].astype(np.float64)
    want = (raw / 255 - PRE.mean) / PRE.std
    assert x.shape == (2, 3, 8, 8) and x.dtype == torch.float32 and x.is_contiguous()
    assert np.allclose(x.numpy(), want.transpose(0, 3, 1, 2), atol=1e-5)
    assert (
        y is not None and y.dtype == torch.int64 and d.train.y is not None and y.tolist() == d.train.y[[2, 0]].tolist()
    )
    nhwc = load(path, TensorSpec("input", "float32", ("N", 8, 8, 3)), PRE.model_copy(update={"layout": "NHWC"}))
    got = nhwc.train.batch(torch.tensor([2, 0]))[0]
    assert got.is_contiguous() and np.allclose(got.numpy(), want, atol=1e-5)


def test_batches_cover_the_split_once(tmp_path: Path) -> None:
    d = load(npz(tmp_path, x=pixels(100), y=np.arange(100)))
    sizes, labels = [], []
    for x, y in d.train.batches(9, shuffle_generator=torch.Generator().manual_seed(3)):
        assert y is not None
        sizes.append(len(x))
        labels += y.tolist()
    assert d.train.y is not None and sorted(labels) == sorted(d.train.y.tolist()) != labels
    assert sizes == [9] * 4 + [4]
    assert [len(x) for x, _ in d.train.batches(9, drop_last=True)] == [9] * 4
    assert [len(x) for x, _ in d.train.batches(99, drop_last=True)] == [40]
    again = [y for _, y in d.train.batches(9, shuffle_generator=torch.Generator().manual_seed(3))]
    assert torch.cat([t for t in again if t is not None]).tolist() == labels


def test_augment_needs_a_generator_and_repeats(tmp_path: Path) -> None:
    s = load(npz(tmp_path, x=pixels(20))).train
    with pytest.raises(ValueError, match="generator"):
        s.batch([0], augment=Augment(flip=True))
    a, b = (s.batch(range(5), augment=Augment(2, True), generator=torch.Generator().manual_seed(1))[0] for _ in "ab")
    assert torch.equal(a, b) and not torch.equal(a, s.batch(range(5))[0]) and a.is_contiguous()


def test_subset_shares_the_images(tmp_path: Path) -> None:
    s = load(npz(tmp_path, x=pixels(40), y=np.arange(40))).train
    part = s.subset([3, 1])
    assert part.images is s.images and len(part) == 2
    assert torch.equal(part.batch([0])[0], s.batch([3])[0]) and part.y is not None and s.y is not None
    assert part.y[1] == s.y[1]


def test_uint8_is_resized_and_recoloured(tmp_path: Path) -> None:
    d = load(npz(tmp_path, x=pixels(20, 16, 12, 3)))
    assert d.train.images.shape[1:] == (8, 8, 3)
    bgr = load(npz(tmp_path, x=pixels(20)), pre=PRE.model_copy(update={"color": "BGR"}))
    rgb = load(npz(tmp_path, x=pixels(20)))
    assert np.array_equal(bgr.train.images, rgb.train.images[..., ::-1])


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3), (10, 9)])
def test_grey_models(tmp_path: Path, shape: tuple[int, ...]) -> None:
    d = load(npz(tmp_path, x=pixels(20, *shape)), GREY, Preprocess(color="GRAY", resize=8))
    assert d.train.images.shape[1:] == (8, 8, 1) and d.train.batch([0])[0].shape == (1, 1, 8, 8)


def test_grey_images_for_an_rgb_model(tmp_path: Path) -> None:
    d = load(npz(tmp_path, x=pixels(20, 8, 8)), pre=Preprocess(resize=8))
    assert (d.train.images[..., 0] == d.train.images[..., 2]).all() and d.train.images.shape[3] == 3


def test_float_arrays_are_fed_as_they_are(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(30, 3, 8, 8))
    d = load(npz(tmp_path, x=x))
    got = d.train.batch(range(len(d.train)))[0]
    assert got.dtype == torch.float32 and got.shape[1:] == (3, 8, 8)
    assert {r.tobytes() for r in got.numpy()} <= {r.tobytes() for r in x.astype(np.float32)}
    moved = d.train.batch([0], augment=Augment(2), generator=torch.Generator().manual_seed(0))[0]
    assert moved.shape == (1, 3, 8, 8) and moved.is_contiguous()
    grey = load(npz(tmp_path, x=x[:, 0]), GREY, Preprocess(color="GRAY"))
    assert grey.val.images.shape[1:] == (1, 8, 8)
    vectors = TensorSpec("input", "float32", ("N", 5))
    flat = load(npz(tmp_path, x=x[:, 0, 0, :5]), vectors)
    augmented = flat.train.batch([0], augment=Augment(2, True), generator=torch.Generator())[0]
    assert torch.equal(augmented, flat.train.batch([0])[0])


def test_limit_samples_by_class(tmp_path: Path) -> None:
    d = load(npz(tmp_path, x=pixels(400), y=np.arange(400) % 4), limit=40)
    assert len(d.train) + len(d.search) == 40 and len(d.val) == 40
    assert d.val.y is not None and np.bincount(d.val.y).tolist() == [10] * 4
    assert any("40 of 320 images, as asked" in n for n in d.notes)


def test_memory_cap_samples_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_POOL_BYTES", 8 * 8 * 3 * 50)
    d = load(npz(tmp_path, x=pixels(400)))
    assert len(d.train) + len(d.search) == 50 and any("to fit into memory" in n for n in d.notes)


def test_derived_preprocessing_is_noted(tmp_path: Path) -> None:
    path = npz(tmp_path, x=pixels(10))
    assert any("no preprocessing given" in n for n in load(path, pre=Preprocess(origin="derived")).notes)
    assert not any("no preprocessing given" in n for n in load(path).notes)
    floats = npz(tmp_path, x=np.random.default_rng(0).normal(size=(10, 3, 8, 8)))
    assert not any("no preprocessing given" in n for n in load(floats, pre=Preprocess(origin="derived")).notes)


def test_val_option_takes_the_files_val_part_or_all_of_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=pixels(9, seed=3))
    np.savez(tmp_path / "w.npz", x=pixels(9, seed=3), x_val=pixels(4, seed=4))
    data = npz(tmp_path, x=pixels(20), extra=np.zeros(3))
    assert len(load(data, val=str(tmp_path / "v.npz")).val) == 9
    d = load(data, val=str(tmp_path / "w.npz"))
    assert len(d.val) == 4 and "w.npz" in d.source and any("not used: extra" in n for n in d.notes)


def test_validation_images_leave_training(tmp_path: Path) -> None:
    x = pixels(40)
    d = load(npz(tmp_path, x=x, x_val=x[:5]))
    assert not rows_of(d.val) & (rows_of(d.train) | rows_of(d.search)) and len(d.train) + len(d.search) == 35
    with pytest.raises(DataError, match="also in validation"):
        load(npz(tmp_path, x=x, x_val=x))


NORMAL = np.zeros((9, 3, 8, 8), np.float32)
BAD = NORMAL.copy()
BAD[7, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"images": pixels(9)}, r"no array x \(it holds images"),
        ({"x_val": pixels(9)}, "has x_val but no x"),
        ({"y": np.zeros(9, int)}, "has y but no x"),
        ({"x": pixels(9), "y_val": np.zeros(9, int)}, "has y_val but no x_val"),
        ({"x": pixels(9), "y": np.zeros(8, int)}, r"d\.npz:y: has shape \[8\] for 9 images"),
        ({"x": pixels(9), "y": np.zeros((9, 10), int)}, "has shape"),
        ({"x": pixels(9), "y": np.zeros(9)}, "dtype float64"),
        ({"x": pixels(9), "y": np.full(9, -1)}, "holds the label -1"),
        ({"x": pixels(9), "y": np.arange(9)}, "holds the label 8, the model has 5"),
        ({"x": pixels(9), "y": np.zeros(9, int), "x_val": pixels(3)}, "validation images have no labels"),
        ({"x": pixels(9), "x_val": pixels(3), "y_val": np.full(3, 5)}, "label 5"),
        ({"x": pixels(9, 8, 8, 4)}, "have 4 channels"),
        ({"x": pixels(9, 3, 8, 8)}, "look like NCHW"),
        ({"x": pixels(9, 64)}, "is not images"),
        ({"x": pixels(0)}, "no images"),
        ({"x": np.zeros((9, 8, 8, 3), np.int32)}, "dtype int32"),
        ({"x": NORMAL.transpose(0, 2, 3, 1)}, r"transpose\(0, 3, 1, 2\)"),
        ({"x": NORMAL[:, :, :7]}, "do not fit the model's input"),
        ({"x": NORMAL[:, :1]}, "do not fit the model's input"),
        ({"x": BAD}, "NaN or infinity"),
        ({"x": NORMAL + np.inf}, "row 0 holds NaN"),
        ({"x": NORMAL.astype(np.float64) + 1e300}, "row 0 holds NaN"),
        ({"x": np.array([{}, 1], dtype=object)}, "never unpickles"),
        ({"x": pixels(2)}, "cannot be split"),
    ],
)
def test_bad_arrays(tmp_path: Path, arrays: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text) as e:
        load(npz(tmp_path, **arrays), num_classes=5)
    assert "d.npz" in str(e.value) and e.value.exit_code == 2


def test_images_for_a_vector_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 2 dimensions"):
        load(npz(tmp_path, x=pixels(9)), TensorSpec("input", "float32", ("N", 5)))


def test_images_of_another_size_without_resize(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="image is 9x8, where 8x8 is needed"):
        load(npz(tmp_path, x=pixels(9, 9, 8, 3)), pre=Preprocess())


def damaged(kind: str) -> bytes:
    whole = io.BytesIO()
    np.savez_compressed(whole, x=pixels(50))
    data = whole.getvalue()
    if kind == "cut":
        return data[: len(data) // 2]
    if kind == "flipped":
        middle = len(data) // 2
        return data[:middle] + bytes(b ^ 255 for b in data[middle : middle + 50]) + data[middle + 50 :]
    if kind == "array":
        single = io.BytesIO()
        np.save(single, pixels(5))
        return single.getvalue()
    if kind == "zip":
        other = io.BytesIO()
        with zipfile.ZipFile(other, "w") as z:
            z.writestr("x.npy", b"not an array")
        return other.getvalue()
    return {"empty": b"", "text": b"hello, this is text"}[kind]


@pytest.mark.parametrize("kind", ["cut", "flipped", "array", "zip", "empty", "text"])
def test_damaged_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "d.npz"
    path.write_bytes(damaged(kind))
    with pytest.raises(DataError, match=r"d\.npz"):
        load(str(path))


def test_synthetic_is_not_built_yet() -> None:
    with pytest.raises(DataError, match="not built yet"):
        load("synthetic")


def test_unlabelled_images_are_kept_apart_from_what_judges(tmp_path: Path) -> None:
    x, y = pixels(400), np.arange(400) % 10
    plain = load(npz(tmp_path, x=x, y=y))
    more = np.concatenate([pixels(50, seed=9), x])  # all of --data again, and fifty others
    np.savez(tmp_path / "more.npz", x=more, y=np.zeros(450, np.int64))
    d = load(str(tmp_path / "d.npz"), unlabelled=str(tmp_path / "more.npz"))
    assert plain.more is None and d.more is not None
    assert d.more.y is None
    assert rows_of(d.more) == {r.tobytes() for r in more} - rows_of(d.search) - rows_of(d.val)
    assert any("also in validation or search" in note for note in d.notes)
    assert d.fingerprint == plain.fingerprint == plain.training_stamp, "verifying needs no further images"
    assert d.training_stamp != plain.training_stamp


def test_unlabelled_images_must_be_others(tmp_path: Path) -> None:
    d = load(npz(tmp_path, x=pixels(100)))
    np.savez(tmp_path / "more.npz", x=d.search.images[d.search.rows])
    with pytest.raises(DataError, match="no image is left"):
        load(str(tmp_path / "d.npz"), unlabelled=str(tmp_path / "more.npz"))
    with pytest.raises(DataError, match="--unlabelled nowhere"):
        load(str(tmp_path / "d.npz"), unlabelled="nowhere")
