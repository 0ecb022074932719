"""Terminal tables and their JSON twins say the same, and survive hostile names and missing figures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from hantc.core.errors import UsageError
from hantc.report import facts, terminal
from hantc.report.records import read_run
from hantc.report.summary import load

HOSTILE = "[red]x[/red]\x1b[2J<script>"


def show(renderable: RenderableType, width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(renderable)
    return out.getvalue()


def test_summary_table_has_the_three_networks(run_folder: Path) -> None:
    summary = load(run_folder)
    text = show(terminal.summary_table(summary))
    for figure in ("3.11 ms", "2.53 ms", "0.870 ms", "3.6×", "1.23×", "78.2 %", "77.1 % (−1.10 points)", "5.4 MB"):
        assert figure in text
    data = facts.summary_data(summary)
    assert data["student"]["speedup"] == summary.speedup
    assert data["student"]["accuracy_change"] == pytest.approx(-1.1)
    assert data["baseline_int8"]["speedup"] == pytest.approx(3.11 / 2.53)


def test_summary_table_without_accuracy_or_baseline(bare_run: Path) -> None:
    text = show(terminal.summary_table(load(bare_run)))
    assert "needs --data" in text
    assert "n/a" in text
    assert "None" not in text
    assert facts.summary_data(load(bare_run))["baseline_int8_reason"] == "needs --data"


def test_choices(run_folder: Path) -> None:
    summary = load(run_folder)
    rows = facts.choices_data(summary)
    text = show(terminal.choices_table(summary))
    assert len(rows) == 6
    assert {r["change"] for r in rows} == {"kept", "replaced"}
    for row in rows:
        assert row["region"] in text and row["candidate"] in text
        assert row["ratio"] == pytest.approx(row["cost_ms"] / row["teacher_cost_ms"])


def test_what_changed_in_a_region(bare_run: Path) -> None:
    (choice,) = load(bare_run).choices
    assert facts.change(choice) == "exact rewrite"
    assert facts.change(choice.model_copy(update={"candidate": "teacher", "precision": "int8"})) == "lower precision"


def test_explain_names_every_candidate_and_its_fate(run_folder: Path) -> None:
    data = facts.explain_region_data(run_folder, "blocks.0.0")
    rows = data["candidates"]
    own = [r for r in json.loads((run_folder / "lut.json").read_text())["rows"] if r["region"] == "blocks.0.0"]
    assert {(r["candidate"], r["precision"]) for r in rows} == {(r["candidate"], r["precision"]) for r in own}
    assert rows[0]["status"] == "chosen"
    assert rows[0]["candidate"] == data["choice"]["candidate"]
    assert any(r["status"] == "runner-up" for r in rows)
    assert all(r["reason"] for r in rows if r["status"] in ("dropped", "skipped", "not scored"))
    assert sum(data["counts"].values()) == len(rows)
    text = show(terminal.explain_region(run_folder, "blocks.0.0"))
    assert "24×16×16 → 40×8×8" in text
    assert all(r["candidate"] in text for r in rows)
    json.dumps(data, allow_nan=False)


def test_explain_gives_skip_reasons(run_folder: Path) -> None:
    data = facts.explain_region_data(run_folder, "stem")
    (row,) = [r for r in data["candidates"] if r["status"] == "skipped"]
    assert (row["candidate"], row["reason"]) == ("vit_depth1_dim32", "needs a stride of 1")
    assert "skipped: needs a stride of 1" in show(terminal.explain_region(run_folder, "stem"))


def test_slow_candidates_were_never_trained(run_folder: Path) -> None:
    rows = facts.explain_region_data(run_folder, "stem")["candidates"]
    slow = [r for r in rows if r["status"] == "not scored" and (r["ratio"] or 0) >= 1]
    assert slow
    assert all("not faster" in r["reason"] for r in slow)


def test_explain_a_region_that_a_span_covers(run_folder: Path) -> None:
    path = run_folder / "regions.json"
    content = json.loads(path.read_text())
    span = {**content["regions"][0], "name": "span.0", "kind": "span", "atoms": [0, 1]}
    path.write_text(json.dumps({**content, "regions": [*content["regions"], span]}))
    data = facts.explain_region_data(run_folder, "span.0")
    assert data["choice"] is None
    assert data["covered_by"] == ["stem", "blocks.0.0"]
    alone = [facts.explain_region_data(run_folder, name)["teacher_cost_ms"] for name in ("stem", "blocks.0.0")]
    assert data["teacher_cost_ms"] == pytest.approx(sum(alone))
    assert "covered by stem, blocks.0.0" in show(terminal.explain_region(run_folder, "span.0"))


def test_unknown_region_lists_the_names(run_folder: Path) -> None:
    with pytest.raises(UsageError, match=r"no region 'blocks\.0\.9'") as caught:
        terminal.explain_region(run_folder, "blocks.0.9")
    assert "did you mean blocks.0." in caught.value.hint
    assert all(name in caught.value.hint for name in ("stem", "blocks.0.0", "blocks.1.0"))


def test_inspect(run_folder: Path, bare_run: Path) -> None:
    text = show(terminal.inspect_run(run_folder))
    assert "→ xeon, done" in text
    assert "agreement 93.1 %" in text
    assert "one image could not be read" in text
    assert "None" not in show(terminal.inspect_run(bare_run))
    data = facts.inspect_run_data(run_folder)
    assert json.loads(json.dumps(data, allow_nan=False))["networks"]["student"]["latency_ms"] == 0.87
    assert data["rejections"][0]["where"] == "classifier.1"


def test_limits_name_what_weakens_the_figures(make_run: Callable[..., Path], tmp_path: Path) -> None:
    data = {"source": "synthetic", "labelled": False, "synthetic": True}
    run = read_run(make_run(tmp_path / "r", data=data, status="budget_missed", prediction_error=-0.35))
    said = " ".join(facts.limits(run))
    for word in ("synthetic images", "not met", "differ by 35 %", "7 bits"):
        assert word in said
    assert len(facts.limits(run)) == len(set(facts.limits(run)))


def test_diff(run_folder: Path, bare_run: Path) -> None:
    same = facts.diff_runs_data(run_folder, run_folder)
    assert same["settings"] == {}
    assert not any(row["changed"] for row in same["choices"])
    data = facts.diff_runs_data(run_folder, bare_run)
    figures = {row["name"]: row for row in data["figures"]}
    assert figures["student.latency_ms"]["change"] == pytest.approx(2.8 - 0.87)
    assert figures["student.accuracy"]["change"] is None
    assert data["settings"]["data"] == {"a": "/data/cifar10", "b": None}
    text = show(terminal.diff_runs(run_folder, bare_run))
    assert "6 of 6 regions differ" in text
    assert "+1.93 ms" in text
    assert "not in the plan" in text


def test_hostile_names_are_shown_harmless(make_run: Callable[..., Path], tmp_path: Path) -> None:
    choice = {
        "region": HOSTILE,
        "kind": HOSTILE,
        "candidate": HOSTILE,
        "precision": "fp32",
        "cost_ms": 1,
        "teacher_cost_ms": 2,
    }
    folder = make_run(tmp_path / "r", model=HOSTILE, choices=[choice])
    for renderable in (
        terminal.inspect_run(folder),
        terminal.explain_region(folder, HOSTILE),
        terminal.diff_runs(folder, folder),
    ):
        text = show(renderable)
        assert "\x1b" not in text
        assert "[red]" in text or "0 of 1" in text  # shown as text, not taken for markup


def test_narrow_terminals_lose_nothing(run_folder: Path) -> None:
    text = show(terminal.choices_table(load(run_folder)), width=80)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
