"""summary.json and the other records: round trip, tolerance, and errors that name the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hantc.core.errors import UsageError
from hantc.report.records import read_run
from hantc.report.summary import Summary, load


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_json_round_trip(run_folder: Path, tmp_path: Path) -> None:
    summary = load(run_folder)
    summary.save(tmp_path)
    assert load(tmp_path) == summary
    assert Summary.model_validate_json(summary.to_json()) == summary
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def test_the_file_holds_every_documented_key(run_folder: Path) -> None:
    documented = {
        *("schema_version", "hantc_version", "model", "target", "device", "data", "seed", "status", "teacher"),
        *("student", "baseline_int8", "speedup", "accuracy_drop", "predicted_latency_ms", "prediction_error"),
        *("agreement", "regions", "choices", "solver", "timings_s", "notes", "ops"),
    }
    written = json.loads(load(run_folder).to_json())
    assert documented <= set(written)
    assert {"latency_ms", "latency_iqr_ms", "accuracy", "size_bytes", "params", "macs"} <= set(written["student"])
    assert written["device"]["versions"] == {"onnxruntime": "1.31.0"}


def test_unknown_keys_survive_and_missing_ones_fail(run_folder: Path) -> None:
    _edit(run_folder, later_key={"x": 1})
    assert json.loads(load(run_folder).to_json())["later_key"] == {"x": 1}
    content = json.loads((run_folder / "summary.json").read_text())
    del content["speedup"]
    with pytest.raises(ValidationError):
        Summary.model_validate(content)


def test_nan_reads_as_null_and_is_never_written(run_folder: Path) -> None:
    _edit(run_folder, prediction_error=float("nan"), speedup=float("inf"), solver={"gap": float("nan")})
    summary = load(run_folder)
    assert summary.prediction_error is None
    assert summary.speedup is None
    assert "NaN" not in summary.to_json()
    assert "Infinity" not in summary.to_json()


def test_baseline_given_as_a_reason(bare_run: Path) -> None:
    summary = load(bare_run)
    assert summary.baseline_int8 is None
    assert summary.baseline_int8_reason == "needs --data"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "broken JSON"),
        ("[]", "no JSON object"),
        ('{"schema_version": 2}', "schema_version 2"),
        ('{"schema_version": 1}', "wrong content"),
    ],
)
def test_broken_summary_names_the_file(run_folder: Path, content: str, says: str) -> None:
    (run_folder / "summary.json").write_text(content)
    with pytest.raises(UsageError, match=says) as caught:
        load(run_folder)
    assert str(run_folder / "summary.json") in caught.value.where
    assert caught.value.hint


def test_what_is_no_run_folder(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(UsageError, match="no such run folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is a file"):
        load(run_folder / "summary.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="has no summary") as caught:
        load(tmp_path / "empty")
    assert "--resume" in caught.value.hint
    assert caught.value.exit_code == 2


def test_records_are_read_back(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert run.plan is not None and run.plan.budget_ms == 1.2
    assert run.costs is not None and run.costs.transitions == (((24, 16, 16), 0.01),)
    assert run.regions[0].in_shape == (24, 16, 16)
    assert run.rejections[0].nodes == ("Gemm_239",)
    assert sum(s.chosen for s in run.solutions) == 1
    assert run.solutions[-1].latency_ms == run.solutions[-1].predicted_ms
    assert run.warnings == ("one image could not be read",)  # and the cut-off last line is skipped


def test_null_stands_for_nan_in_rows(run_folder: Path) -> None:
    for name, key, column in (("scores", "rows", "score"), ("lut", "rows", "iqr_ms"), ("plan", "choices", "score")):
        path = run_folder / f"{name}.json"
        content = json.loads(path.read_text())
        content[key][0][column] = None
        path.write_text(json.dumps(content))
    run = read_run(run_folder)
    assert run.costs is not None and run.plan is not None
    assert all(math.isnan(v) for v in (run.scores[0].score, run.costs.rows[0].iqr_ms, run.plan.choices[0].score))


def test_absent_records_are_empty_and_broken_ones_are_named(bare_run: Path) -> None:
    run = read_run(bare_run)
    assert run.plan is None and run.costs is None
    assert run.scores == () and run.solutions == () and run.warnings == ()
    (bare_run / "lut.json").write_text('{"rows": [{"region": 1}]}')
    with pytest.raises(UsageError, match="wrong content") as caught:
        read_run(bare_run)
    assert caught.value.where.endswith("lut.json")
