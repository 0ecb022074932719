"""What weights cost that the caches do not hold, and how a whole network is balanced with its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, numpy_helper

from hantc.core.backend_api import Artefact, BuildSpec
from hantc.core.types import Fetching
from hantc.passes.fetching import Balance, Beginning, balance, fit_fetching, measure_beginnings
from hantc.passes.glue import Glue, measure_glue, teachers_rows
from hantc.passes.meter import Meter
from tests.passes.test_glue import ROWS, any_row
from tests.passes.test_meter import Moody
from tests.passes.test_program import chain

if TYPE_CHECKING:
    from tests.passes.conftest import Lab

HEAVY = [replace(r, params=2_000_000 if r.region in ("r00", "r01") else 0) for r in ROWS]  # 8 MB each
# one thread of a host whose caches others use: EfficientNet-B0 at 64×64, MB and ms of its beginnings
CROWDED = [
    Beginning(w, p, t)
    for w, p, t in (
        (1.72, 0.573, 0.598), (3.37, 0.732, 0.752), (4.42, 0.795, 0.829), (6.76, 0.877, 0.933),
        (9.10, 0.977, 1.042), (11.44, 1.069, 1.150), (14.30, 1.192, 1.434),
    )
]  # fmt: skip
WHOLE = Beginning(15.95, 1.236, 1.703)


def test_whole_and_parts_differ_by_a_factor() -> None:
    found = balance(chain(), ROWS, teacher_ms=7.0, glue_ms=0.5)
    assert found.scale == pytest.approx(7.0 / 6.5) and found.fetching == Fetching()
    assert 6 * found.scale + found.glue_ms == pytest.approx(7.0)


def test_without_a_glue_of_its_own_it_is_what_is_left() -> None:
    assert balance(chain(), ROWS, teacher_ms=7.0, glue_ms=None) == Balance(1.0)
    found = balance(chain(), ROWS, teacher_ms=5.0, glue_ms=None)
    assert found.glue_ms == pytest.approx(0.1) and 6 * found.scale + found.glue_ms == pytest.approx(5.0)


@pytest.mark.parametrize("teacher_ms", [3.0, 20.0])
def test_a_whole_far_from_its_parts_is_not_scaled_to_them(teacher_ms: float) -> None:
    found = balance(chain(), ROWS, teacher_ms, glue_ms=0.5)
    assert found == balance(chain(), ROWS, teacher_ms, glue_ms=None)


def test_a_network_without_regions_is_all_glue() -> None:
    assert balance((), [], 4.0, None) == Balance(4.0)


def test_weights_take_less_in_int8() -> None:
    row = replace(ROWS[0], params=1_000_000)
    sizes = [replace(row, precision=p).weight_mb for p in ("fp32", "fp16", "bf16", "int8")]
    assert sizes == [4.0, 2.0, 2.0, 1.0]


def test_what_a_teacher_takes_for_its_weights_is_told_apart() -> None:
    """It takes half as long again as its parts, and its first two thirds, with half of the weights, hardly longer."""
    assert sum(r.weight_mb for r in teachers_rows(chain(), HEAVY)) == pytest.approx(16.0)
    beginnings = [Beginning(8.0, 2.0, 2.06), Beginning(16.0, 4.0, 4.12 + 3.0)]
    found = balance(chain(), HEAVY, 6.5 * 1.03 + 3.0, 0.5, beginnings)
    assert found.scale == pytest.approx(1.03) and found.glue_ms == pytest.approx(0.5 * 1.03)
    assert 8.0 <= found.fetching.free_mb < 16.0 and found.fetching.ms(16.0) == pytest.approx(3.0)


def test_the_real_teachers_beginnings_are_fitted() -> None:
    scale, fetching = fit_fetching(CROWDED, WHOLE)
    assert 1.02 <= scale <= 1.08 and 9.0 <= fetching.free_mb <= 14.0
    assert scale * WHOLE.apart_ms + fetching.ms(WHOLE.weight_mb) == pytest.approx(WHOLE.together_ms)
    misses = [(scale * b.apart_ms + fetching.ms(b.weight_mb)) / b.together_ms - 1 for b in CROWDED]
    assert max(map(abs, misses)) < 0.04, misses


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.floats(1.0, 1.2),
    st.floats(0.0, 0.9),
    st.floats(0.0, 0.1),
    st.lists(st.tuples(st.floats(0.1, 3.0), st.floats(0.05, 0.3)), min_size=4, max_size=10),
    st.integers(0, 9),
)
def test_what_networks_are_made_of_is_found(
    scale: float, held: float, rate: float, regions: list[tuple[float, float]], outlier: int
) -> None:
    """Any factor, any size of cache, any cost of what is beyond it; with one beginning timed in a bad moment the rest
    are still told rightly, unless it is one of few."""
    weights = [sum(w for w, _ in regions[: k + 1]) for k in range(len(regions))]
    apart = [0.1 + sum(ms for _, ms in regions[: k + 1]) for k in range(len(regions))]
    truth = Fetching(held * weights[-1], rate)
    points = [Beginning(w, p, scale * p + truth.ms(w)) for w, p in zip(weights, apart, strict=True)]
    timed = [replace(b, together_ms=1.3 * b.together_ms) if k == outlier else b for k, b in enumerate(points[:-1])]
    found, fetching = fit_fetching(timed, points[-1])
    whole = points[-1]
    assert found * whole.apart_ms + fetching.ms(whole.weight_mb) == pytest.approx(whole.together_ms)
    assert 1.0 - 1e-9 <= found <= whole.together_ms / whole.apart_ms + 1e-9
    if outlier >= len(regions) - 1:
        worst = max(abs((found * b.apart_ms + fetching.ms(b.weight_mb)) / b.together_ms - 1) for b in points)
        assert worst < 0.05


@pytest.mark.parametrize("beginnings", [[], CROWDED])
def test_a_teacher_faster_than_its_parts_fetches_nothing(beginnings: Sequence[Beginning]) -> None:
    scale, fetching = fit_fetching(beginnings, replace(WHOLE, together_ms=0.9 * WHOLE.apart_ms))
    assert scale == pytest.approx(0.9) and fetching == Fetching()


def test_memory_is_not_slower_than_a_quarter_of_a_millisecond_a_megabyte() -> None:
    """What takes longer is everybody's: another reason than weights."""
    slow = Beginning(16.0, 6.5, 6.5 + 4.0 + 0.65)
    scale, fetching = fit_fetching([Beginning(8.0, 3.0, 3.0)], slow)
    assert scale == pytest.approx(1.1) and fetching.ms(16.0) == pytest.approx(4.0)


