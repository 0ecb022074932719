"""What goes wrong is said clearly, with the right exit code, and leaves nothing half-written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import hantc.cli
from hantc.cli import compile_parser, config_of, main
from hantc.core.errors import HantcError
from hantc.core.progress import Reporter
from hantc.inputs import prepare
from hantc.passes.program import make_problem
from hantc.passes.state import State
from hantc.pipeline import COMPILE, run_passes

if TYPE_CHECKING:
    from tests.conftest import Compiled, Result, Tiny

Cli = Callable[..., "Result"]


def images(n: int = 8, channels: int = 3) -> Any:
    return np.random.default_rng(0).integers(0, 255, (n, 16, 16, channels), np.uint8)


# ---- the model file ----


@pytest.mark.parametrize("content", [b"", b"this is no model", b"\x89PNG\r\n" + bytes(100)])
def test_not_an_onnx_file(attempt: Callable[..., Result], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "wrong.onnx"
    path.write_bytes(content)
    result = attempt(model=path)
    assert str(path) in result.err and "hint:" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_truncated_file(attempt: Callable[..., Result], tiny: Tiny, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.onnx"
    whole = tiny.model.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert str(path) in attempt(model=path).err


def test_missing_file(attempt: Callable[..., Result], tmp_path: Path) -> None:
    assert "no such file" in attempt(model=tmp_path / "none.onnx").err


def test_several_inputs_with_data(attempt: Callable[..., Result], tmp_path: Path) -> None:
    names = ("left", "right")
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3, 16, 16]) for n in names]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3, 16, 16])
    graph = helper.make_graph([helper.make_node("Add", list(names), ["y"])], "g", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "two.onnx"))
    err = attempt(model=tmp_path / "two.onnx").err
    assert "2 inputs (left, right)" in err and "--data can feed only one" in err


def fixed_batch(tiny: Tiny, path: Path, batch: int) -> Path:
    model = onnx.load(str(tiny.model))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(model, str(path))
    return path


def test_batch_on_a_model_of_fixed_batch(attempt: Callable[..., Result], tiny: Tiny, tmp_path: Path) -> None:
    model = fixed_batch(tiny, tmp_path / "fixed.onnx", 1)
    err = attempt("--batch", "8", model=model).err
    assert "fixed at 1" in err and "cannot run 8 at a time" in err and "--batch 1" in err


def test_a_fixed_batch_must_be_asked_for(attempt: Callable[..., Result], tiny: Tiny, tmp_path: Path) -> None:
    err = attempt(model=fixed_batch(tiny, tmp_path / "fixed.onnx", 4)).err
    assert "fixed at 4" in err and "give --batch 4" in err


# ---- the data ----


def test_no_images(attempt: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in attempt(data=tmp_path / "empty").err
    np.savez(tmp_path / "none.npz", x=images(0))
    assert "none.npz" in attempt(data=tmp_path / "none.npz").err
    assert "does not exist" in attempt(data=tmp_path / "nowhere").err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("label", [4, 1000, -1])
def test_labels_out_of_range(attempt: Callable[..., Result], tmp_path: Path, label: int) -> None:
    y = np.arange(8) % 4
    y[3] = label
    np.savez(tmp_path / "d.npz", x=images(), y=y)
    err = attempt(data=tmp_path / "d.npz").err
    assert f"label {label}" in err and "d.npz" in err


def test_wrong_channel_count(attempt: Callable[..., Result], tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=images(channels=4))
    assert "4 channels" in attempt(data=tmp_path / "d.npz").err
    np.savez(tmp_path / "f.npz", x=np.zeros((8, 1, 16, 16), np.float32))
    assert "[1, 16, 16] do not fit the model's input" in attempt(data=tmp_path / "f.npz").err


def test_labels_that_the_teacher_does_not_know(attempt: Callable[..., Result], tiny: Tiny, tmp_path: Path) -> None:
    data = np.load(tiny.data)
    np.savez(tmp_path / "d.npz", x=data["x"], y=(data["y"] + 1) % 4)
    assert "near chance" in attempt("--threads", "1", data=tmp_path / "d.npz").err


def test_val_without_data(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    result = cli(tiny.model, "--val", tiny.data, "--out", tmp_path / "run", "--store", tmp_path / "store")
    assert result.code == 2 and "--val needs --data" in result.err


# ---- options ----


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--target", "toaster"), "unknown target 'toaster'"),
        (("--budget", "0.5", "--max-drop", "1%"), "exclude each other"),
        (("--budget", "soon"), "is not a budget"),
        (("--budget", "1.5"), "more than the teacher's own latency"),
        (("--max-drop", "little"), "is not a number of points"),
        (("--time-limit", "soon"), "is not a duration"),
        (("--time-limit", "0s"), "--time-limit"),
        (("--precision", "fp16"), "has no fp16"),
        (("--threads", "0"), "--threads"),
        (("--batch", "-1"), "--batch"),
        (("--optimized", "--backend", "roofline"), "roofline writes no such file"),
        (("--preprocess", "nothing.json"), "neither a file nor one of"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_bad_options(attempt: Callable[..., Result], options: tuple[str, ...], text: str) -> None:
    assert text in attempt(*options).err


@pytest.mark.parametrize("option", ["--effort=fast", "--threads=two", "--colour=red", "--bud=0.5"])
def test_options_that_the_parser_refuses(cli: Cli, tiny: Tiny, option: str, capsys: Any) -> None:
    assert cli(tiny.model, option).code == 2
    assert not tiny.model.with_suffix(".hantc").exists()


def test_out_is_a_file_or_under_one(attempt: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file, not a folder" in attempt("--out", tmp_path / "file").err
    assert f"{tmp_path / 'file'} is a file" in attempt("--out", tmp_path / "file" / "deep" / "run").err
    assert (tmp_path / "file").read_text() == "mine"


def test_out_cannot_be_written(attempt: Callable[..., Result], tmp_path: Path, monkeypatch: Any) -> None:
    """As an ordinary user sees it (os.access), and as root does, whom os.access tells that all is well."""
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o555)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path) != shut)
        assert "cannot be written to" in attempt("--out", shut / "run").err
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        assert "cannot be written to: Read-only file system" in attempt("--out", tmp_path / "there").err


def refuse(path: Path, *_: Any, **__: Any) -> None:
    if path.name == "there":
        raise OSError(30, "Read-only file system")
    os.makedirs(path, exist_ok=True)


def test_store_cannot_be_written(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = cli(tiny.model, "--out", tmp_path / "run", "--store", tmp_path / "file")
    assert result.code == 2 and "store" in result.err
    assert not (tmp_path / "run").exists()


# ---- constraints that cannot be met ----


def run_until(stage: str, argv: Sequence[str]) -> State:
    """The state behind a stage, with the options of a command line."""
    state, ctx = prepare(config_of(compile_parser().parse_args(argv)), Reporter())
    last = [p.name for p in COMPILE].index(stage)
    with torch.random.fork_rng():
        return run_passes(COMPILE[: last + 1], state, ctx)[0]


def test_budget_below_what_is_reachable(compiled: Compiled, tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    """The answer names the nearest budget, as a share that `--budget` takes; and that one can be met. Predicted, not
    measured: students of ten microseconds are timed some tenths differently each time."""
    argv = [*compiled.argv, "--target", "roofline", "--time-limit", "3s", "--out", str(tmp_path / "run")]
    result = cli(*argv, "--budget", "0.0001")
    assert result.code == 1 and result.out == ""
    assert "cannot be met" in result.err and "Traceback" not in result.err
    found = re.search(r"hint: --budget (\S+),", result.err)
    assert found is not None, result.err
    assert 0.0001 < float(found.group(1)) <= 1
    assert not (tmp_path / "run" / "model.onnx").exists() and not (tmp_path / "run" / "summary.json").exists()
    state = run_until("select", [*argv, "--budget", found.group(1)])
    assert state.plan is not None and state.plan.predicted_latency_ms > 0


def test_fewer_weights_than_can_be_reached(compiled: Compiled, cli: Cli, tmp_path: Path) -> None:
    argv = [*compiled.argv, "--time-limit", "3s", "--out", str(tmp_path / "run"), "--budget-params", "0.0001"]
    result = cli(*argv)
    assert result.code == 1 and "--budget-params" in result.err and "least reachable" in result.err
    found = re.search(r"hint: --budget-params (\S+),", result.err)
    assert found is not None and 0.0001 < float(found.group(1)) <= 1
    assert not (tmp_path / "run" / "summary.json").exists()


def test_no_data_cannot_meet_a_budget(tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    argv = (tiny.model, "--threads", "1", "--out", tmp_path / "run", "--store", tmp_path / "store", "--budget", "0.1")
    result = cli(*argv, "--json")
    assert result.code == 1 and result.json()["status"] == "budget_missed"
    assert "--data lets regions be replaced" in result.err
    assert (tmp_path / "run" / "model.onnx").is_file()  # the nearest there is, and marked as such


# ---- numbers that are none ----


def test_candidates_of_nan_are_dropped(compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One candidate's weights turn NaN, another's so large that its outputs overflow: both are out, with the
    reason, and the others are chosen from."""
    from hantc.passes import distill, training

    spoiled = []

    def spoil(network: Any, jobs: Any, *rest: Any) -> None:
        training.train(network, jobs, *rest)
        alive = [j for j in jobs if not j.rival and list(j.module.parameters())]
        for job, value in zip(alive, (math.nan, 1e38), strict=False):
            with torch.no_grad():
                next(iter(job.module.parameters())).fill_(value)
            spoiled.append((job.region.name, job.spec.name))

    monkeypatch.setattr(distill, "train", spoil)
    state = run_until("score", [*compiled.argv, "--seed", "1", "--time-limit", "3s", "--out", str(tmp_path / "run")])
    assert len(spoiled) == 2 and state.costs is not None and state.match is not None
    reasons = {(r.region, r.candidate): r.dropped for r in state.scores or ()}
    reasons |= {(region, candidate): why for region, candidate, _, why in state.costs.skipped}
    assert all("non-finite" in reasons[key] for key in spoiled)
    offered = {(i.region, i.candidate) for i in make_problem(state, math.inf).items}
    assert not offered & set(spoiled)
    assert {(r.name, "teacher") for r in state.match.regions} <= offered


