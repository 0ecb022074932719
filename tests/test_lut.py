"""Latency tables that cannot be used: broken, of another device, of another network."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hantc.backends.onnxruntime.backend import OnnxRuntimeBackend
from hantc.core.errors import UsageError
from hantc.core.lut import compare, merge, read_lut, write_lut
from hantc.core.types import Fetching, digest
from hantc.passes.meter import METHOD

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


def test_a_table_of_pinned_threads_is_not_one_of_others(
    attempt: Callable[..., Result], compiled: Compiled, cli: Cli, tmp_path: Path
) -> None:
    source, other = compiled.folder / "lut.json", tmp_path / "pinned.json"
    lut = read_lut(source)
    assert lut.table.pinned is False
    write_lut(other, replace(lut.table, pinned=True), lut.device)
    err = attempt("--lut", other, "--threads", "1").err
    assert "its threads were kept on cores of their own" in err and "--pin" in err
    assert cli("lut", "show", other, "--json").json()["pinned"] is True
    assert any("pinned" in line for line in cli("lut", "diff", source, other, "--json").json()["conditions"])
    assert cli("lut", "merge", source, other, "--out", tmp_path / "c.json").code == 2


def test_profile_needs_a_file_to_write(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    assert "is a folder" in cli("profile", tiny.model, "--lut", tmp_path).err
    (tmp_path / "file").write_text("")
    result = cli("profile", tiny.model, "--lut", tmp_path / "file" / "lut.json")
    assert result.code == 2 and "is a file, not a folder" in result.err


# ---- of another machine, on purpose ----


def foreign(source: Path, path: Path) -> Path:
    """The table, as another machine would have measured it: everything twice as slow."""
    lut = read_lut(source)
    device = replace(lut.device, cpu="Intel Xeon Nobody 9999", flags=(*lut.device.flags, "avx512_vnni"))
    rows = tuple(replace(r, latency_ms=2 * r.latency_ms, device=digest(device)) for r in lut.table.rows)
    table = replace(lut.table, rows=rows, teacher_ms=2 * lut.table.teacher_ms, glue_ms=2 * lut.table.glue_ms)
    write_lut(path, table, device)
    return path


def test_measure_there_and_search_here(
    compiled: Compiled, tiny: Tiny, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("something was timed")

    path = foreign(compiled.folder / "lut.json", tmp_path / "lut.json")
    monkeypatch.setattr(OnnxRuntimeBackend, "measure", never)
    argv = [*compiled.argv, "--out", tmp_path / "run", "--lut", path, "--foreign-lut", "--json"]
    result = cli(*argv)
    assert result.code in (0, 1), result.err
    summary, table = result.json(), read_lut(path).table
    assert summary["predicted"] and summary["device"]["cpu"] == "Intel Xeon Nobody 9999"
    assert summary["teacher"]["latency_ms"] == pytest.approx(table.pace * table.teacher_ms)
    assert summary["student"]["latency_ms"] == pytest.approx(summary["predicted_latency_ms"])
    assert summary["prediction_error"] is None and summary["baseline_int8"] is None
    assert "no figure" in summary["baseline_int8_reason"]
    assert any("nothing was timed here" in note for note in summary["notes"])
    assert summary["accuracy_drop"] is not None
    assert any((c["candidate"], c["precision"]) != ("teacher", "fp32") for c in summary["choices"])


def test_foreign_needs_a_table(attempt: Callable[..., Result]) -> None:
    assert "--foreign-lut needs --lut" in attempt("--foreign-lut").err


# ---- several tables ----


def halves(source: Path, folder: Path) -> tuple[Path, Path]:
    """Two tables that share the teacher's rows; the second was measured at half the speed."""
    lut = read_lut(source)
    own = [r for r in lut.table.rows if r.candidate == "teacher"]
    rest = [r for r in lut.table.rows if r.candidate != "teacher"]
    paths = folder / "a.json", folder / "b.json"
    write_lut(paths[0], replace(lut.table, rows=(*own, *rest[::2])), lut.device)
    slow = tuple(replace(r, latency_ms=2 * r.latency_ms, iqr_ms=2 * r.iqr_ms) for r in (*own, *rest[1::2]))
    write_lut(paths[1], replace(lut.table, rows=slow, teacher_ms=2 * lut.table.teacher_ms), lut.device)
    return paths