class Forgetful(Moody):
    """A machine that takes a millisecond for each node, and one for each kilobyte of weights above `held` of them."""

    def __init__(self, held: float) -> None:
        super().__init__([1.0])
        self.held = held

    def build(self, model: ModelProto, spec: BuildSpec) -> Artefact:
        weights = sum(numpy_helper.to_array(w).nbytes for w in model.graph.initializer) / 1e3
        return Artefact(len(model.graph.node) + max(0.0, weights - self.held))


def test_beginnings_are_timed_where_the_teacher_takes_long(lab: Lab) -> None:
    state = lab.costed
    assert state.match is not None and state.costs is not None
    meter = Meter(lab.fresh(backend=Forgetful(20.0)))
    glue = measure_glue(meter, state, [any_row(state)])
    assert glue is not None
    blocks = [r for r in state.match.regions if len(r.atoms) == 1]
    rows = [replace(any_row(state), region=r.name, candidate="teacher", precision="fp32", params=r.params,
                    latency_ms=float(len(r.nodes))) for r in blocks]  # fmt: skip
    parts = glue.ms + sum(r.latency_ms for r in rows)
    assert measure_beginnings(meter, state, rows, glue, 1.04 * parts) == []
    assert measure_beginnings(meter, state, rows, None, 2 * parts) == []
    found = measure_beginnings(meter, state, rows, glue, 2 * parts)
    assert len(found) >= 2 and [b.weight_mb for b in found] == sorted(b.weight_mb for b in found)
    assert found[-1].weight_mb == pytest.approx(sum(r.weight_mb for r in rows))
    assert found[-1].apart_ms == pytest.approx(parts - glue.last_ms)
    assert found[-1].together_ms > found[-1].apart_ms, "it has more weights than are held"
    assert Meter(lab.fresh()).ctx.capabilities.measures is False
    assert measure_beginnings(Meter(lab.fresh()), state, rows, glue, 2 * parts) == [], "nothing is measured"
    rows[0] = replace(rows[0], latency_ms=1e9)
    assert measure_beginnings(meter, state, rows, glue, 2 * parts) == [], "the engine does not take one of them alone"


def test_glue_adds_up() -> None:
    assert Glue(0.1, {"r00": 0.2, "r01": 0.0}, 0.3, 0.4).ms == pytest.approx(1.0)
