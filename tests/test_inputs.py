"""What a run needs before it begins: target files, engines, and what follows from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import hantc
from hantc import inputs
from hantc.backends import registry
from hantc.backends.onnxruntime.backend import OnnxRuntimeBackend
from hantc.core.errors import UsageError
from hantc.core.progress import Reporter
from hantc.dialect.dequantize import is_quantized
from hantc.dialect.qdq import QuantSpec, quantize_whole
from hantc.inputs import make_config, prepare
from hantc.passes.state import Context
from hantc.report import doctor
from hantc.run import verify_run

if TYPE_CHECKING:
    from tests.conftest import Result, Tiny

BOARD = """
backend = "roofline"
precisions = ["fp32", "int8"]
batch = 4
threads = 3
[ceilings]
peak_fp32 = {peak}
"""


@pytest.fixture
def board(tmp_path: Path) -> Path:
    file = tmp_path / "board.toml"
    file.write_text(BOARD.format(peak=1e9))
    return file


def context(tiny: Tiny, place: Path, **options: Any) -> Context:
    config = make_config(tiny.model, out=place / "out", store=place / "store", **options)
    return prepare(config, Reporter())[1]


def test_a_file_that_onnxruntime_optimised(cli: Callable[..., Result], tiny: Tiny, tmp_path: Path) -> None:
    """Its fused operators are taken apart; the regions are those of the file before."""
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, str(tmp_path / "fast.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(str(tiny.model), options, providers=["CPUExecutionProvider"])
    assert "com.microsoft" in {n.domain for n in onnx.load(tmp_path / "fast.onnx").graph.node}
    found = [cli("regions", file, "--json").json()["regions"] for file in (tiny.model, tmp_path / "fast.onnx")]
    assert [r["kind"] for r in found[0]] == [r["kind"] for r in found[1]] != []
    common = ("--target", "roofline", "--store", tmp_path / "store", "--out", tmp_path / "out")
    done = cli(tmp_path / "fast.onnx", *common)
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert any("fused operators were taken apart" in n for n in summary["notes"])
    assert {n.domain for n in onnx.load(tmp_path / "out" / "model.onnx").graph.node} == {""}


def test_batch_and_threads_are_the_targets_unless_given(tiny: Tiny, tmp_path: Path, board: Path) -> None:
    ctx = context(tiny, tmp_path, target=board)
    assert (ctx.config.batch, ctx.threads, ctx.backend.name) == (4, 3, "roofline")
    ctx = context(tiny, tmp_path, target=str(board), batch=1, threads=2)
    assert (ctx.config.batch, ctx.threads) == (1, 2)


def test_threads_are_pinned_where_asked_for(
    tiny: Tiny, tmp_path: Path, board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "pick_cores", lambda threads: tuple(range(5, 5 + threads)))
    monkeypatch.setattr(inputs, "can_pin", lambda: True)
    assert context(tiny, tmp_path, threads=2).cores == ()
    ctx = context(tiny, tmp_path, threads=2, pin=True)
    assert ctx.cores == ctx.protocol(warmup=1, samples=2).cores == (5, 6)
    ctx = context(tiny, tmp_path, target=board, pin=True)
    assert ctx.cores == () and any("nothing is timed here" in n for n in ctx.notes)
    own = tmp_path / "own.toml"
    own.write_text('backend = "onnxruntime"\nprecisions = ["fp32"]\nthreads = 1\npin = true\n')
    assert context(tiny, tmp_path, target=own).cores == (5,)
    monkeypatch.setattr(inputs, "can_pin", lambda: False)
    with pytest.raises(UsageError, match="does not tie threads") as info:
        context(tiny, tmp_path, pin=True)
    assert info.value.where == "--pin"


def test_a_target_file_is_remembered_with_its_whole_path(
    tiny: Tiny, tmp_path: Path, board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_config(tiny.model, target="board.toml").target == str(board)
    assert make_config(tiny.model, target="xeon").target == "xeon"


def test_the_engine_can_be_another_than_the_targets(tiny: Tiny, tmp_path: Path) -> None:
    assert context(tiny, tmp_path, backend="roofline").backend.name == "roofline"
    assert context(tiny, tmp_path, target="roofline", backend="onnxruntime").backend.name == "onnxruntime"
    with pytest.raises(UsageError, match="unknown backend 'toaster'"):
        context(tiny, tmp_path, backend="toaster")


class Other(OnnxRuntimeBackend):
    """A third party's engine on this machine."""

    name = "other"


