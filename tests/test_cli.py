"""The command line from end to end, on a network small enough for a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from hantc.backends.registry import get_backend
from hantc.cli import COMMANDS, compile_parser, main
from hantc.commands import make_console
from hantc.core.progress import Reporter
from hantc.report.live import RichReporter

if TYPE_CHECKING:
    from tests.conftest import Compiled, Result, Tiny

Cli = Callable[..., "Result"]
FILES = ("model.onnx", "summary.json", "plan.json", "lut.json", "scores.json", "report.html", "log.jsonl")
KEYS = {
    *("schema_version", "hantc_version", "model", "target", "device", "data", "seed", "status", "teacher", "student"),
    *("baseline_int8", "speedup", "accuracy_drop", "predicted_latency_ms", "prediction_error", "agreement"),
    *("regions", "choices", "solver", "timings_s"),
}
STAGES = [
    "import",
    "normalize",
    "match",
    "propose",
    "cost",
    "distill",
    "score",
    "select",
    "rewrite",
    "redistil",
    "finetune",
]
STAGES += ["emit", "verify", "deploy"]
OPTIONS = {
    *("--target", "--data", "--val", "--preprocess", "--budget", "--max-drop", "--effort", "--time-limit"),
    *("--precision", "--threads", "--batch", "--lut", "--out", "--resume", "--seed", "--json"),
}


def test_compile_exit_code_follows_the_status(compiled: Compiled) -> None:
    assert compiled.result.code in (0, 1), compiled.result.err
    status = compiled.result.json()["status"]
    assert compiled.result.code == (0 if status == "done" else 1)
    assert status in ("done", "budget_missed")  # which one is up to the machine's mood


def test_memory_can_be_bounded_with_data_alone(tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    result = cli(tiny.model, "--target", "roofline", "--budget-memory", "0.5", "--out", tmp_path / "run")
    assert result.code == 2 and "--budget-memory: needs --data" in result.err


def test_weights_and_products_can_be_bounded(tiny: Tiny, compiled: Compiled, cli: Cli, tmp_path: Path) -> None:
    """Together, and without a latency: the student keeps within both."""
    given = ("--target", "roofline", "--data", tiny.data, "--effort", "quick", "--time-limit", "3s", "--threads", "1")
    limits = ("--budget-params", "0.8", "--budget-macs", "0.9", "--budget-memory", "1.0")
    result = cli(tiny.model, *given, *limits, "--store", compiled.store, "--out", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    summary = result.json()
    assert summary["student"]["params"] <= 0.81 * summary["teacher"]["params"]
    assert summary["student"]["macs"] <= 0.91 * summary["teacher"]["macs"]
    assert 0 < summary["student"]["activation_bytes"] <= summary["teacher"]["activation_bytes"]
    assert summary["options"]["budget_params"] == {"fraction": 0.8}
    refused = cli("verify", tmp_path / "run", "--cold")
    assert refused.code == 2 and "roofline times nothing on this processor" in refused.err


def test_json_is_the_summary_and_nothing_else(compiled: Compiled) -> None:
    assert compiled.result.json() == json.loads((compiled.folder / "summary.json").read_text())
    assert compiled.result.out.startswith("{") and compiled.result.out.endswith("}\n")


def test_every_file_of_the_design(compiled: Compiled) -> None:
    assert [f for f in FILES if not (compiled.folder / f).is_file()] == []
    dumps = {p.stem.split("_", 1)[1] for p in (compiled.folder / "graphs").iterdir()}
    assert {"import_teacher", "normalize_network", "rewrite_student"} <= dumps
    assert not list(compiled.folder.rglob("*.tmp"))


def test_summary_is_complete(compiled: Compiled, tiny: Tiny) -> None:
    s = compiled.result.json()
    assert set(s) >= KEYS
    for net in ("teacher", "student", "baseline_int8"):
        assert all(
            s[net][k] is not None for k in ("latency_ms", "latency_iqr_ms", "accuracy", "size_bytes", "params", "macs")
        )
    assert s["model"] == str(tiny.model) and s["target"] == "xeon" and s["seed"] == 0 and s["data"]["labelled"]
    assert s["teacher"]["accuracy"] == 100
    assert s["speedup"] == pytest.approx(s["teacher"]["latency_ms"] / s["student"]["latency_ms"])
    assert s["accuracy_drop"] == pytest.approx(s["teacher"]["accuracy"] - s["student"]["accuracy"])
    assert s["prediction_error"] >= 0 and 0 <= s["agreement"] <= 1
    assert list(s["timings_s"]) == STAGES
    names = {"region", "kind", "candidate", "precision", "score", "cost_ms", "teacher_cost_ms"}
    assert s["choices"] and all(names <= set(c) for c in s["choices"])


def test_the_choices_cover_every_block_once(compiled: Compiled) -> None:
    regions = {r["name"]: r for r in json.loads((compiled.folder / "regions.json").read_text())["regions"]}
    covered = [a for c in compiled.result.json()["choices"] for a in regions[c["region"]]["atoms"]]
    assert sorted(covered) == list(range(len(covered))) == sorted({a for r in regions.values() for a in r["atoms"]})


def test_the_model_runs_in_plain_onnxruntime(compiled: Compiled, tiny: Tiny, run_model: Callable[..., Any]) -> None:
    path = compiled.folder / "model.onnx"
    onnx.checker.check_model(onnx.load(str(path)), full_check=True)
    out = run_model(path, tiny.feeds(80))
    s = compiled.result.json()
    assert out.shape == (80, 4)
    assert 100 * np.mean(out.argmax(1) == tiny.labels) == pytest.approx(s["student"]["accuracy"])
    teacher = run_model(tiny.model, tiny.feeds(80))
    assert np.mean(out.argmax(1) == teacher.argmax(1)) == pytest.approx(s["agreement"])
    old, new = (onnx.load(str(p)).graph for p in (tiny.model, path))
    assert [i.name for i in old.input] == [i.name for i in new.input]
    assert [o.name for o in old.output] == [o.name for o in new.output]


def test_second_run_measures_and_trains_nothing(compiled: Compiled, cli: Cli, events: Callable[..., Any]) -> None:
    before = json.loads((compiled.folder / "plan.json").read_text())
    second = cli(*compiled.argv, "--json")
    assert second.code == compiled.result.code
    (cost,) = events(compiled.folder, "cost")  # the log is that of the last run alone
    assert cost["measured"] == 0 and cost["rows"] > 0
    (distill,) = events(compiled.folder, "distill")
    assert distill["trained"] == 0 and distill["reused"] > 0
    assert events(compiled.folder, "finetune") == []
    assert json.loads((compiled.folder / "plan.json").read_text())["choices"] == before["choices"]
    own = ("timings_s", "memory")  # of the process, and of how busy the machine is
    assert {k: v for k, v in second.json().items() if k not in own} == {
        k: v for k, v in compiled.result.json().items() if k not in own
    }
    memory = second.json()["memory"]
    assert memory["peak_bytes"] > 0 and memory["limit_bytes"] > 1 << 28


def test_resume_keeps_the_log(compiled: Compiled, cli: Cli, events: Callable[..., Any]) -> None:
    runs = len(events(compiled.folder, "cost"))
    assert cli(*compiled.argv, "--resume", "--json").code == compiled.result.code
    assert len(events(compiled.folder, "cost")) == runs + 1


def test_the_table_is_read_back(
    compiled: Compiled, cli: Cli, tmp_path: Path, tiny: Tiny, events: Callable[..., Any]
) -> None:
    """`--lut` with a run's own lut.json and an empty cost store: nothing is timed but whole networks."""
    argv = [*compiled.argv, "--lut", str(compiled.folder / "lut.json"), "--out", str(tmp_path / "run")]
    result = cli(*argv, "--json")
    assert result.code in (0, 1), result.err
    (cost,) = events(tmp_path / "run", "cost")
    assert cost["measured"] == 0 and cost["lut"].endswith("lut.json")
    assert any("were read from" in note for note in result.json()["notes"])


