"""Students timed in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from onnx import ModelProto

from hantc.core.backend_api import Artefact
from hantc.core.types import Protocol, Timing
from hantc.passes import turns
from hantc.passes.meter import Meter
from hantc.passes.turns import at_one_state, in_turns
from tests.passes.test_meter import Moody, chain

if TYPE_CHECKING:
    from tests.passes.conftest import Lab

STATES = [1.3, 1.9, 2.2, 1.6, 2.0, 1.4, 1.8]  # what the teacher takes, turn by turn


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0, 1.6])
@pytest.mark.parametrize("usual", [1.3, 1.8])
def test_a_student_is_brought_to_the_teachers_usual_state(slope: float, usual: float) -> None:
    own = [(0.9 + slope * (t - 1.3), t) for t in STATES]
    assert at_one_state(own, usual, 0.4) == pytest.approx(0.9 + slope * (usual - 1.3))


def test_what_its_turns_do_not_tell_follows_from_what_is_expected() -> None:
    """All its turns fell into one state, and the others' into another."""
    own = [(1.0, 2.0)] * 5
    assert at_one_state(own, 1.8, 0.5) == pytest.approx(0.9)
    assert at_one_state(own, 1.8, 0.0) == 1.0
    assert at_one_state([(1.0, 2.0)], 1.8, 0.5) == pytest.approx(0.9), "of a single turn"


def test_a_disturbed_turn_moves_nothing() -> None:
    own = [(0.9 + 0.5 * (t - 1.3), t) for t in STATES]
    own[2] = (4.0, 2.2)
    assert at_one_state(own, 1.5, 0.4) == pytest.approx(1.0, rel=0.05)


def test_what_grows_ever_faster_is_not_taken_for_more() -> None:
    """Nothing up to 1.6 ms of the teacher's, then more and more: at its usual state a student takes what it took."""
    own = [(1.0 + max(0.0, t - 1.6) ** 2, t) for t in STATES]
    assert at_one_state(own, 1.8, 0.4) == pytest.approx(1.04)


@pytest.mark.parametrize("slope", [-1.0, 5.0])
def test_chance_is_not_taken_for_the_host(slope: float) -> None:
    """No student is faster where the teacher is slower, and none is moved without end."""
    own = [(3.0 + slope * (t - 1.8), t) for t in STATES]
    moved = at_one_state(own, 2.3, 0.5) - at_one_state(own, 1.8, 0.5)
    assert moved == pytest.approx(0.0 if slope < 0 else 2.0 * 0.5)


def test_figures_spread_less_than_they_were_timed() -> None:
    """Students that go along with the teacher, with noise of their own, in five turns of a drifting state each."""
    rng = np.random.default_rng(0)
    plain, moved = [], []
    for _ in range(200):
        states = 1.3 + np.abs(rng.normal(0.5, 0.3, 5))
        own = [((1.0 + 0.7 * (t - 1.8)) * (1 + rng.normal(0, 0.02)), t) for t in states.tolist()]
        plain.append(float(np.median([ms for ms, _ in own])))
        moved.append(at_one_state(own, 1.8, 0.4))
    assert np.std(moved) < 0.5 * np.std(plain)
    assert np.mean(moved) == pytest.approx(1.0, abs=0.01)


class Recorder(Moody):
    """Keeps the sizes of what is timed behind the teacher, in order."""

    def __init__(self) -> None:
        super().__init__([1.0])
        self.seen: list[int] = []

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        if len(artefacts) == 4:  # teacher, student, and the reference network twice
            self.seen.append(artefacts[1].handle)
        return super().measure(artefacts, protocol)


def timed(lab: Lab, machine: Moody, students: Sequence[ModelProto], count: int) -> list[turns.Turns]:
    meter, shares = Meter(lab.fresh(backend=machine)), list[float]()
    found = in_turns(meter, chain(9), students, meter.protocol, count, shares.append)
    assert sum(shares) == pytest.approx(1.0 if students else 0.0)
    return found


def test_all_are_timed_a_little_in_each_turn(lab: Lab) -> None:
    machine = Recorder()
    found = timed(lab, machine, [chain(n) for n in (2, 3, 4)], 3)
    assert machine.seen == [2, 3, 4] * 3
    assert found == [[(float(n), 9.0)] * 3 for n in (2, 3, 4)]
    assert timed(lab, machine, [], 3) == []


def test_what_cannot_be_open_at_once_is_timed_in_groups(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    students = [chain(n) for n in (2, 3, 4)]
    for most, order in ((sum(m.ByteSize() for m in students[:2]), [2, 3, 2, 3, 4, 4]), (1, [2, 2, 3, 3, 4, 4])):
        monkeypatch.setattr(turns, "_OPEN_BYTES", most)
        machine = Recorder()
        assert timed(lab, machine, students, 2) == [[(float(n), 9.0)] * 2 for n in (2, 3, 4)]
        assert machine.seen == order


class Drifting(Moody):
    """The teacher (the first of four) takes longer from call to call, a student two thirds as much."""

    def __init__(self, drift: Sequence[float]) -> None:
        super().__init__([1.0])
        self.drift, self.at = list(drift), 0

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        found = super().measure(artefacts, protocol)
        if len(artefacts) != 4:
            return found
        more = self.drift[self.at % len(self.drift)]
        self.at += 1
        teacher, student, *rest = found
        teacher = replace(teacher, median_ms=teacher.median_ms + more)
        return [teacher, replace(student, median_ms=student.median_ms + more * 2 / 3), *rest]


def test_students_alike_take_the_same_whenever_they_were_timed(lab: Lab) -> None:
    drift = np.abs(np.random.default_rng(1).normal(2.0, 1.0, 23)).tolist()  # of other length than a turn
    found = timed(lab, Drifting(drift), [chain(6)] * 4, 5)
    usual = float(np.median([t for own in found for _, t in own]))
    plain = [float(np.median([ms for ms, _ in own])) for own in found]
    assert max(plain) > 1.05 * min(plain), "as timed they differ"
    assert [at_one_state(own, usual, 0.0) for own in found] == pytest.approx([6 + (usual - 9) * 2 / 3] * 4, rel=0.01)
