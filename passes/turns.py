"""Students on the clock in turns, and what each takes in one and the same state of the host.

Where others use the caches, what is left of them changes from one half minute to the next: EfficientNet-B0 at 64×64
took 1.4 ms for ten seconds and 1.8 for the next twenty, on one thread, and students of few weights the same throughout.
Students timed one behind the other would each tell of another state. So all are timed a little in each turn; and what
the teacher took beside one, above or below what it usually took, is taken off as far as that student goes along with it
(a control variate: Law, "Simulation Modeling and Analysis", section 11.4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from onnx import ModelProto

from hantc.core.types import Protocol
from hantc.passes.meter import Meter

_OPEN_BYTES = 1 << 30  # of students' files whose sessions are open at once
_APART = 0.03  # of what the teacher takes: two turns that differ by less say nothing of what students make of it
_PAIRS = 3

Turns = list[tuple[float, float]]  # in each turn what a student took, and the teacher beside it, ms


def in_turns(
    meter: Meter,
    teacher: ModelProto,
    students: Sequence[ModelProto],
    protocol: Protocol,
    turns: int,
    progress: Callable[[float], None],
) -> list[Turns]:
    """Time every student beside the teacher in each of so many turns through all of them; the protocol holds for one
    turn. Where their files are too large to be open at once, groups of them follow one another. `progress` is told each
    share that is done."""
    found: list[Turns] = []
    for group in _groups(students):
        beside, *built = [meter.build(m) for m in (teacher, *group)]
        mine: list[Turns] = [[] for _ in group]
        for _ in range(turns):
            for own, artefact in zip(mine, built, strict=True):
                # in pairs: in a round of ten a large teacher finds the caches cold each time
                a, b = meter.measure([beside, artefact], protocol)
                own.append((b.median_ms, a.median_ms))
                progress(1 / turns / len(students))
        found += mine
    return found


def _groups(models: Sequence[ModelProto]) -> Iterator[list[ModelProto]]:
    group: list[ModelProto] = []
    for model in models:
        if group and sum(m.ByteSize() for m in [*group, model]) > _OPEN_BYTES:
            yield group
            group = []
        group.append(model)
    if group:
        yield group


def at_one_state(turns: Turns, usual: float, expected: float) -> float:
    """What a student takes where the teacher beside it takes `usual` ms.

    How much longer it takes for each millisecond that the teacher does is the median of what any two turns say (Theil
    and Sen's estimator: a turn or two that something else disturbed do not move it), never less than 0, nor more than
    2; or as `expected`, where the teacher took about the same in all. Medians are moved, not single turns: what
    students take grows faster than in proportion, and straight lines through far turns lie above what near ones took.
    """
    own, beside = np.array(turns, float).T
    i, j = np.triu_indices(len(turns), 1)
    apart = beside[j] - beside[i]
    told = np.abs(apart) > _APART * usual
    slope = float(np.median((own[j] - own[i])[told] / apart[told])) if told.sum() >= _PAIRS else expected
    return float(np.median(own) - min(max(slope, 0.0), 2.0) * (np.median(beside) - usual))