def test_merged_halves_are_the_whole(compiled: Compiled, cli: Cli, tmp_path: Path) -> None:
    source = compiled.folder / "lut.json"
    a, b = halves(source, tmp_path)
    assert len(read_lut(a).table.rows) < len(read_lut(source).table.rows)
    result = cli("lut", "merge", a, b, "--out", tmp_path / "c.json", "--json")
    assert result.code == 0, result.err
    whole, made = read_lut(source), read_lut(tmp_path / "c.json")
    want, got = whole.table.by_key(), made.table.by_key()
    assert set(got) == set(want) and result.json()["rows"] == len(want)
    assert all(got[k].latency_ms == pytest.approx(want[k].latency_ms) for k in want)
    assert made.device == whole.device and made.table.teacher_ms == whole.table.teacher_ms
    assert not {(s[0], s[1]) for s in made.table.skipped} & {(r, c) for r, c, _ in got}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("teacher_ms", 0.0), ("teacher_ms", "NaN"), ("scale", -1.0), ("row", -5.0), ("row", "NaN")),
        *(("correction", 0.0), ("corrections", 1.0), ("glue_ms", -1.0), ("transitions", -9.0)),
        *(("fetching", -0.1), ("fetching", "inf"), ("fetchings", 1.0)),
    ],
)
def test_figures_that_are_none(compiled: Compiled, cli: Cli, tmp_path: Path, key: str, value: float | str) -> None:
    content = json.loads((compiled.folder / "lut.json").read_text())
    if key == "row":
        content["rows"][0]["latency_ms"] = float(value)
    elif key == "correction":
        content["correction"]["int8"] = float(value)
    elif key.startswith("fetching"):
        content["fetching"]["ms_per_mb" if key == "fetching" else "foo"] = float(value)
    elif key == "corrections":
        content["correction"]["foo"] = float(value)
    elif key == "transitions":
        content["transitions"][0][1] = float(value)
    else:
        content[key] = float(value)
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(content))
    result = cli("lut", "show", path)
    assert result.code == 2 and "holds a wrong entry" in result.err and str(path) in result.err


def test_of_equal_rows_the_better_measured_stays(compiled: Compiled, tmp_path: Path) -> None:
    lut = read_lut(compiled.folder / "lut.json")
    own = [r.candidate == "teacher" for r in lut.table.rows]
    found = [r.latency_ms if mine else 3.0 for r, mine in zip(lut.table.rows, own, strict=True)]
    more = tuple(replace(r, latency_ms=ms, samples=r.samples + 1) for r, ms in zip(lut.table.rows, found, strict=True))
    other = replace(lut, table=replace(lut.table, rows=more))
    assert merge([lut, other]).rows == more == merge([other, lut]).rows


def test_a_crowded_host_does_not_move_what_is_timed_apart(compiled: Compiled, cli: Cli, tmp_path: Path) -> None:
    """The whole teacher took half as long again: its weights missed the caches, and no row suffers from that."""
    source, other = compiled.folder / "lut.json", tmp_path / "crowded.json"
    lut = read_lut(source)
    crowded = replace(lut.table, teacher_ms=1.5 * lut.table.teacher_ms, fetching=Fetching(0.0, 0.2))
    more = replace(crowded, rows=tuple(replace(r, samples=r.samples + 1) for r in crowded.rows))
    write_lut(other, more, lut.device)
    assert cli("lut", "diff", source, other, "--json").json()["clock_factor"] == pytest.approx(1.0)
    assert cli("lut", "merge", source, other, "--out", tmp_path / "c.json").code == 0
    made = read_lut(tmp_path / "c.json").table
    assert [r.latency_ms for r in made.rows] == pytest.approx([r.latency_ms for r in lut.table.rows])
    assert made.teacher_ms == lut.table.teacher_ms and made.fetching == lut.table.fetching


def test_tables_without_a_common_region_meet_at_the_whole_teacher(compiled: Compiled, tmp_path: Path) -> None:
    lut = read_lut(compiled.folder / "lut.json")
    untimed = tuple(replace(r, latency_ms=1e9) if r.candidate == "teacher" else r for r in lut.table.rows)
    first = replace(lut, table=replace(lut.table, rows=untimed, teacher_ms=2 * lut.table.teacher_ms))
    assert compare(first, lut).factor == pytest.approx(2.0)


