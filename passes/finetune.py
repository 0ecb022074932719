"""Finetune: student -> student trained as a whole against the teacher."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import ClassVar

import torch

from hantc.core.types import digest
from hantc.passes.assemble import student_facts
from hantc.passes.checkpoint import Checkpoint
from hantc.passes.state import Context, State
from hantc.passes.tuning import RECIPE, Tuner


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
        seconds = min(effort.finetune_share * clock.limit_s * 1.3, 0.85 * clock.remaining())
        steps = effort.finetune_epochs * max(1, (len(ctx.data.train) + len(ctx.data.more or ())) // tuner.size)
        history = tuner.train(seconds, steps, checkpoint)
        tensors = {k: v.detach().contiguous().numpy() for k, v in student.state_dict().items()}
        ctx.store.put_tensors("finetuned", key, tensors)
        ctx.store.put_json("history", key, history)
        checkpoint.clear()
        return replace(state, student=student, history=tuple(history))
