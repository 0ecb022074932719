"""Students on the clock in turns, and what each takes in one and the same state of the host.

Where others use the caches, what is left of them changes from one half minute to the next: EfficientNet-B0 at 64×64
took 1.4 ms for ten seconds and 1.8 for the next twenty, on one thread, and students of few weights the same throughout.
Students timed one behind the other would each tell of another state. So all are timed a little in each turn; and what
the teacher took beside one, above or below what it usually took, is taken off as far as that student goes along with it
(a control variate: Law, "Simulation Modeling and Analysis", section 11.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto

from hantc.core.backend_api import Artefact
from hantc.core.types import Protocol
from hantc.passes.meter import Meter

_LEAST = 2  # turns, whatever the time
_OPEN = 3  # times a file is what its session takes: as it was read, as it runs, and products' own layouts
_APART = 0.06  # of what the teacher takes: turns that differ by less say little of what students make of it
_STEEPEST = 1.5  # times as much more as the teacher, in proportion: what no student goes beyond
_SHARE = 0.01  # of the time left, for each student: some twenty are timed

Turns = list[tuple[float, float]]  # in each turn what a student took, and the teacher beside it, ms


@dataclass(frozen=True)
class Room:
    """What students' sessions may take together, and each one's activations, bytes."""

    together: float
    activations: float


def in_turns(
    meter: Meter,
    teacher: ModelProto,
    students: Sequence[ModelProto],
    protocol: Protocol,
    turns: int,
    room: Room,
    remaining: Callable[[], float] = lambda: math.inf,
    progress: Callable[[float], None] = lambda done: None,
) -> list[Turns]:
    """Time every student beside the teacher in each of so many turns through all of them; the protocol holds for one
    turn. Where they have no room together, groups of them follow one another, or single ones, whose turns then follow
    each other. No further turn begins (but the second) once a group has taken its share of the `remaining` seconds,
    building it apart; `progress` is told each part of a student that is done."""
    found: list[Turns] = []
    _first, beside = meter.ctx.first_session(teacher), meter.build(teacher)
    for group in _groups(students, room):
        found += _group(meter, beside, group, protocol, turns, remaining, progress)
    return found


def _group(
    meter: Meter,
    beside: Artefact,
    group: Sequence[ModelProto],
    protocol: Protocol,
    turns: int,
    remaining: Callable[[], float],
    progress: Callable[[float], None],
) -> list[Turns]:
    built = [meter.build(m) for m in group]
    found: list[Turns] = [[] for _ in group]
    until = remaining()
    most = len(group) * _SHARE * until
    for turn in range(turns):
        if turn >= _LEAST and until - remaining() >= most:
            progress(len(group) * (1 - turn / turns))
            break
        for own, artefact in zip(found, built, strict=True):
            # in pairs: in a round of ten a large teacher finds the caches cold each time
            a, b = meter.measure([beside, artefact], protocol if turn == 0 else replace(protocol, warmup=1))
            own.append((b.median_ms, a.median_ms))
            progress(1 / turns)
    return found


def _groups(models: Sequence[ModelProto], room: Room) -> Iterator[list[ModelProto]]:
    group: list[ModelProto] = []
    taken = 0.0
    for model in models:
        needed = _OPEN * model.ByteSize() + room.activations
        if group and taken + needed > room.together:
            yield group
            group, taken = [], 0.0
        group.append(model)
        taken += needed
    if group:
        yield group


def at_one_state(turns: Turns, usual: float, expected: float) -> float:
    """What a student takes where the teacher beside it takes `usual` ms.

    How much longer it takes for each millisecond that the teacher does is the median of what any two turns say that lie
    apart (Theil and Sen's estimator), never less than 0 nor more than `_STEEPEST`; or as `expected`, where the teacher
    took about the same in all turns but its fastest and its slowest. Medians are moved, not single turns: what students
    take grows faster than in proportion, and straight lines through far turns lie above what near ones took.
    """
    own, beside = np.array(turns, float).T
    middle, ordered, slope = float(np.median(own)), np.sort(beside), expected
    if len(turns) > 3 and ordered[-2] - ordered[1] > _APART * usual:
        i, j = np.triu_indices(len(turns), 1)
        apart = beside[j] - beside[i]
        told = np.abs(apart) > _APART * usual
        slope = float(np.median((own[j] - own[i])[told] / apart[told]))
    teacher = float(np.median(beside))
    moved = middle - min(max(slope, 0.0), _STEEPEST * middle / teacher) * (teacher - usual)
    # far from there a straight line ends at nothing and below; a parabola does not
    return max(moved, middle * (usual / teacher) ** 2) if teacher > usual else moved
