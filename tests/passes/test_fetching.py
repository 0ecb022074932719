"""What weights cost that the caches do not hold, and how a whole network is balanced with its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, numpy_helper

from hantc.core.backend_api import Artefact, BuildSpec
from hantc.core.errors import ModelError
from hantc.core.types import Fetching
from hantc.passes.fetching import (
    Balance,
    Beginning,
    Beginnings,
    balance,
    fetching_for,
    fit_fetching,
    measure_beginnings,
)
from hantc.passes.glue import Glue, measure_glue, teachers_rows
from hantc.passes.meter import Meter
from tests.passes.conftest import CLASSES
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
    some = (Beginning(4.0, 1.0, 1.03), Beginning(8.0, 2.0, 2.06), Beginning(16.0, 4.0, 4.12 + 1.0))
    beginnings = Beginnings(some, Beginning(16.0, 6.5, 6.5 * 1.03 + 1.0), 0.0)
    found = balance(chain(), HEAVY, 6.5 * 1.03 + 1.5, 0.5, beginnings)
    assert found.scale == pytest.approx(1.03) and found.glue_ms == pytest.approx(0.5 * 1.03)
    assert found.fetching.mb_per_ms == pytest.approx(16.0 / 6.5 / 1.03), "as much again, while the teacher runs"
    assert found.fetching.load_mb(7.9, 2.06 - 0.5) <= found.fetching.free_mb <= found.fetching.load_mb(9.5, 2.5)
    load = found.fetching.load_mb(16.0, 6.0 * 1.03)
    assert found.fetching.ms(load) == pytest.approx(1.5), "what it takes when the table is made, not just then"
    assert found.fetching.ms_per_mb <= 0.25
    calm = balance(chain(), HEAVY, 6.5 * 1.02, 0.5, beginnings)
    assert calm.scale == pytest.approx(1.02) and calm.fetching == Fetching()


@pytest.mark.parametrize(("outside_mb", "inner_ms"), [(4.0, 0.0), (4.0, 0.4), (24.0, 0.0)])
def test_what_is_outside_the_regions_takes_its_place_in_the_caches(outside_mb: float, inner_ms: float) -> None:
    """Of a load of 20 MB up to which they hold. Where it leaves none, part of the fetching is no region's."""
    mb = 16.0 + outside_mb
    rate = mb / 6.5
    truth = Fetching(20.0, 0.03, (20.0 + 2 * mb) / 2, rate)
    whole = Beginning(mb, 6.5, 6.5 + truth.ms(2 * mb))
    some = [Beginning(w, p, p + truth.ms(truth.load_mb(w, p)))
            for w, p in ((4.0, 2.0), (8.0, 3.0), (10.0, 4.0), (12.0, 5.0), (14.0, 5.5), (16.0, 6.2))]  # fmt: skip
    found = balance(chain(), HEAVY, whole.together_ms, 0.5, Beginnings(tuple(some), whole, outside_mb), inner_ms)
    outside = outside_mb + rate * (0.5 - inner_ms)
    load = found.fetching.load_mb(16.0, 6.0 + inner_ms)
    assert found.scale == pytest.approx(1.0, abs=0.01) and found.fetching.mb_per_ms == pytest.approx(rate, rel=0.01)
    assert found.fetching.free_mb == pytest.approx(max(0.0, 20.0 - outside), abs=0.5)
    assert found.fetching.ms_per_mb == pytest.approx(0.03, rel=0.05)
    assert found.fetching.steep_mb == pytest.approx((20.0 - outside + load) / 2, abs=0.5)
    assert 6 * found.scale + found.glue_ms + found.fetching.ms(load) == pytest.approx(whole.together_ms, rel=0.001)


def missed(beginnings: Sequence[Beginning], whole: Beginning) -> float:
    """The fit's worst relative error, of those and the whole."""
    scale, held = fit_fetching(beginnings, whole)
    fetching, load = whole.together_ms - scale * whole.apart_ms, 2 * whole.weight_mb
    assert 1.0 - 1e-9 <= scale <= max(1.0, whole.together_ms / whole.apart_ms) + 1e-9 and held < load
    shape = Fetching(held, 1.0, (held + load) / 2, whole.mb_per_ms)
    share = [shape.ms(shape.load_mb(b.weight_mb, b.apart_ms)) / shape.ms(load) for b in beginnings]
    told = [scale * b.apart_ms + fetching * s for b, s in zip(beginnings, share, strict=True)]
    return max((abs(ms / b.together_ms - 1) for ms, b in zip(told, beginnings, strict=True)), default=0.0)


def test_the_real_teachers_beginnings_are_fitted() -> None:
    scale, held = fit_fetching(CROWDED, WHOLE)
    assert 1.02 <= scale <= 1.08 and 20.0 <= held <= 28.0
    assert missed(CROWDED, WHOLE) < 0.04


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.floats(1.0, 1.2),
    st.floats(0.0, 0.9),
    st.floats(0.0, 0.1),
    st.lists(st.tuples(st.floats(0.1, 3.0), st.floats(0.05, 0.3)), min_size=4, max_size=10),
)
def test_what_networks_are_made_of_is_found(
    scale: float, held: float, rate: float, regions: list[tuple[float, float]]
) -> None:
    """Any factor, any size of cache, any cost of what is beyond it."""
    weights = [sum(w for w, _ in regions[: k + 1]) for k in range(len(regions))]
    apart = [0.1 + sum(ms for _, ms in regions[: k + 1]) for k in range(len(regions))]
    load = 2 * weights[-1]
    truth = Fetching(held * load, rate / 4, (1 + held) * load / 2, weights[-1] / apart[-1])
    points = [Beginning(w, p, scale * p + truth.ms(truth.load_mb(w, p))) for w, p in zip(weights, apart, strict=True)]
    assert missed(points, points[-1]) < 0.05


