"""hantc inside a Python program."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from torch import fx, nn

import hantc
from hantc import inputs
from hantc.core.errors import ModelError, UsageError

if TYPE_CHECKING:
    from tests.conftest import Compiled, Tiny

Array = np.ndarray[Any, Any]
RunModel = Callable[[Path, Array], Array]


class Plain(nn.Module):
    """A network of torch's own modules, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 16, 16) → (N, 4)."""
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(x) + x)
        out: torch.Tensor = self.head(x.mean((2, 3)))
        return out


def outputs(module: nn.Module, x: Array) -> Array:
    with torch.no_grad():
        out: Array = module(torch.from_numpy(x)).numpy()
    return out


def close(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() <= 1e-4 * np.abs(a).max())


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, hantc; print(sorted(m for m in ('torch', 'onnx', 'numpy', 'onnxruntime') if m in sys.modules))"
    root = str(Path(hantc.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_compile_a_file_in_fp32(
    tiny: Tiny, compiled: Compiled, tmp_path: Path, run_model: RunModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With data and in fp32 the student module computes what the file computes."""
    monkeypatch.setattr("hantc.passes.score._MAX_DROP", 101.0)  # seconds of training make no good candidates
    run = hantc.compile(
        tiny.model,
        data=tiny.data,
        budget=0.9,
        precision="fp32",
        effort="quick",
        time_limit="3s",
        threads=1,
        out=tmp_path / "run",
        store=compiled.store,
    )
    assert isinstance(run.student, fx.GraphModule) and run.folder == tmp_path / "run"
    assert {c.precision for c in run.summary.choices} == {"fp32"}
    assert any(c.candidate != "teacher" for c in run.summary.choices)
    assert run.summary.status in ("done", "budget_missed")
    x = tiny.feeds()
    assert close(run_model(run.model_path, x), outputs(run.student, x))
    assert run.report_path.is_file()
    assert hantc.load_run(run.folder).summary == run.summary


def test_torch_settings_are_given_back(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(inputs, "physical_cores", lambda: 2)
    seen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    hantc.compile(tiny.model, threads=1, out=tmp_path / "run", store=tmp_path / "store")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert seen == [2, 3]  # not the target's one: that is what is timed


def test_loaded_run_computes_what_its_file_does(compiled: Compiled, tiny: Tiny, run_model: RunModel) -> None:
    """Whatever the precision: INT8 regions come back with their rounding."""
    run = hantc.load_run(compiled.folder)
    x = tiny.feeds()
    got, wanted = outputs(run.student, x), run_model(run.model_path, x)
    assert np.abs(got - wanted).max() <= 0.05 * np.abs(wanted).max()
    assert (got.argmax(1) == wanted.argmax(1)).mean() >= 0.9


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="torch's exporter needs onnxscript")
def test_compile_a_module(tmp_path: Path, run_model: RunModel) -> None:
    module = Plain()
    x = np.random.default_rng(0).normal(size=(5, 3, 16, 16)).astype(np.float32)
    run = hantc.compile(
        module, example_input=torch.zeros(1, 3, 16, 16), threads=1, out=tmp_path / "run", store=tmp_path / "store"
    )
    assert module.training  # as it was
    wanted = outputs(module.eval(), x)
    assert close(wanted, outputs(run.student, x)) and close(wanted, run_model(run.model_path, x))
    assert run.summary.model == str(tmp_path / "run" / "teacher.onnx")
    assert close(wanted, run_model(Path(run.summary.model), x))  # so that `hantc verify` has a teacher
    (batch, *_) = onnx.load(str(run.model_path)).graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param  # the batch stays dynamic


def test_a_module_needs_an_example(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs example_input"):
        hantc.compile(Plain(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_module_needs_onnxscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else find(name, *a))
    with pytest.raises(UsageError, match="onnxscript") as caught:
        hantc.compile(Plain(), example_input=torch.zeros(1, 3, 16, 16), out=tmp_path / "run")
    assert "pip install onnxscript" in caught.value.hint
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="torch's exporter needs onnxscript")
def test_a_module_that_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"torch\.onnx\.export cannot export it"):
        hantc.compile(Plain(), example_input=torch.zeros(1, 5), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budgit": 0.5}, "budgit: no such option"),
        ({"effort": "fast"}, "--effort"),
        ({"budget": "soon"}, "is not a budget"),
        ({"budget": 0.5, "max_drop": 1.0}, "exclude each other"),
        ({"target": "toaster"}, "unknown target"),
        ({"threads": 0}, "--threads"),
    ],
)
def test_bad_options(tiny: Tiny, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        hantc.compile(tiny.model, out=tmp_path / "run", store=tmp_path / "store", **options)
    assert not (tmp_path / "run").exists()


def test_load_run_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a finished run folder"):
        hantc.load_run(tmp_path)