def test_no_data_is_exact(tiny: Tiny, cli: Cli, tmp_path: Path, run_model: Callable[..., Any]) -> None:
    out = tmp_path / "run"
    result = cli(tiny.model, "--target", "xeon", "--threads", "1", "--out", out, "--store", tmp_path / "store")
    assert result.code == 0, result.err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "done" and summary["teacher"]["accuracy"] is None and summary["baseline_int8"] is None
    assert summary["choices"] and {(c["candidate"], c["precision"]) for c in summary["choices"]} == {
        ("teacher", "fp32")
    }
    teacher, student = (run_model(p, tiny.feeds()) for p in (tiny.model, out / "model.onnx"))
    assert np.abs(student - teacher).max() <= 1e-3 * np.abs(teacher).max()
    assert any("--data" in note and "images" in note for note in summary["notes"])
    assert "no --data" in result.out and str(out / "report.html") in result.out
    assert "note:" in result.out and "\n\n" not in result.err


def test_the_file_as_the_engine_rewrites_it(
    tiny: Tiny, cli: Cli, tmp_path: Path, run_model: Callable[..., Any]
) -> None:
    argv = (tiny.model, "--threads", "1", "--out", tmp_path / "run", "--store", tmp_path / "store")
    result = cli(*argv, "--optimized")
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    path = tmp_path / "run" / "model.optimized.onnx"
    assert summary["engine"]["file"] == path.name and "ONNX Runtime" in summary["engine"]["built_by"]
    both = [run_model(p, tiny.feeds()) for p in (tmp_path / "run" / "model.onnx", path)]
    assert np.allclose(both[0], both[1], atol=1e-5)
    assert cli(*argv).code == 0
    assert not path.exists(), "it was of the run before"


