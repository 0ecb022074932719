"""hantc as one pass among others, in torch's own PassManager."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from hantc.core.errors import UsageError
from hantc.dialect.importer import import_file
from hantc.integrations.fx import HantPass

if TYPE_CHECKING:
    from tests.conftest import Compiled, Tiny


class Count(PassBase):
    """Another pass: counts nodes, changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Look."""
        self.seen.append(len(graph_module.graph.nodes))
        return PassResult(graph_module, False)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * a.abs().max())


def test_with_data(tiny: Tiny, compiled: Compiled, tmp_path: Path) -> None:
    """A graph of hantc's leaves goes in, its replaced student comes out, between two other passes."""
    hant = HantPass(
        out=tmp_path / "run",
        data=tiny.data,
        budget=0.9,
        effort="quick",
        time_limit="3s",
        threads=1,
        store=compiled.store,
    )
    before, after = Count(), Count()
    network = import_file(tiny.model)
    result = PassManager(passes=[before, hant, after], run_checks_after_each_pass=True)(network)
    assert hant.run is not None and result.modified
    student = result.graph_module
    student.graph.lint()
    x = torch.from_numpy(tiny.feeds())
    with torch.no_grad():
        teacher_out, student_out = network(x), student(x)
    assert student_out.shape == teacher_out.shape
    assert len(before.seen) == len(after.seen) == 1
    changed = {c.region for c in hant.run.summary.choices if (c.candidate, c.precision) != ("teacher", "fp32")}
    assert changed and changed <= {n.name for n in student.graph.nodes}


def test_without_data_nothing_is_replaced(tiny: Tiny, tmp_path: Path) -> None:
    hant = HantPass(out=tmp_path / "run", threads=1, store=tmp_path / "store")
    network = import_file(tiny.model)
    result = PassManager(passes=[hant])(network)
    assert not result.modified
    x = torch.from_numpy(tiny.feeds())
    with torch.no_grad():
        assert close(network(x), result.graph_module(x))
    assert (tmp_path / "run" / "teacher.onnx").is_file() and (tmp_path / "run" / "model.onnx").is_file()


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="torch's exporter needs onnxscript")
def test_a_foreign_graph_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.Flatten())
    traced = fx.symbolic_trace(body.eval())
    hant = HantPass(out=tmp_path / "run", example_input=torch.zeros(1, 3, 8, 8), threads=1, store=tmp_path / "store")
    result = PassManager(passes=[hant])(traced)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert close(traced(x), result.graph_module(x))


def test_a_foreign_graph_needs_an_example(tmp_path: Path) -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(UsageError, match="example_input"):
        HantPass(out=tmp_path / "run")(traced)
