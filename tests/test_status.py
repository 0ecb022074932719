"""What a run's figures make of its status."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from hantc.core.config import Budget, Cap
from hantc.run import _status
from tests.passes.conftest import Lab

if TYPE_CHECKING:
    from pathlib import Path

TEACHER = {"latency_ms": 2.0, "params": 1000, "macs": 5000, "activation_bytes": 400}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """One of this file's own: it is not among the passes' tests."""
    folder: Path = tmp_path_factory.mktemp("status")
    return Lab(folder)


def status(lab: Lab, options: dict[str, Any], **student: float) -> str:
    ctx = lab.fresh()
    ctx = replace(ctx, config=ctx.config.model_copy(update=options))
    summary = {"teacher": TEACHER, "student": {**TEACHER, **student}, "accuracy_drop": 0.4, "agreement": 0.9}
    return _status(replace(lab.matched, summary=summary), ctx)


@pytest.mark.parametrize(
    ("option", "figure"),
    [("budget_params", "params"), ("budget_macs", "macs"), ("budget_memory", "activation_bytes")],
)
def test_a_figure_above_its_cap_misses_the_budget(lab: Lab, option: str, figure: str) -> None:
    cap = {option: Cap(fraction=0.5), "budget": None, "max_drop": None}
    assert status(lab, cap, **{figure: 0.5 * TEACHER[figure]}) == "done"
    assert status(lab, cap, **{figure: 0.52 * TEACHER[figure]}) == "budget_missed"


def test_latency_and_drop(lab: Lab) -> None:
    assert status(lab, {"budget": Budget(fraction=0.5), "max_drop": None}, latency_ms=1.0) == "done"
    assert status(lab, {"budget": Budget(fraction=0.5), "max_drop": None}, latency_ms=1.2) == "budget_missed"
    assert status(lab, {"budget": None, "max_drop": 0.5}) == "done"
    assert status(lab, {"budget": None, "max_drop": 0.3}) == "drop_exceeded"