def test_bf16_where_the_cpu_has_it(tiny: Tiny, cli: Cli, tmp_path: Path, run_model: Callable[..., Any]) -> None:
    out, caps = tmp_path / "run", get_backend("openvino").capabilities()
    argv = (tiny.model, "--target", "xeon-bf16", "--threads", "1", "--out", out, "--store", tmp_path / "store")
    result = cli(*argv, "--json")
    if "bf16" not in caps.precisions:
        assert result.code == 2 and ("bf16" in result.err if caps.available else "openvino" in result.err)
        assert not out.exists()
        return
    assert result.code == 0, result.err
    summary = result.json()
    assert {c["precision"] for c in summary["choices"]} == {"bf16"}
    assert summary["baseline_bf16"]["latency_ms"] > 0 and "openvino bf16" in summary["teacher_by_backend"]
    assert any("computes in BF16" in note for note in summary["notes"])
    teacher, student = (run_model(p, tiny.feeds()) for p in (tiny.model, out / "model.onnx"))
    assert np.allclose(student, teacher, atol=1e-4), "ONNX Runtime computes the same file in FP32"
    verified = cli("verify", out, "--json").json()
    assert not [d for d in verified["differences"] if "outputs" in d]
    assert "Teacher in BF16" in cli("inspect", out).out


def test_progress_lines_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hantc.report.live._TELL_S", 0.0)
    reporter: Reporter = RichReporter()
    with reporter.bar("measuring [x]", 4) as bar:
        for _ in range(4):
            bar.advance()
    err = capsys.readouterr().err
    lines = err.splitlines()
    assert lines[0].startswith("measuring [x]: 25%, ") and lines[0].endswith("left")
    assert lines[-1].startswith("measuring [x]: done in ") and "" not in lines
    assert "\x1b" not in err


def test_a_bar_that_fails_says_nothing_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="stop"), RichReporter().bar("measuring", 1):
        raise ValueError("stop")
    assert "done" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("inspect", "RUN"), "Teacher in INT8"),
        (("explain", "RUN", "r01"), "residual"),
        (("diff", "RUN", "RUN"), "0 of "),
        (("regions", "MODEL"), "r01_r02"),
        (("regions", "MODEL", "--why"), "misses"),
        (("pool",), "cb_stack"),
        (("pool", "--family", "efn", "--in", "16x8x8"), "efn_e1_k1_se0"),
        (("targets",), "roofline"),
        (("doctor",), "VNNI"),
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else "",
)
def test_views(compiled: Compiled, tiny: Tiny, cli: Cli, argv: tuple[str, ...], text: str) -> None:
    places = {"RUN": str(compiled.folder), "MODEL": str(tiny.model)}
    args = [places.get(a, a) for a in argv]
    shown = cli(*args)
    assert shown.code == 0 and shown.err == ""
    assert text in shown.out and "None" not in shown.out
    assert text.split(" in ")[0].lower() in cli(*args, "--json").out.lower() or argv[0] in ("inspect", "diff")
    assert cli(*args, "--json").json()


