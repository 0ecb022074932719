"""When a teacher counts as guessing: fair to tasks of two classes as to tasks of a thousand."""

from __future__ import annotations

import pytest

from hantc.passes.load import _near_chance


@pytest.mark.parametrize(("classes", "good"), [(2, 60.0), (10, 20.0), (1000, 0.2)])
def test_a_teacher_that_is_better_than_guessing_passes(classes: int, good: float) -> None:
    chance = 100 / classes
    assert chance < _near_chance(classes) < good
