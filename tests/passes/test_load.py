"""Whether a model can be a teacher."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from hantc.passes import load
from hantc.passes.load import Load, _near_chance
from tests.passes.conftest import warnings

if TYPE_CHECKING:
    from tests.passes.conftest import Lab


@pytest.mark.parametrize(("classes", "good"), [(2, 60.0), (10, 20.0), (1000, 0.2)])
def test_a_teacher_that_is_better_than_guessing_passes(classes: int, good: float) -> None:
    """Fair to tasks of two classes as to tasks of a thousand."""
    chance = 100 / classes
    assert chance < _near_chance(classes) < good


@pytest.mark.parametrize(("apart", "text"), [(0.0, ""), (0.3, "30 % of the largest"), (math.inf, "another shape")])
def test_an_import_unlike_onnxruntime_is_told(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, apart: float, text: str
) -> None:
    monkeypatch.setattr(load, "disagreement", lambda *_: apart)
    ctx = lab.context()
    assert Load().call(lab.begin(), ctx).teacher is not None
    assert [text in t for t in warnings(ctx)] == ([True] if apart else [])


def test_a_sound_import_is_not(lab: Lab) -> None:
    ctx = lab.context()
    Load().call(lab.begin(), ctx)
    assert not warnings(ctx)