def test_a_teacher_of_nan_is_refused(attempt: Callable[..., Result], tiny: Tiny, tmp_path: Path) -> None:
    model = onnx.load(str(tiny.model))
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(np.full(tuple(weight.dims), np.nan, np.float32), weight.name))
    onnx.save(model, str(tmp_path / "nan.onnx"))
    assert "nan.onnx" in attempt("--threads", "1", model=tmp_path / "nan.onnx", data=tiny.unlabelled).err


# ---- interruption ----


def test_ctrl_c(tiny: Tiny, tmp_path: Path) -> None:
    """SIGINT in the middle: exit code 130, one line, no result; then the store still serves."""
    out, store = tmp_path / "run", tmp_path / "store"
    argv = [str(tiny.model), "--data", str(tiny.data), "--threads", "1", "--effort", "quick", "--time-limit", "12s"]
    command = [sys.executable, "-m", "hantc.cli", *argv, "--out", str(out), "--store", str(store)]
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as p:
        deadline = time.monotonic() + 120
        while not list((store / "cost").rglob("*.json")) if (store / "cost").exists() else True:
            assert p.poll() is None and time.monotonic() < deadline, p.communicate()
            time.sleep(0.05)
        p.send_signal(signal.SIGINT)
        stdout, stderr = p.communicate(timeout=60)
    assert p.returncode == 130, stderr
    assert stdout == "" and "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("hantc: interrupted; run again with the same options")
    assert not (out / "model.onnx").exists() and not (out / "summary.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert all(json.loads(f.read_text()) for f in (store / "cost").rglob("*.json"))


def test_ctrl_c_gets_past_those_who_swallow_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A library with a bare `except:` does not keep the user from stopping."""
    swallowed = []

    def stubborn(args: object) -> int:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        swallowed.append(True)
        time.sleep(5)
        return 0

    monkeypatch.setattr(hantc.cli, "_INSIST_S", 0.05)
    monkeypatch.setattr(hantc.cli, "_dispatch", stubborn)
    before = signal.getsignal(signal.SIGINT)
    assert main([]) == 130
    assert swallowed and signal.getsignal(signal.SIGINT) is before
    assert "interrupted" in capsys.readouterr().err


def test_broken_off_while_writing(
    compiled: Compiled, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old run's summary goes before the new model comes, and neither stays if the writing fails."""
    out = tmp_path / "run"
    shutil.copytree(compiled.folder, out)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hantc.run._front", fail)
    result = cli(*compiled.argv, "--out", str(out))
    assert result.code == 130
    assert not (out / "model.onnx").exists() and not (out / "summary.json").exists()
    assert cli("inspect", out).code == 2


def test_internal_errors_say_so(cli: Cli, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("hantc.passes.match.match_regions", fail)
    result = cli(tiny.model, "--threads", "1", "--out", tmp_path / "run", "--store", tmp_path / "store")
    assert result.code == 3 and "internal error: ZeroDivisionError: division by zero" in result.err


# ---- finished runs ----


@pytest.mark.parametrize("command", ["inspect", "explain", "diff", "verify"])
def test_no_run_there(cli: Cli, tmp_path: Path, command: str) -> None:
    operands = {"explain": ("r00",), "diff": (tmp_path / "other",)}.get(command, ())
    result = cli(command, tmp_path / "none", *operands)
    assert result.code == 2 and "no such run folder" in result.err


def test_verify_without_the_teacher(cli: Cli, compiled: Compiled, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(compiled.folder, run)
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"model": "/nowhere/teacher.onnx", "options": {**summary["options"], "model": "/nowhere/teacher.onnx"}}
    (run / "summary.json").write_text(json.dumps(summary))
    result = cli("verify", run)
    assert result.code == 2 and "/nowhere/teacher.onnx" in result.err and "no longer there" in result.err


def test_verify_finds_a_tampered_model(cli: Cli, compiled: Compiled, tiny: Tiny, tmp_path: Path) -> None:
    """Other weights in model.onnx: the accuracy is not the recorded one. Without the data nobody can tell."""
    run = tmp_path / "run"
    shutil.copytree(compiled.folder, run)
    model = onnx.load(str(tiny.model))
    head = next(i for i in model.graph.initializer if list(i.dims) == [4, 32])
    head.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(head), head.name))
    onnx.save(model, str(run / "model.onnx"))
    result = cli("verify", run)
    assert result.code == 1 and "not confirmed" in result.out
    assert "student accuracy" in result.out
    summary = json.loads((run / "summary.json").read_text())
    summary["options"]["data"] = str(tmp_path / "gone.npz")
    (run / "summary.json").write_text(json.dumps(summary))
    found = cli("verify", run, "--json").json()
    assert found["student"]["accuracy"] is None and found["agreement"] is None
    assert any("no longer there" in n for n in found["notes"])
    assert not any("accuracy" in d for d in found["differences"])


def test_errors_without_hint_stay_on_one_line() -> None:
    assert str(HantcError("failed", where="here")) == "here: failed"


@pytest.mark.parametrize(
    ("option", "meant"), [("--targt=xeon", "--target"), ("--time-limt", "--time-limit"), ("--jsno", "--json")]
)
def test_a_misspelt_option_is_guessed(cli: Cli, tiny: Tiny, option: str, meant: str) -> None:
    result = cli(tiny.model, option)
    assert result.code == 2
    assert f"hint: did you mean {meant}?" in result.err
