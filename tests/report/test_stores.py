"""The store's listing and clearing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hantc.cli import main
from hantc.core.config import parse_size
from hantc.core.errors import UsageError
from hantc.core.store import Store
from hantc.report.stores import parse_age, store_data


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("500M", 500 << 20), ("1.5 GiB", 3 << 29), ("2k", 2048), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--max-size") == size


def test_ages() -> None:
    assert (parse_age("2d"), parse_age("12h")) == (172800, 43200)


@pytest.mark.parametrize("text", ["much", "-1", "2 X", ""])
def test_nonsense_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text, "--max-size")


@pytest.mark.parametrize("text", ["3", "x", "-2d"])
def test_nonsense_is_no_age(text: str) -> None:
    with pytest.raises(UsageError, match="is not an age"):
        parse_age(text)


def test_data_sums_by_kind(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key in ("aaaa", "bbbb"):
        store.put_bytes("weights", key, b"12345")
    store.put_json("cost", "aaaa", 1)
    data = store_data(store)
    assert (data["entries"], data["size_bytes"]) == (3, 11)
    assert data["kinds"]["weights"]["entries"] == 2
    assert data["kinds"]["weights"]["unused_s"] < 60


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path)
    store.put_bytes("weights", "aaaa", b"12345")
    where = ["--store", str(tmp_path)]
    assert main(["store", "ls", *where]) == 0
    assert "trained candidates" in capsys.readouterr().out
    assert main(["store", "gc", *where]) == 2
    assert "--max-size 2G" in capsys.readouterr().err
    assert main(["store", "gc", "--max-size", "0", "--dry-run", *where]) == 0
    assert len(store.ls()) == 1
    capsys.readouterr()
    assert main(["store", "gc", "--max-size", "0", "--json", *where]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == 1
    assert store.ls() == []
