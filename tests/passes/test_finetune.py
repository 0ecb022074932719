"""Training the student as a whole: it gets nearer to the teacher, and the best of it is kept."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from hantc.dialect.graph import with_taps
from hantc.passes import tuning
from hantc.passes.checkpoint import Checkpoint
from hantc.passes.finetune import Finetune, closing_s
from hantc.passes.state import Clock, Context, State

if TYPE_CHECKING:
    from tests.passes.conftest import Lab

UNTRAINED = {"kl": 1.0, "ce": math.nan}


def test_the_student_gets_nearer_to_the_teacher(lab: Lab) -> None:
    before = lab.distance(lab.rewritten())
    after = Finetune().call(lab.rewritten(), lab.fresh(effort={"finetune_epochs": 12}))
    assert lab.distance(after) < 0.8 * before
    losses = [h["loss"] for h in after.history]
    assert losses[-1] < losses[0]
    assert after.history[-1]["progress"] == 1.0


def test_the_teacher_is_not_touched(lab: Lab) -> None:
    state = lab.rewritten()
    assert state.network is not None
    before = {k: v.clone() for k, v in state.network.state_dict().items()}
    Finetune().call(state, lab.fresh())
    assert all(torch.equal(v, before[k]) for k, v in state.network.state_dict().items())


def test_the_best_state_is_kept_where_training_does_harm(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "RATES", (0.1, 0.1, 0.1))
    before = lab.distance(lab.rewritten())
    after = Finetune().call(lab.rewritten(), lab.fresh(effort={"finetune_epochs": 3}))
    assert after.history[-1]["kl"] > after.history[0]["kl"], "it did harm"
    assert lab.distance(after) <= 1.5 * before


@pytest.mark.parametrize(
    ("kl", "ce", "wanted"),
    [
        (0.1, 0.5, 0.6),  # labels speak for the state
        (0.1, 0.9, 0.8),  # and never against it: the untrained student may know the images by heart
        (0.1, math.nan, 0.8),
        (math.nan, 0.5, math.nan),
    ],
)
def test_labels_speak_for_a_state_never_against_it(kl: float, ce: float, wanted: float) -> None:
    found = {"kl": kl, "ce": ce}
    assert tuning.goal(found, {"kl": 0.05, "ce": 0.7}) == pytest.approx(wanted, nan_ok=True)
    assert tuning.goal(found, {"kl": 0.05, "ce": math.nan}) == pytest.approx(kl, nan_ok=True), "no labels"


def test_a_state_further_from_the_teacher_but_righter_is_kept(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    state, ctx = lab.rewritten(), lab.fresh(effort={"finetune_epochs": 4})
    assert state.student is not None and ctx.data is not None
    tuner = tuning.Tuner(state, ctx, ctx.data, state.student)
    found = iter([{"kl": 0.1, "ce": 0.9}, *({"kl": 0.2, "ce": 0.5} for _ in range(99))])
    monkeypatch.setattr(tuner, "choose_rate", lambda *_: 1e-3)
    monkeypatch.setattr(tuner, "_evaluate", lambda average: next(found))
    before = {k: v.clone() for k, v in state.student.state_dict().items()}
    history = tuner.train(1e3, 8, Checkpoint(ctx.store, "ab" * 16))
    assert [h["loss"] for h in history][:2] == pytest.approx([1.0, 0.7])
    assert any(not torch.equal(v, before[k]) for k, v in state.student.state_dict().items())


def test_a_second_call_trains_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = lab.fresh()
    first = Finetune().call(lab.rewritten(), ctx)

    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(tuning.Tuner, "train", never)
    second = Finetune().call(lab.rewritten(), ctx)
    assert first.student is not None and second.student is not None
    want, got = first.student.state_dict(), second.student.state_dict()
    assert all(torch.equal(v, got[k]) for k, v in want.items())
    assert [dict(h) for h in second.history] == [dict(h) for h in first.history]


def measured(ctx: Context, state: State, teacher_ms: float, pace: float = 1.0) -> tuple[State, Context]:
    """The state of a teacher that takes so long, and the context of a machine that is timed."""
    assert state.costs is not None and state.plan is not None
    costs = replace(state.costs, teacher_ms=teacher_ms, pace=pace)
    plan = replace(state.plan, predicted_latency_ms=teacher_ms / 2)
    timed = replace(ctx, capabilities=replace(ctx.capabilities, measures=True))
    return replace(state, costs=costs, plan=plan), timed


def test_validation_images_through_slow_files_take_long(lab: Lab) -> None:
    ctx, state = replace(lab.fresh(), clock=Clock(100.0)), lab.rewritten()
    assert ctx.data is not None
    images, fast = len(ctx.data.val), closing_s(*measured(ctx, state, 0.001))
    slow = closing_s(*measured(ctx, state, 10.0))
    assert slow - fast == pytest.approx(1.5 * images * 2.5 * 0.010, rel=0.01), "teacher, its INT8 form, half for it"
    assert closing_s(*measured(ctx, state, 10.0, pace=2.0)) > slow, "on the wall"
    assert 10.0 < fast < 40.0
    four = replace(ctx, config=ctx.config.model_copy(update={"batch": 4}))
    assert closing_s(*measured(four, state, 10.0)) < slow, "so long for four images"


@pytest.mark.parametrize(
    ("teacher_ms", "share"),
    [(1.0, 0.90), (1e5, 0.4)],  # seconds of 1,000 that go into training, at least; all would, were it not bounded
)
def test_time_is_left_for_what_comes_after(
    teacher_ms: float, share: float, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def train(self: tuning.Tuner, seconds: float, steps: int, checkpoint: Checkpoint) -> list[dict[str, float]]:
        asked.append(seconds)
        return []

    monkeypatch.setattr(tuning.Tuner, "train", train)
    ctx = lab.fresh(effort={"finetune_share": 1.0})
    ctx = replace(ctx, clock=Clock(1000.0))
    state, ctx = measured(ctx, lab.rewritten(), teacher_ms)
    Finetune().call(state, ctx)
    assert 1000 * share - 10 < asked[0] < 1000 * share + 60
    Finetune().call(lab.rewritten(), replace(lab.fresh(), clock=Clock(1000.0)))
    assert asked[1] <= 850.0, "predicted only: what images take here is not known"


def test_regions_keep_their_names(lab: Lab) -> None:
    state = lab.rewritten()
    assert state.student is not None
    held = [n.name for n in state.student.graph.nodes if n.op == "call_module" and n.name.startswith("r0")]
    assert held == ["r01", "r02", "r03"]
    with torch.no_grad():
        _, values = with_taps(state.student, held)(lab.labelled.val.batch([0, 1])[0])
    assert [tuple(v.shape[1:]) for v in values] == [(16, 12, 12), (32, 6, 6), (32, 6, 6)]


@pytest.mark.parametrize(
    ("losses", "best", "asked"),
    [
        ((5.0, 4.0, 3.0, 2.0, 1.0), 4, {2, 3, 4}),
        ((1.0, 2.0, 3.0, 4.0, 5.0), 0, {0, 1, 2, 3}),
        ((9.0, 4.0, 3.0, 4.0, 9.0), 2, {1, 2, 3}),
        ((9.0, 9.0, math.inf, 1.0, 2.0), 3, {2, 3, 4}),
        ((math.inf,) * 5, 2, {1, 2, 3}),
    ],
)
def test_climbing_stops_at_the_first_that_is_worse(losses: tuple[float, ...], best: int, asked: set[int]) -> None:
    seen: set[int] = set()

    def loss(i: int) -> float:
        seen.add(i)
        return losses[i]

    assert tuning._climb(loss, 2, 5) == best
    assert seen == asked


def test_the_step_size_is_found_by_trying_and_trials_leave_no_trace(lab: Lab) -> None:
    state, ctx = lab.rewritten(), lab.fresh()
    assert state.student is not None and ctx.data is not None
    tuner = tuning.Tuner(state, ctx, ctx.data, state.student)
    before = {k: v.clone() for k, v in state.student.state_dict().items()}
    assert tuner.choose_rate(1e3, 300) in tuning.RATES
    assert all(torch.equal(v, before[k]) for k, v in state.student.state_dict().items())
    tried = {rate: tuner._trial(rate, 1e3, 10, UNTRAINED) for rate in (3e-4, 30.0)}
    assert tried[3e-4] < tried[30.0], "a step far too large does harm"
    assert tuner.choose_rate(1.0, 300) == tuning.RATES[2], "no time to try"


@pytest.mark.parametrize(
    ("upper", "chosen"),
    [(0.9, 3e-4), (1.1, 1e-4), (math.inf, 1e-4)],
)
def test_a_long_training_takes_the_larger_step_if_its_trial_did_good(
    upper: float, chosen: float, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, ctx = lab.rewritten(), lab.fresh()
    assert state.student is not None and ctx.data is not None
    tuner = tuning.Tuner(state, ctx, ctx.data, state.student)
    trials = {1e-3: 2.0, 3e-4: upper, 1e-4: 0.5, 3e-5: 0.6}  # 1e-4 ends nearest to the teacher
    monkeypatch.setattr(tuner, "_trial", lambda rate, *_: trials[rate])
    monkeypatch.setattr(tuner, "_evaluate", lambda average: UNTRAINED)
    assert tuner.choose_rate(1e3, 300) == chosen


def test_the_largest_step_has_none_above(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    state, ctx = lab.rewritten(), lab.fresh()
    assert state.student is not None and ctx.data is not None
    tuner = tuning.Tuner(state, ctx, ctx.data, state.student)
    monkeypatch.setattr(tuner, "_trial", lambda rate, *_: 1e-5 / rate)  # the larger the better
    monkeypatch.setattr(tuner, "_evaluate", lambda average: UNTRAINED)
    assert tuner.choose_rate(1e3, 300) == tuning.RATES[0]


def test_a_resumed_training_keeps_its_step_size(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    state, ctx = lab.rewritten(), lab.fresh(effort={"finetune_epochs": 4})
    assert state.student is not None and ctx.data is not None
    checkpoint = Checkpoint(ctx.store, "ab" * 16, every_s=0.0)
    tuning.Tuner(state, ctx, ctx.data, state.student).train(1e3, 8, checkpoint)
    saved = checkpoint.load()
    assert saved is not None and saved.extra["rate"] in tuning.RATES

    def never(*_: object) -> float:
        raise AssertionError("tried again")

    monkeypatch.setattr(tuning.Tuner, "choose_rate", never)
    student = lab.rewritten().student
    assert student is not None
    history = tuning.Tuner(state, ctx, ctx.data, student).train(1e3, 8, checkpoint)
    assert history[-1]["progress"] == 1.0


def test_a_trial_that_blows_up_is_undone(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    state, ctx = lab.rewritten(), lab.fresh()
    assert state.student is not None and ctx.data is not None
    tuner = tuning.Tuner(state, ctx, ctx.data, state.student)
    before = {k: v.clone() for k, v in state.student.state_dict().items()}
    step, steps = tuner._step, []

    def wreck(*args: Any) -> bool:
        steps.append(step(*args))
        with torch.no_grad():
            next(iter(state.student.parameters())).fill_(math.nan)  # type: ignore[union-attr]
        return len(steps) < 3

    monkeypatch.setattr(tuner, "_step", wreck)
    assert tuner._trial(1e-3, 1e3, 10, UNTRAINED) == math.inf
    assert len(steps) == 3
    assert all(torch.equal(v, before[k]) for k, v in state.student.state_dict().items())
    monkeypatch.setattr(tuner, "_step", step)
    assert math.isfinite(tuner._trial(1e-4, 1e3, 10, UNTRAINED)), "nor are the ranges spoilt"


def test_trials_end_when_evaluating_takes_too_long(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    state, ctx = lab.rewritten(), lab.fresh()
    assert state.student is not None and ctx.data is not None
    tuner = tuning.Tuner(state, ctx, ctx.data, state.student)
    tried: list[float] = []

    def slow(rate: float, *_: object) -> float:
        tried.append(rate)
        now[0] += 1000.0
        return 1.0 / len(tried)  # ever better

    now = [0.0]
    monkeypatch.setattr(tuner, "_trial", slow)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert tuner.choose_rate(100.0, 300) == tuning.RATES[2]
    assert tried == [tuning.RATES[2]]


def test_a_run_whose_time_is_up_takes_one_step(lab: Lab) -> None:
    ctx, state = lab.fresh(), lab.rewritten()
    assert state.student is not None and ctx.data is not None
    tuner = tuning.Tuner(state, ctx, ctx.data, state.student)
    history = tuner.train(0.0, 100, Checkpoint(ctx.store, "abcd"))
    assert [h["progress"] for h in history] == [0.0, 1.0] and history[-1]["step"] <= 2


def test_states_are_looked_at_by_progress(lab: Lab) -> None:
    """However long the steps take: the clock decides nothing where steps end the training."""
    ctx, state = lab.fresh(), lab.rewritten()
    assert state.student is not None and ctx.data is not None
    tuner = tuning.Tuner(state, ctx, ctx.data, state.student)
    history = tuner.train(1e6, 32, Checkpoint(ctx.store, "abcd"))
    assert [h["step"] for h in history] == [0, *range(3, 32, 3), 32]


def test_products_are_in_bf16_until_int8_rounds(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """BF16 would round as much again as INT8 does."""
    seen: list[tuple[bool, bool]] = []
    loss = tuning._loss

    def watched(*args: Any, mixed: bool, **more: Any) -> torch.Tensor:
        seen.append((args[5] < tuning._ROUND_FROM, mixed))
        return loss(*args, mixed=mixed, **more)

    monkeypatch.setattr(tuning, "_loss", watched)
    state = Finetune().call(lab.rewritten(), lab.fresh(mixed=True))
    assert set(seen) == {(True, True), (False, False)}, "r01 and r02 are in INT8"
    assert state.student is not None and {p.dtype for p in state.student.parameters()} == {torch.float32}
