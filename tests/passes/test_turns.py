"""Students timed in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import ModelProto

from hantc.core.backend_api import Artefact, BuildSpec
from hantc.core.types import Protocol, Timing
from hantc.passes import turns
from hantc.passes.meter import Meter
from hantc.passes.turns import Room, at_one_state, in_turns
from tests.passes.test_meter import Moody, chain

if TYPE_CHECKING:
    from tests.passes.conftest import Lab

STATES = [1.3, 1.9, 2.2, 1.6, 2.0, 1.4, 1.8]  # what the teacher takes, turn by turn


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0, 1.2])
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
    for last in ((1.6, 2.2), (1.0, 3.5), (0.6, 1.2)):  # of five, all but one of them in one state
        assert at_one_state([(1.0, 2.0)] * 4 + [last], 1.8, 0.5) == pytest.approx(0.9), last
    for last in ((0.5, 2.2), (0.3, 0.9)):
        assert at_one_state([(0.3, 2.0)] * 4 + [last], 1.8, 0.1) == pytest.approx(0.28), last


def test_noise_is_no_slope() -> None:
    """Students that do not go along with the teacher, its turns all about alike, and another state asked for: figures
    differ by what turns differ, and not by more."""
    rng = np.random.default_rng(2)
    figures = []
    for _ in range(300):
        noise = 1 + rng.normal(0, 0.015, (5, 2))
        figures.append(at_one_state([(0.3 * a, 1.8 * b) for a, b in noise.tolist()], 1.5, 0.0))
    assert np.std(figures) < 0.3 * 0.015 and min(figures) > 0.9 * 0.3


def test_what_grows_ever_faster_is_not_taken_for_more() -> None:
    """Nothing up to 1.6 ms of the teacher's, then more and more: at its usual state a student takes what it took."""
    own = [(1.0 + max(0.0, t - 1.6) ** 2, t) for t in STATES]
    assert at_one_state(own, 1.8, 0.4) == pytest.approx(1.04)


@pytest.mark.parametrize("slope", [-1.0, 5.0])
def test_chance_is_not_taken_for_the_host(slope: float) -> None:
    """No student is faster where the teacher is slower, and none is moved without end, whatever was expected."""
    own = [(3.0 + slope * (t - 1.8), t) for t in STATES]
    moved = at_one_state(own, 2.3, 0.5) - at_one_state(own, 1.8, 0.5)
    assert moved == pytest.approx(0.0 if slope < 0 else 1.5 * 3.0 / 1.8 * 0.5)
    assert at_one_state([(0.3, 2.0)] * 5, 1.0, 2.0) == pytest.approx(0.3 - 1.5 * 0.15)


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
    """Keeps the sizes of what is timed behind the teacher, in order, and how many are built and open."""

    def __init__(self) -> None:
        super().__init__([1.0])
        self.seen: list[int] = []
        self.warmups: list[int] = []
        self.built: list[int] = []

    def build(self, model: ModelProto, spec: BuildSpec) -> Artefact:
        artefact = super().build(model, spec)
        self.built.append(artefact.handle)
        return artefact

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        if len(artefacts) == 4:  # teacher, student, and the reference network twice
            self.seen.append(artefacts[1].handle)
            self.warmups.append(protocol.warmup)
        return super().measure(artefacts, protocol)


MUCH = Room(1e12, 0.0)
STUDENTS = [chain(n) for n in (2, 3, 4)]


def timed(
    lab: Lab, machine: Moody, students: Sequence[ModelProto], count: int, room: Room = MUCH, **rest: Any
) -> list[turns.Turns]:
    meter, done = Meter(lab.fresh(backend=machine)), list[float]()
    found = in_turns(meter, chain(9), students, meter.thorough, count, room, progress=done.append, **rest)
    assert sum(done) == pytest.approx(len(students))
    return found


def test_all_are_timed_a_little_in_each_turn(lab: Lab) -> None:
    machine = Recorder()
    found = timed(lab, machine, STUDENTS, 3)
    assert machine.seen == [2, 3, 4] * 3
    assert machine.built[-4:] == [9, 2, 3, 4] and machine.built.count(9) == 2, "once for the heap, once for all turns"
    assert machine.warmups == [2] * 3 + [1] * 6
    assert found == [[(float(n), 9.0)] * 3 for n in (2, 3, 4)]
    assert timed(lab, machine, [], 3) == []


@pytest.mark.parametrize(
    ("room", "order"),
    [
        (Room(6.5 * STUDENTS[1].ByteSize(), 0.0), [2, 3, 2, 3, 4, 4]),
        (Room(6.5 * STUDENTS[1].ByteSize(), STUDENTS[1].ByteSize()), [2, 2, 3, 3, 4, 4]),
        (Room(0.0, 0.0), [2, 2, 3, 3, 4, 4]),
    ],
)
def test_what_has_no_room_together_is_timed_in_groups(lab: Lab, room: Room, order: list[int]) -> None:
    machine = Recorder()
    assert timed(lab, machine, STUDENTS, 2, room) == [[(float(n), 9.0)] * 2 for n in (2, 3, 4)]
    assert machine.seen == order and machine.built.count(9) == 2


def test_where_it_is_late_there_are_two_turns(lab: Lab) -> None:
    """A second passes each time somebody asks, and a student may take one in a hundred of what is left."""
    left = 130.0

    def remaining() -> float:
        nonlocal left
        left -= 1.0
        return left

    machine = Recorder()
    found = timed(lab, machine, STUDENTS, 5, remaining=remaining)
    assert [len(own) for own in found] == [5] * 3, "129 seconds are left, 3.87 for all turns"
    left = 30.0
    found = timed(lab, machine, STUDENTS, 5, remaining=remaining)
    assert [len(own) for own in found] == [2] * 3
    left = 290.0
    found = timed(lab, machine, STUDENTS, 5, Room(0.0, 0.0), remaining=remaining)
    assert [len(own) for own in found] == [4, 4, 4], "groups have their own share of the time"


def test_no_student_is_told_to_take_nothing() -> None:
    """A teacher beside it that takes three times its usual time, and a student that goes along with it all the way."""
    turns = [(1.0 + 1.5 * k / 30, 3.0 + k / 10) for k in range(-5, 6)]
    assert at_one_state(turns, 1.0, 0.0) == pytest.approx(1 / 9)
    assert at_one_state(turns, 2.9, 0.0) == pytest.approx(0.95, abs=0.002)


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
    drift = (0.0, 4.0, 9.0, 2.0, 6.0, 12.0, 1.0)  # of other length than a turn
    found = timed(lab, Drifting(drift), [chain(6)] * 4, 5)
    usual = float(np.median([t for own in found for _, t in own]))
    plain = [float(np.median([ms for ms, _ in own])) for own in found]
    assert max(plain) > 1.05 * min(plain), "as timed they differ"
    assert [at_one_state(own, usual, 0.0) for own in found] == pytest.approx([6 + (usual - 9) * 2 / 3] * 4, rel=0.01)
