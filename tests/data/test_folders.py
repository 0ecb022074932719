"""Image folders: classes, splits, what is ignored, what is unreadable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hantc.core.errors import DataError
from hantc.core.progress import Reporter
from hantc.core.types import TensorSpec
from hantc.data.dataset import Dataset, load_dataset
from hantc.data.folders import scan_folder
from hantc.data.preprocess import Preprocess

SPEC = TensorSpec("input", "float32", ("N", 3, 8, 8))
PRE = Preprocess(resize=8)


def save(folder: Path, count: int, seed: int = 0, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((seed, len(str(folder))))
    for i in range(count):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"i{seed}_{i}{suffix}")


def classes(root: Path, names: str = "ab", count: int = 10, seed: int = 0) -> None:
    for k, name in enumerate(names):
        save(root / name, count, seed + 100 * k)


def load(data: Path, val: Path | None = None, num_classes: int | None = None, spec: TensorSpec = SPEC) -> Dataset:
    pre = PRE if spec is SPEC else Preprocess(color="GRAY" if spec.shape[1] == 1 else "RGB")
    val_text = None if val is None else str(val)
    return load_dataset(str(data), val_text, pre, spec, seed=0, num_classes=num_classes, reporter=Reporter())


def notes(d: Dataset) -> str:
    return "\n".join(d.notes)


def test_class_folders_without_val_are_split(tmp_path: Path) -> None:
    classes(tmp_path, "cba", 20)
    d = load(tmp_path)
    assert (len(d.train), len(d.search), len(d.val)) == (24, 24, 12)
    assert d.labelled and d.num_classes == 3 and "kept for validation" in notes(d)
    for split in (d.train, d.search, d.val):
        assert split.y is not None and len(set(np.bincount(split.y).tolist())) == 1


def test_labels_are_sorted_folder_names_and_pixels_are_the_files(tmp_path: Path) -> None:
    for name, value in (("zebra", 200), ("ant", 50)):
        for i in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (value + i, 0, 0)).save(tmp_path / name / f"{i}.bmp")
    d = load(tmp_path)
    for split in (d.train, d.search, d.val):
        assert split.y is not None
        assert ((split.images[split.rows, 0, 0, 0] >= 200) == (split.y == 1)).all()


def test_train_and_val_folders(tmp_path: Path) -> None:
    classes(tmp_path / "train", "abc")
    classes(tmp_path / "val", "bc", 3, seed=7)
    save(tmp_path / "test" / "a", 1, 9)
    d = load(tmp_path)
    assert len(d.val) == 6 and d.val.y is not None and sorted(set(d.val.y.tolist())) == [1, 2]
    assert len(d.train) + len(d.search) == 30 and "test: not used" in notes(d)


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    classes(tmp_path / "x", "a")
    for name in ("train", "car", "bus"):
        save(tmp_path / "data" / name, 5, len(name))
    assert load(tmp_path / "data").num_classes == 3


def test_val_option_overrides_and_finds_its_val_part(tmp_path: Path) -> None:
    classes(tmp_path / "d" / "train")
    classes(tmp_path / "d" / "val", count=2, seed=5)
    classes(tmp_path / "other" / "val", count=4, seed=6)
    classes(tmp_path / "other" / "train", count=1, seed=8)
    assert len(load(tmp_path / "d").val) == 4
    d = load(tmp_path / "d", tmp_path / "other")
    assert len(d.val) == 8 and "not used, --val" in notes(d)


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    save(tmp_path, 20)
    d = load(tmp_path, num_classes=10)
    assert not d.labelled and d.num_classes == 10 and d.train.batch([0])[1] is None
    assert len(d.train) + len(d.search) + len(d.val) == 20


def test_single_class_folder_is_unlabelled(tmp_path: Path) -> None:
    save(tmp_path / "all" / "deeper", 12)
    d = load(tmp_path)
    assert not d.labelled and "only one class folder (all)" in notes(d)


def test_unlabelled_training_with_labelled_validation(tmp_path: Path) -> None:
    save(tmp_path / "t", 12)
    classes(tmp_path / "v", count=3, seed=4)
    d = load(tmp_path / "t", tmp_path / "v")
    assert not d.labelled and d.train.y is None and d.val.y is not None and "no labels" in notes(d)


def test_labelled_training_needs_labelled_validation(tmp_path: Path) -> None:
    classes(tmp_path / "t")
    save(tmp_path / "v", 5, 3)
    with pytest.raises(DataError, match="validation images have no labels"):
        load(tmp_path / "t", tmp_path / "v")


def test_unknown_validation_class(tmp_path: Path) -> None:
    classes(tmp_path / "train", "ab")
    classes(tmp_path / "val", "ac", 2, seed=5)
    with pytest.raises(DataError, match="class folder 'c' has no counterpart"):
        load(tmp_path)


def test_ignored_files_are_counted(tmp_path: Path) -> None:
    classes(tmp_path)
    (tmp_path / "a" / ".hidden.png").write_bytes(b"")
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"")
    (tmp_path / ".git").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    save(tmp_path, 1, 5)
    d = load(tmp_path)
    assert d.num_classes == 2
    assert "2 hidden or non-image file(s)" in notes(d) and "1 image(s) outside the class folders" in notes(d)


def test_extensions_in_capitals_and_nested_files(tmp_path: Path) -> None:
    save(tmp_path / "a" / "sub", 3, suffix=".PNG")
    save(tmp_path / "b", 3, 1, suffix=".jpeg")
    assert len(scan_folder(tmp_path)) == 6


def test_empty_and_numeric_class_folders_are_noted(tmp_path: Path) -> None:
    for name in ("1", "2", "10"):
        save(tmp_path / name, 4, int(name))
    (tmp_path / "3").mkdir()
    found = scan_folder(tmp_path)
    assert (
        found.classes == ("1", "10", "2", "3")
        and found.y is not None
        and found.y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    )
    text = "\n".join(found.notes)
    assert "sorted as text" in text and "without images: 3" in text


def test_fewer_folders_than_classes_is_noted_and_more_is_an_error(tmp_path: Path) -> None:
    classes(tmp_path, "abc")
    assert "3 class folders for the model's 10" in notes(load(tmp_path, num_classes=10))
    with pytest.raises(DataError, match="has 3 class folders, the model 2"):
        load(tmp_path, num_classes=2)


def test_a_few_unreadable_images_are_left_out(tmp_path: Path) -> None:
    save(tmp_path, 40)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    d = load(tmp_path)
    assert len(d.train) + len(d.search) + len(d.val) == 40
    assert "1 unreadable" in notes(d) and "broken.jpg" in notes(d)


def test_labels_stay_with_their_images_when_some_are_unreadable(tmp_path: Path) -> None:
    for k, name in enumerate("ab"):
        for i in range(30):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (100 * k + i, 0, 0)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "a" / "0.png").write_bytes(b"cut")
    d = load(tmp_path)
    for split in (d.train, d.search, d.val):
        assert split.y is not None
        assert ((split.images[split.rows, 0, 0, 0] >= 100) == (split.y == 1)).all()


def test_many_unreadable_images_are_an_error(tmp_path: Path) -> None:
    save(tmp_path, 10)
    for i in range(5):
        (tmp_path / f"x{i}.png").write_bytes((tmp_path / "i0_0.png").read_bytes()[:60])
    with pytest.raises(DataError, match="images cannot be read"):
        load(tmp_path)


def test_images_of_another_size_name_the_file(tmp_path: Path) -> None:
    save(tmp_path, 12)
    Image.new("RGB", (9, 8)).save(tmp_path / "wide.png")
    open_spec = TensorSpec("input", "float32", ("N", 3, "h", "w"))
    with pytest.raises(DataError, match=r"wide\.png: image is 8x9, where 8x8 is needed"):
        load(tmp_path, spec=open_spec)
    (tmp_path / "wide.png").unlink()
    assert load(tmp_path, spec=open_spec).train.batch([0, 1])[0].shape == (2, 3, 8, 8)


def test_wrong_channel_count_and_grey_model(tmp_path: Path) -> None:
    save(tmp_path, 6)
    with pytest.raises(DataError, match="takes 4"):
        load(tmp_path, spec=TensorSpec("input", "float32", ("N", 4, 8, 8)))
    grey = load(tmp_path, spec=TensorSpec("input", "float32", ("N", 1, 8, 8)))
    assert grey.train.batch([0])[0].shape == (1, 1, 8, 8)


def test_images_in_both_parts_leave_training(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    classes(tmp_path / "val", count=2, seed=5)
    copied = (tmp_path / "val" / "a" / "i5_0.png").read_bytes()
    (tmp_path / "train" / "a" / "copy.png").write_bytes(copied)
    d = load(tmp_path)
    assert len(d.train) + len(d.search) == 20 and "1 image(s) are also in validation" in notes(d)
    with pytest.raises(DataError, match="after removing 21"):
        load(tmp_path / "train", tmp_path / "train")


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data .*nowhere: does not exist"):
        load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="no images found"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"neither a folder nor an \.npz"):
        load(tmp_path / "notes.txt")
    save(tmp_path / "d", 9)
    with pytest.raises(DataError, match=r"--val .*gone: does not exist"):
        load(tmp_path / "d", tmp_path / "gone")
    save(tmp_path / "only" / "val", 3)
    with pytest.raises(DataError, match="has val/ but no train/"):
        load(tmp_path / "only")
    save(tmp_path / "two", 2)
    with pytest.raises(DataError, match=r"2 image\(s\) cannot be split"):
        load(tmp_path / "two")


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    classes(tmp_path)
    first = load(tmp_path).fingerprint
    assert load(tmp_path).fingerprint == first
    save(tmp_path / "a", 1, 9)
    assert load(tmp_path).fingerprint != first
