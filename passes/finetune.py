"""Finetune: student -> student trained as a whole against the teacher."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import ClassVar

import torch

from hantc.core.types import digest
from hantc.passes.assemble import student_facts
from hantc.passes.calibrate import CALIBRATION_SHARE
from hantc.passes.checkpoint import Checkpoint
from hantc.passes.state import Context, State
from hantc.passes.tuning import RECIPE, Tuner

_LEAST_LEFT = 0.05  # of what is left of the time limit, for what comes after fine-tuning
_UNKNOWN_LEFT = 0.15  # the same where no latency of this machine is known
_MOST_LEFT = 0.6
_RESTLESS = 1.5  # a busy machine takes this much longer over images
_START_S = 10.0  # the student's last evaluation, quantising, building sessions, the report
_PAIR_S, _PAIR_RUNS = 4.0, 200  # timing two networks, at least and in runs of the teacher, where figures swing


class Finetune:
    """Student -> student trained as a whole: CE + KL to the teacher, region outputs held for the first part."""

    name: ClassVar[str] = "finetune"
    requires: ClassVar[tuple[str, ...]] = ("network", "match", "plan", "student")
    ensures: ClassVar[tuple[str, ...]] = ("student",)

    def call(self, state: State, ctx: Context) -> State:
        """Train within what is left of the time limit; the best state on the search split is kept."""
        assert state.student is not None and state.plan is not None and state.network is not None
        changed = [c for c in state.plan.choices if c.candidate != "teacher" or c.precision == "int8"]
        if ctx.data is None or not changed:
            return state
        student = state.student
        own = {"recipe": ctx.recipe(RECIPE), "effort": [asdict(ctx.effort), ctx.config.seed]}
        key = digest({**student_facts(state, student, ctx.data), **own})
        stored = ctx.store.get_tensors("finetuned", key)
        if stored is not None:
            student.load_state_dict({k: torch.from_numpy(v) for k, v in stored.items()})
            history = ctx.store.get_json("history", key) or []
            return replace(state, student=student, history=tuple(history))
        checkpoint = Checkpoint(ctx.store, key)
        tuner = Tuner(state, ctx, ctx.data, student)
        effort, clock = ctx.effort, ctx.clock
        after = min(max(closing_s(state, ctx), _LEAST_LEFT * clock.remaining()), _MOST_LEFT * clock.remaining())
        seconds = min(effort.finetune_share * clock.limit_s * 1.3, clock.remaining() - after)
        steps = effort.finetune_epochs * max(1, (len(ctx.data.train) + len(ctx.data.more or ())) // tuner.size)
        history = tuner.train(seconds, steps, checkpoint)
        tensors = {k: v.detach().contiguous().numpy() for k, v in student.state_dict().items()}
        ctx.store.put_tensors("finetuned", key, tensors)
        ctx.store.put_json("history", key, history)
        checkpoint.clear()
        return replace(state, student=student, history=tuple(history))


def closing_s(state: State, ctx: Context) -> float:
    """About how many seconds the run takes once the student is trained: choosing ranges, timing the files, and every
    image of the validation split through each of them. A classifier at 224×224 spends minutes on that, not seconds."""
    assert state.plan is not None and state.costs is not None and ctx.data is not None
    ranges = CALIBRATION_SHARE * ctx.clock.limit_s
    if not ctx.capabilities.measures:  # predictions say nothing of the engine that the images go through here
        return max(_START_S + ranges, _UNKNOWN_LEFT * ctx.clock.remaining())
    second = state.costs.pace / 1e3  # on the wall, of the table's milliseconds
    teacher_s, student_s = second * state.costs.teacher_ms, second * state.plan.predicted_latency_ms
    others = 1 + (ctx.base == "bf16") + (state.given is not None)  # the teacher in INT8, in BF16, as it came
    images = len(ctx.data.val) / ctx.config.batch * ((1 + others) * teacher_s + student_s)
    pairs = 2 + others + len(ctx.rivals) + 2 * bool(ctx.fewer_threads)
    return _START_S + ranges + _RESTLESS * images + pairs * max(_PAIR_S, _PAIR_RUNS * teacher_s)