def test_a_beginning_timed_in_a_bad_moment_moves_little() -> None:
    wrong = [replace(b, together_ms=1.4 * b.together_ms) if k == 3 else b for k, b in enumerate(CROWDED)]
    assert fit_fetching(wrong, WHOLE) == pytest.approx(fit_fetching(CROWDED, WHOLE), rel=0.1)


@pytest.mark.parametrize("some", [(), CROWDED])
def test_a_teacher_faster_than_its_parts_fetches_nothing(some: Sequence[Beginning]) -> None:
    beginnings = Beginnings(tuple(some), WHOLE, 0.0)
    found = balance(chain(), HEAVY, 0.9 * 6.5, 0.5, beginnings)
    assert found.scale == pytest.approx(0.9) and found.fetching == Fetching()


@given(st.floats(0.0, 6.0), st.floats(-20.0, 60.0), st.floats(0.5, 30.0), st.floats(0.0, 20.0))
def test_memory_is_not_slower_than_a_quarter_of_a_millisecond_a_megabyte(
    ms: float, held: float, mb: float, others: float
) -> None:
    """Of weights: a megabyte of them that goes with its share of others' data saves no more."""
    load = mb + others
    found = fetching_for(ms, held, mb, load, others)
    assert 0.0 <= found.free_mb <= load and 0.0 <= 2 * found.ms_per_mb * load / mb <= 0.25 + 1e-9
    assert found.steep_mb is None or found.free_mb <= found.steep_mb <= load
    if held >= 0:
        assert found.ms(load) == pytest.approx(min(ms, 0.125 * 1.5 * mb), abs=1e-5)
    else:
        assert found.ms(load) <= min(ms, 0.25 * mb) + 1e-9, "part of it is spent whatever the regions are"


def test_what_memory_cannot_explain_is_everybodys() -> None:
    whole = Beginning(16.0, 6.5, 6.5 + 3.0 + 0.65)
    found = balance(chain(), HEAVY, whole.together_ms, 0.5, Beginnings((Beginning(8.0, 3.0, 3.0),), whole, 0.0))
    assert found.scale == pytest.approx(1.1)
    assert found.fetching.ms(found.fetching.load_mb(16.0, 6.6)) == pytest.approx(3.0)


class Forgetful(Moody):
    """A machine that takes a millisecond for each node, and one for each kilobyte of weights above `held` of them."""

    def __init__(self, held: float, refuses_above: float = math.inf) -> None:
        super().__init__([1.0])
        self.held, self.refuses_above = held, refuses_above

    def build(self, model: ModelProto, spec: BuildSpec) -> Artefact:
        weights = sum(numpy_helper.to_array(w).nbytes for w in model.graph.initializer) / 1e3
        ms = len(model.graph.node) + max(0.0, weights - self.held)
        part = len(model.graph.output[0].type.tensor_type.shape.dim) == 4 and model.graph.name != "canary"
        if part and ms > self.refuses_above:
            raise ModelError("too long")
        return Artefact(ms)


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
    assert measure_beginnings(meter, state, rows, glue, 1.04 * parts) is None
    assert measure_beginnings(meter, state, rows, None, 2 * parts) is None
    found = measure_beginnings(meter, state, rows, glue, 2 * parts)
    assert found is not None
    some, last = found.some, found.some[-1]
    assert len(some) >= 2 and [b.weight_mb for b in some] == sorted(b.weight_mb for b in some)
    assert last.weight_mb == pytest.approx(sum(r.weight_mb for r in rows))
    assert last.apart_ms == pytest.approx(parts - glue.last_ms) and found.whole.apart_ms == pytest.approx(parts)
    assert last.together_ms > last.apart_ms, "it has more weights than are held"
    head_mb = 4 * (32 * CLASSES + CLASSES) / 1e6
    assert found.outside_mb == pytest.approx(head_mb, rel=0.2)
    assert found.whole.weight_mb == pytest.approx(last.weight_mb + found.outside_mb)
    assert Meter(lab.fresh()).ctx.capabilities.measures is False
    assert measure_beginnings(Meter(lab.fresh()), state, rows, glue, 2 * parts) is None, "nothing is measured"
    picky = Meter(lab.fresh(backend=Forgetful(20.0, refuses_above=0.7 * last.together_ms)))
    fewer = measure_beginnings(picky, state, rows, glue, 2 * parts)
    assert fewer is not None and 0 < len(fewer.some) < len(some), "the engine does not take them all"
    # nearly all weights at once, in what takes hardly any time: most beginnings would say nothing of the whole
    early = [replace(r, latency_ms=0.01, params=9_000_000) if k == 0 else r for k, r in enumerate(rows)]
    late = measure_beginnings(meter, state, early, glue, 2 * parts)
    assert late is not None and late.some
    assert all(b.apart_ms >= 0.2 * late.some[-1].apart_ms for b in late.some)
    rows[0] = replace(rows[0], latency_ms=1e9)
    assert measure_beginnings(meter, state, rows, glue, 2 * parts) is None, "nor one of the regions alone"


def test_glue_adds_up() -> None:
    assert Glue(0.1, {"r00": 0.2, "r01": 0.0}, 0.3, 0.4).ms == pytest.approx(1.0)
