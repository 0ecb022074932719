"""Latency tables that cannot be used: broken, of another device, of another network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hantc.core.errors import UsageError
from hantc.core.lut import read_lut, write_lut

if TYPE_CHECKING:
    from tests.conftest import Compiled, Result, Tiny

Cli = Callable[..., "Result"]


def test_lut_files_that_are_none(attempt: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "lut.json"
    assert "cannot be read" in attempt("--lut", path, "--threads", "1").err
    for content, text in (
        ("{", "is not JSON"),
        ("[]", "is not a latency table"),
        ('{"schema_version": 1}', "wrong entry"),
    ):
        path.write_text(content)
        err = attempt("--lut", path, "--threads", "1").err
        assert text in err and str(path) in err


def test_lut_of_another_device_or_network(
    attempt: Callable[..., Result], compiled: Compiled, tiny: Tiny, tmp_path: Path
) -> None:
    source = compiled.folder / "lut.json"
    lut = read_lut(source)
    path = tmp_path / "lut.json"
    content = json.loads(source.read_text())
    content["device"]["cpu"] = "Intel Xeon Nobody 9999"
    path.write_text(json.dumps(content))
    err = attempt("--lut", path, "--threads", "1").err
    assert "cpu Intel Xeon Nobody 9999 there" in err and lut.device.cpu in err and "hantc profile" in err
    assert "threads 1 there, 2 here" in attempt("--lut", source, "--threads", "2").err
    content = json.loads(source.read_text())
    content["rows"] = [r for r in content["rows"] if r["region"] != "r01"]
    path.write_text(json.dumps(content))
    assert "no row for region r01" in attempt("--lut", path, "--threads", "1").err


def test_lut_round_trip(compiled: Compiled, tmp_path: Path) -> None:
    lut = read_lut(compiled.folder / "lut.json")
    write_lut(tmp_path / "copy.json", lut.table, lut.device)
    assert read_lut(tmp_path / "copy.json").table == lut.table
    with pytest.raises(UsageError, match="batch 1 there, 8 here"):
        lut.check_device(lut.device, backend="onnxruntime", threads=1, batch=8)
    lut.check_device(lut.device, backend="onnxruntime", threads=1, batch=1)


def test_profile_needs_a_file_to_write(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    assert "is a folder" in cli("profile", tiny.model, "--lut", tmp_path).err
    (tmp_path / "file").write_text("")
    result = cli("profile", tiny.model, "--lut", tmp_path / "file" / "lut.json")
    assert result.code == 2 and "is a file, not a folder" in result.err