def test_rows_that_were_timed_in_two_ways_are_not_joined(compiled: Compiled, cli: Cli, tmp_path: Path) -> None:
    """A table of before there were methods can be read, has no load by time, and is told of."""
    source, other = compiled.folder / "lut.json", tmp_path / "old.json"
    content = json.loads(source.read_text())
    assert content.pop("method") == METHOD and content["fetching"].pop("mb_per_ms") >= 0
    other.write_text(json.dumps(content))
    table = read_lut(other).table
    assert table.method is None and table.fetching.mb_per_ms == 0.0
    result = cli("lut", "merge", source, other, "--out", tmp_path / "c.json")
    assert result.code == 2 and f"method: {METHOD} in" in result.err and not (tmp_path / "c.json").exists()
    assert f"method: {METHOD} in" in cli("lut", "diff", source, other).out


def test_diff_finds_the_row_that_differs(compiled: Compiled, cli: Cli, tmp_path: Path) -> None:
    source = compiled.folder / "lut.json"
    lut = read_lut(source)
    changed = next(r for r in lut.table.rows if r.candidate != "teacher")
    rows = tuple(replace(r, latency_ms=1.5 * r.latency_ms) if r is changed else r for r in lut.table.rows)
    write_lut(tmp_path / "b.json", replace(lut.table, rows=rows[:-1]), lut.device)
    found = cli("lut", "diff", source, tmp_path / "b.json", "--json").json()
    assert found["in_both"] == len(rows) - 1 and (found["only_in_first"], found["only_in_second"]) == (1, 0)
    assert found["median_difference"] == 0 and found["clock_factor"] == 1 and found["conditions"] == []
    odd = [r for r in found["rows"] if r["first_ms"] != r["second_ms"]]
    assert [(r["region"], r["candidate"], r["precision"]) for r in odd] == [
        (changed.region, changed.candidate, changed.precision)
    ]
    assert "1.50" in cli("lut", "diff", source, tmp_path / "b.json").out


def test_tables_that_do_not_go_together(compiled: Compiled, cli: Cli, tmp_path: Path) -> None:
    source = compiled.folder / "lut.json"
    other = foreign(source, tmp_path / "b.json")
    result = cli("lut", "merge", source, other, "--out", tmp_path / "c.json")
    assert result.code == 2 and "Nobody 9999" in result.err and not (tmp_path / "c.json").exists()
    text = " ".join(cli("lut", "diff", source, other).out.split())  # a CPU of many flags makes it many lines
    assert "Nobody 9999" in text
    lut = read_lut(source)
    rows = tuple(replace(r, macs=r.macs + 1) for r in lut.table.rows)
    write_lut(tmp_path / "d.json", replace(lut.table, rows=rows), lut.device)
    for action in (
        ("merge", source, tmp_path / "d.json", "--out", tmp_path / "c.json"),
        ("diff", source, tmp_path / "d.json"),
    ):
        result = cli("lut", *action)
        assert result.code == 2 and "two networks" in result.err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("show", "a", "b"), "takes 1 files"),
        (("diff", "a"), "takes 2 files"),
        (("merge", "a", "--out", "c"), "takes 2 or more"),
        (("merge", "a", "b"), "--out names"),
        (("show", "a", "--out", "c"), "--out names"),
        (("show", "none.json"), "cannot be read"),
    ],
)
def test_lut_misused(cli: Cli, argv: tuple[str, ...], told: str) -> None:
    result = cli("lut", *argv)
    assert result.code == 2 and told in result.err and "Traceback" not in result.err


def test_show_lists_every_region(compiled: Compiled, cli: Cli) -> None:
    source = compiled.folder / "lut.json"
    data = cli("lut", "show", source, "--json").json()
    assert {r["region"] for r in data["regions"]} == {r.region for r in read_lut(source).table.rows}
    assert all(r["teacher_ms"] > 0 for r in data["regions"])
    text = cli("lut", "show", source).out
    assert all(r["region"] in text for r in data["regions"]) and "onnxruntime" in text
