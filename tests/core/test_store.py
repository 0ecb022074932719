"""The store: round trips, corruption, atomicity under SIGKILL, sharing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hantc.core.atomic import TMP_SUFFIX, write_json, write_text
from hantc.core.errors import HantcError, UsageError
from hantc.core.store import Store
from hantc.core.types import Timing, digest

KEY = digest("a")


def test_json_round_trip_and_absent(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    assert store.get_json("cost", KEY) is None
    store.put_json("cost", KEY, {"ms": np.float32(0.5), "shape": [1, 2], "n": np.int64(3)})
    assert Store(tmp_path / "s").get_json("cost", KEY) == {"ms": 0.5, "shape": [1, 2], "n": 3}
    assert store.get_json("score", KEY) is None


def test_corrupt_json_is_none_and_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_json("cost", KEY, [1, 2, 3])
    (file,) = tmp_path.rglob("*.json")
    file.write_bytes(b'{"half": ')
    assert store.get_json("cost", KEY) is None
    assert not file.exists()


def test_tensors_round_trip(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "w": np.arange(12, dtype=np.float32).reshape(3, 4).T,  # not contiguous
        "n": np.array(7, dtype=np.int64),
        "h": np.ones((2, 0), dtype=np.float16),
    }
    store.put_tensors("weights", KEY, tensors, {"epochs": "2"})
    back = store.get_tensors("weights", KEY)
    assert back is not None and back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
    assert store.get_meta("weights", KEY) == {"epochs": "2"}
    assert store.get_meta("weights", digest("b")) is None


@pytest.mark.parametrize("keep", [0, 5, 40])
def test_truncated_tensors_are_none(tmp_path: Path, keep: int) -> None:
    store = Store(tmp_path)
    store.put_tensors("weights", KEY, {"w": np.ones(100, dtype=np.float32)})
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:keep])
    assert store.get_tensors("weights", KEY) is None
    assert not file.exists()


def test_bytes_ls_and_size(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_bytes("onnx", KEY, b"12345")
    store.put_json("cost", KEY, 1)
    assert store.get_bytes("onnx", KEY) == b"12345"
    assert store.get_bytes("onnx", digest("b")) is None
    assert [(e.kind, e.key, e.format, e.size_bytes) for e in store.ls()] == [
        ("cost", KEY, "json", 1),
        ("onnx", KEY, "bin", 5),
    ]
    assert store.size_bytes() == 6
    assert [e.kind for e in store.ls("onnx")] == ["onnx"]


def test_many(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = {digest(i): {"i": i} for i in range(500)}
    store.put_many("cost", rows)
    assert store.get_many("cost", [*rows, digest("absent")]) == rows


def test_bad_names_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for kind, key in [("../x", KEY), ("cost", "../../etc"), ("cost", "XYZ1"), ("", KEY)]:
        with pytest.raises(HantcError):
            store.put_json(kind, key, 1)
    with pytest.raises(TypeError):
        store.put_json("cost", KEY, object())
    assert store.ls() == []


def test_unwritable_root_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="store cannot be written"):
        Store(tmp_path / "file" / "store")


def test_stale_temporaries_are_cleared_and_never_listed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_json("cost", KEY, 1)
    folder = tmp_path / "cost" / KEY[:2]
    old, new = folder / f".old{TMP_SUFFIX}", folder / f".new{TMP_SUFFIX}"
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (time.time() - 1e6, time.time() - 1e6))
    assert len(store.ls()) == 1
    assert not old.exists() and new.exists()


WRITER = """
import sys, numpy as np
from pathlib import Path
from hantc.core.store import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
i = 0
while True:
    i += 1
    store.put_json("cost", "abcd", {"i": i, "pad": "x" * 20000})
    store.put_tensors("weights", "abcd", {"w": np.full(20000, i, dtype=np.float32)})
"""


def test_killed_writer_leaves_everything_readable(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for pause in (0.02, 0.05):
        proc = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        try:
            assert proc.stdout is not None and proc.stdout.readline() == b"ready\n"
            deadline = time.time() + 20
            while store.get_tensors("weights", "abcd") is None and time.time() < deadline:
                pass
            time.sleep(pause)
        finally:
            proc.send_signal(signal.SIGKILL)
            proc.wait()
            if proc.stdout is not None:
                proc.stdout.close()
        row, tensors = store.get_json("cost", "abcd"), store.get_tensors("weights", "abcd")
        assert row is not None and len(row["pad"]) == 20000
        assert tensors is not None and len(set(tensors["w"].tolist())) == 1


def test_write_json_is_strict_and_atomic(tmp_path: Path) -> None:
    path = tmp_path / "new" / "summary.json"
    write_json(path, {"t": Timing(float("nan"), 0.1, 3), "p": Path("a/b"), "a": np.arange(2)})
    before = path.read_text()
    assert before.count("null") == 1 and '"a/b"' in before
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


def test_write_to_impossible_place_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        write_text(tmp_path / "file" / "x.txt", "hello")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError):
        write_text(tmp_path / "folder", "hello")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def _aged(store: Store, kind: str, key: str, size: int, days: float) -> None:
    store.put_bytes(kind, key, b"x" * size)
    (path,) = store.root.rglob(f"{key}.bin")
    then = time.time() - days * 86400
    os.utime(path, (then, then))


def test_gc_removes_what_was_unused_longest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key, days in (("aaaa", 3), ("bbbb", 1), ("cccc", 2)):
        _aged(store, "weights", key, 100, days)
    assert [e.key for e in store.gc(max_bytes=250, dry_run=True)] == ["aaaa"]
    assert store.size_bytes() == 300, "a dry run removes nothing"
    assert [e.key for e in store.gc(max_bytes=100)] == ["aaaa", "cccc"]
    assert [e.key for e in store.ls()] == ["bbbb"]
    assert store.gc(max_bytes=100) == []


def test_gc_by_age(tmp_path: Path) -> None:
    store = Store(tmp_path)
    _aged(store, "cost", "aaaa", 10, 40)
    _aged(store, "cost", "bbbb", 10, 20)
    assert [e.key for e in store.gc(max_age_s=30 * 86400)] == ["aaaa"]


def test_reading_counts_as_use(tmp_path: Path) -> None:
    store = Store(tmp_path)
    _aged(store, "weights", "aaaa", 100, 3)
    _aged(store, "weights", "bbbb", 100, 2)
    assert store.get_bytes("weights", "aaaa") is not None
    assert [e.key for e in store.gc(max_bytes=100)] == ["bbbb"]


def test_removing_what_is_not_there(tmp_path: Path) -> None:
    Store(tmp_path).remove("weights", "aaaa", ".bin")


def test_other_files_are_none_of_its_business(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_json("cost", "abcd", 1)
    others = [tmp_path / "README.md", tmp_path / "cost" / "note.json", tmp_path / "cost" / "zz" / "abcd.json"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert [e.key for e in store.gc(max_bytes=0)] == ["abcd"]
    assert all(path.read_text() == "mine" for path in others)