def test_choices_at_80_columns(compiled: Compiled, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for view in (("inspect", compiled.folder), ("explain", compiled.folder, "r01")):
        lines = cli(*view).out.splitlines()
        assert max(map(len, lines)) <= 80
    table = cli("inspect", compiled.folder).out
    for choice in compiled.result.json()["choices"]:
        (line,) = [row for row in table.splitlines() if row.startswith(f"{choice['region']} ")]
        assert choice["kind"] in line and choice["candidate"] in line and choice["precision"] in line


def test_profile(tiny: Tiny, compiled: Compiled, cli: Cli, tmp_path: Path, events: Callable[..., Any]) -> None:
    """Without data: candidates are measured all the same, and the table serves a later run."""
    lut = tmp_path / "tables" / "tiny.json"
    argv = ("profile", tiny.model, "--target", "xeon", "--threads", "1", "--effort", "quick", "--store", compiled.store)
    shown = cli(*argv, "--lut", lut)
    assert shown.code == 0, shown.err
    content = json.loads(lut.read_text())
    assert f"{len(content['rows'])} rows" in shown.out
    assert {"fp32", "int8"} == {r["precision"] for r in content["rows"]}
    assert len({r["candidate"] for r in content["rows"]}) > 10
    assert content["device"]["cpu"]
    assert cli(*argv, "--lut", lut, "--json").json()["rows"] == len(content["rows"])
    assert not tiny.model.with_suffix(".hantc").exists()
    run = tmp_path / "run"
    result = cli(*compiled.argv, "--lut", lut, "--out", run, "--json")
    assert result.code in (0, 1), result.err
    assert [e["measured"] for e in events(run, "cost")] == [0]


def test_verify(compiled: Compiled, tiny: Tiny, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    result = cli("verify", compiled.folder, "--cold", "--json")
    found, recorded = result.json(), compiled.result.json()
    assert result.code == (0 if found["ok"] else 1)
    assert found["ok"] == (found["differences"] == [])
    for net in ("teacher", "student"):
        assert found[net]["accuracy"] == pytest.approx(recorded[net]["accuracy"])
        assert found[net]["latency_ms"] > 0
    assert found["agreement"] == pytest.approx(recorded["agreement"])
    assert found["recorded"]["speedup"] == recorded["speedup"]
    assert all("speed-up" in d for d in found["differences"])  # nothing but this machine's mood
    cold = found["cold"]
    assert cold["student_ms"] > 0 and cold["speedup"] == pytest.approx(cold["teacher_ms"] / cold["student_ms"])


def test_names_between_colons_are_no_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    """Arrays of a file are told as set.npz:x: and what is the matter."""
    RichReporter().warn("set.npz:x: all labels are 7")
    make_console().print("set.npz:x: all labels are 7")
    told = capsys.readouterr()
    assert "set.npz:x: all" in told.err and "set.npz:x: all" in told.out


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_teaches(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"] if command is None else [command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--json" in out and "[/" not in out
    if command is None:
        assert all(f"hantc {c}" in out for c in COMMANDS)
        assert "[y x_val y_val]" in out and "Exit codes" in out


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "hantc regions MODEL" in captured.err


def test_mistyped_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspct", "run"]) == 2
    assert "did you mean inspect?" in capsys.readouterr().err


def test_every_option_of_the_design_is_known() -> None:
    assert {o for a in compile_parser()._actions for o in a.option_strings} >= OPTIONS


def test_the_store_is_kept_within_its_limit(tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    store = tmp_path / "store"
    argv = (str(tiny.model), "--target", "xeon", "--store", str(store), "--out", str(tmp_path / "run"))
    assert cli(*argv, "--store-limit", "nonsense").code == 2
    assert cli(*argv).code in (0, 1)
    assert [p for p in store.rglob("*") if p.is_file()]
    assert cli(*argv, "--store-limit", "0").code in (0, 1)
    assert not [p for p in store.rglob("*") if p.is_file()]