def test_rivals_are_the_other_engines_that_can_be_timed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "BUILTIN", {k: v for k, v in registry.BUILTIN.items() if k != "openvino"})
    points = [EntryPoint("other", "tests.test_inputs:Other", registry.GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.GROUP else [])
    assert [r.name for r in context(tiny, tmp_path).rivals] == ["other"]
    assert [r.name for r in context(tiny, tmp_path, backend="other").rivals] == ["onnxruntime"]
    assert context(tiny, tmp_path, target="roofline").rivals == (), "predictions are no rivals of measurements"


def test_a_run_is_verified_as_it_was_targeted(tiny: Tiny, tmp_path: Path, board: Path) -> None:
    """Though the file is gone, or says something else by now."""
    run = hantc.compile(tiny.model, target=str(board), out=tmp_path / "run", store=tmp_path / "store")
    assert run.summary.backend == "roofline" and run.summary.batch == 4
    board.write_text(BOARD.format(peak=9e9))
    now = verify_run(tmp_path / "run", Reporter())
    assert now["ok"], now["differences"]
    assert now["teacher"]["latency_ms"] == pytest.approx(run.summary.teacher.latency_ms)
    board.unlink()
    assert verify_run(tmp_path / "run", Reporter())["ok"]


def test_a_run_is_verified_on_its_engine(tiny: Tiny, tmp_path: Path) -> None:
    run = hantc.compile(tiny.model, backend="roofline", out=tmp_path / "run", store=tmp_path / "store", threads=1)
    now = verify_run(tmp_path / "run", Reporter())
    assert now["teacher"]["latency_ms"] == pytest.approx(run.summary.teacher.latency_ms)


@pytest.mark.parametrize("has_it", [True, False])
def test_a_target_that_the_cpu_lacks_is_told(monkeypatch: pytest.MonkeyPatch, has_it: bool) -> None:
    found = registry.available()
    floats = ("bf16",) if has_it else ()
    here = replace(found["openvino"], available=True, precisions=("fp32", "int8", *floats))
    monkeypatch.setattr("hantc.report.doctor.available", lambda: {**found, "openvino": here})
    (row,) = [t for t in doctor.targets_data() if t["name"] == "xeon-bf16"]
    assert row["available"] == has_it and ("no bf16 on this CPU" in row["reason"]) != has_it


def test_open_sizes_are_asked_for(tiny: Tiny, cli: Callable[..., Result], tmp_path: Path) -> None:
    model = onnx.load(str(tiny.model))
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "side"
    path, out = tmp_path / "dynamic.onnx", tmp_path / "run"
    onnx.save(model, str(path))
    for argv in (("regions", path), (path, "--out", out, "--store", tmp_path / "store")):
        refused = cli(*argv)
        assert refused.code == 2 and "--input-shape 3x224x224" in refused.err, refused.err
    assert not out.exists()
    found = cli("regions", path, "--input-shape", "3x36x36", "--json").json()
    assert found["regions"] and found["regions"][0]["in_shape"][1:] == [36, 36]


def test_a_quantised_model_is_a_teacher_in_floats(tiny: Tiny, tmp_path: Path, cli: Callable[..., Result]) -> None:
    images = np.load(tiny.data)["x"][:64].transpose(0, 3, 1, 2).astype(np.float32) / 255
    model = onnx.load(str(tiny.model))
    feeds = [{model.graph.input[0].name: images[i : i + 16]} for i in range(0, 64, 16)]
    given = tmp_path / "int8.onnx"
    onnx.save(quantize_whole(model, feeds, QuantSpec(reduce_range=False)), str(given))

    config = make_config(given, target="roofline", out=tmp_path / "out", store=tmp_path / "store")
    state, ctx = prepare(config, Reporter())
    assert state.given is None and is_quantized(state.model)
    assert any("with --data" in note for note in ctx.notes)

    quick = ("--effort", "quick", "--time-limit", "12s", "--threads", "1")
    options = ("--target", "roofline", "--store", tmp_path / "store", *quick)
    result = cli(given, "--data", tiny.data, "--budget", "0.8", "--out", tmp_path / "run", *options, "--json")
    assert result.code == 0, result.err
    summary = result.json()
    assert summary["baseline_given"]["latency_ms"] > 0 and summary["regions"] > 2
    assert summary["teacher"]["accuracy"] > 90 and summary["baseline_given"]["accuracy"] > 90
    assert any("quantised already" in note for note in summary["notes"])
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    (told,) = [e for e in map(json.loads, log) if e["event"] == "dequantized"]
    assert len(told["ranges"]) > 3
    assert "File as given" in (tmp_path / "run" / "report.html").read_text()
