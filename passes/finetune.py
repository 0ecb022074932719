"""Finetune: student -> student trained as a whole against the teacher."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hantc.core.types import digest
from hantc.data.dataset import Dataset
from hantc.dialect.emitter import opaque_leaves
from hantc.dialect.examples import example_inputs
from hantc.dialect.fakequant import ActivationQuant, observing
from hantc.dialect.graph import with_taps
from hantc.passes.assemble import Blueprint, rounded_view
from hantc.passes.checkpoint import Checkpoint, part_of, prefixed
from hantc.passes.engine import (
    Judge,
    OutputKind,
    TimeBox,
    augmentation,
    divergence,
    epochs,
    fast_layout,
    fast_module,
    first_output,
    mixed,
    output_kind,
    relative_mse,
    set_rate,
)
from hantc.passes.state import Context, State

_RATE = 3e-4  # Adam; gentle, for its norms are folded; for the replaced regions
_OLD_RATE = 1.0  # share of it for what was the teacher's; little tried: 0.3 ended 0.7 points lower once
_FEATURES = 1.0  # weight of the region outputs' relative error at the start; falls to zero over the first part
_FEATURE_SHARE = 0.7
_MIX = 0.5  # share of batches of blended images
_EMA = 0.995  # decay of the running average of the weights that is evaluated and kept
_ROUND_FROM = 0.8  # share of the steps after which INT8 regions round in training too
_CHECKS = 16  # evaluations on the search split, at most
_CHECK_SHARE = 12.0  # and training lasts this many times as long as evaluating
_RECIPE = {
    "version": 5,
    "rate": _RATE,
    "mix": _MIX,
    "old": _OLD_RATE,
    "features": [_FEATURES, _FEATURE_SHARE],
    "ema": _EMA,
}


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
        key = digest(
            {
                "recipe": _RECIPE,
                "teacher": state.model_hash,
                "data": ctx.data.fingerprint,
                "picks": Blueprint.of(state.plan.choices).picks,
                "start": digest({k: v.detach().contiguous().sum().item() for k, v in student.state_dict().items()}),
                "effort": [asdict(ctx.effort), ctx.config.seed],
            }
        )
        stored = ctx.store.get_tensors("finetuned", key)
        if stored is not None:
            student.load_state_dict({k: torch.from_numpy(v) for k, v in stored.items()})
            history = ctx.store.get_json("history", key) or []
            return replace(state, student=student, history=tuple(history))
        checkpoint = Checkpoint(ctx.store, key)
        history = tune(state, ctx, ctx.data, student, checkpoint)
        ctx.store.put_tensors(
            "finetuned", key, {k: v.detach().contiguous().numpy() for k, v in student.state_dict().items()}
        )
        ctx.store.put_json("history", key, history)
        checkpoint.clear()
        return replace(state, student=student, history=tuple(history))


class _Average:
    """Exponential moving average of a module's float tensors."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.count = 0

    def update(self, module: torch.nn.Module) -> None:
        self.count += 1
        decay = min(_EMA, (1 + self.count) / (10 + self.count))  # young averages follow quickly
        with torch.no_grad():
            for k, v in module.state_dict().items():
                if v.is_floating_point():
                    self.shadow[k].lerp_(v, 1 - decay)


def tune(
    state: State, ctx: Context, data: Dataset, student: fx.GraphModule, checkpoint: Checkpoint
) -> list[Mapping[str, float]]:
    """Train `student` in place, from where `checkpoint` is; returns one record per evaluation."""
    assert state.network is not None and state.plan is not None and state.match is not None
    network, reduce_range = state.network, ctx.capabilities.reduce_range
    kind = output_kind(network, example_inputs(network.meta["info"], 2)[0], data.num_classes)
    blueprint = Blueprint.of(state.plan.choices)
    names = {n.name for n in student.graph.nodes}
    held = [c.region for c in state.plan.choices if c.region in names]
    if opaque_leaves(network):
        ctx.note("opaque operations pass no gradient: fine-tuning works on the regions before them")
    teacher = fast_module(with_taps(network, [state.match.region(r).output for r in held]))
    fast_module(student)
    view = rounded_view(student, blueprint, reduce_range=reduce_range)
    tapped = with_taps(view, held)
    augment = augmentation(network, data, kind)
    _rounding(view, False)
    size = min(ctx.effort.batch_size, len(data.train))
    steps = ctx.effort.finetune_epochs * max(1, len(data.train) // size)
    seconds = min(ctx.effort.finetune_share * ctx.clock.limit_s * 1.3, 0.85 * ctx.clock.remaining())
    optimizer = _optimizer(student, held)
    average = _Average(student)
    history: list[Mapping[str, float]] = []
    box = TimeBox(seconds, steps, begun=_resume(student, average, history, checkpoint))
    best = _best_before(checkpoint) or (math.inf, copy.deepcopy(student.state_dict()))
    generator = torch.Generator().manual_seed(ctx.config.seed)
    judge = Judge(network, data.search, kind, limit=min(1000, 2 * ctx.effort.score_images), blend=True)
    with ctx.reporter.bar("fine-tuning", 1.0) as bar:
        bar.advance(box.begun)
        done = box.begun
        begun = time.monotonic()
        best = _check(best, student, average, view, judge, ctx, history, box)
        checked = time.monotonic()
        spent = checked - begun
        _rounding(view, False)
        for x, y in epochs(data.train, size, augment, ctx.config.seed + 1):
            x, y = mixed(x, y, generator, _MIX)
            set_rate(optimizer, box.rate())
            optimizer.zero_grad(set_to_none=True)
            loss = _loss(teacher, tapped, kind, x, y, box.progress)
            if not torch.isfinite(loss):
                ctx.note("fine-tuning met a non-finite loss and stopped early; the best state before it is kept")
                break
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
            optimizer.step()
            average.update(student)
            more = box.advance()
            bar.advance(max(0.0, box.progress - done))
            done = max(done, box.progress)
            rounds = box.progress >= _ROUND_FROM
            if not more or time.monotonic() - checked > max(_CHECK_SHARE * spent, seconds / _CHECKS):
                begun = time.monotonic()
                best = _check(best, student, average, view, judge, ctx, history, box)
                checked = time.monotonic()
                spent = checked - begun
                _observe(view, data)
            _rounding(view, rounds)
            if not more:
                break
            if checkpoint.due():
                states = {"own": student.state_dict(), "average": average.shadow, "best": best[1]}
                facts = {"history": history, "count": average.count, "best": best[0]}
                checkpoint.save(prefixed(states), box.progress, facts)
    student.load_state_dict(best[1])
    student.eval()
    return history


def _resume(
    student: fx.GraphModule, average: _Average, history: list[Mapping[str, float]], checkpoint: Checkpoint
) -> float:
    """Take up what an interrupted run left; the share that it did."""
    saved = checkpoint.load()
    if saved is None:
        return 0.0
    student.load_state_dict(part_of(saved.tensors, "own"))
    average.shadow, average.count = part_of(saved.tensors, "average"), int(saved.extra["count"])
    history += saved.extra["history"]
    return saved.progress


def _best_before(checkpoint: Checkpoint) -> tuple[float, dict[str, Tensor]] | None:
    """The best state of an interrupted run, with its loss."""
    saved = checkpoint.load()
    return (float(saved.extra["best"]), part_of(saved.tensors, "best")) if saved is not None else None


def _optimizer(student: fx.GraphModule, held: Sequence[str]) -> torch.optim.Optimizer:
    new = {id(p) for r in held for p in student.get_submodule(r).parameters()}
    groups = [
        {"params": [p for p in student.parameters() if id(p) in new], "lr": _RATE},
        {"params": [p for p in student.parameters() if id(p) not in new], "lr": _RATE * _OLD_RATE},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=1e-4)


def _loss(
    teacher: fx.GraphModule, tapped: fx.GraphModule, kind: OutputKind, x: Tensor, y: Tensor | None, progress: float
) -> Tensor:
    """γ_CE·CE + γ_KL·KL, both 1 (paper §3.4), and at first the region outputs' error on the student's own
    activations: errors of many replacements add up, and each region can learn to undo those before it."""
    with torch.no_grad():
        t_out, t_values = teacher(x)
    s_out, s_values = tapped(x)
    s, t = first_output(s_out), first_output(t_out)
    loss = divergence(kind, s, t).mean()
    if y is not None and kind.classifier:
        loss = loss + F.nll_loss(kind.log_probs(s), y)
    weight = _FEATURES * max(0.0, 1 - progress / _FEATURE_SHARE)
    if weight > 0 and s_values:
        errors = [relative_mse(a, b) for a, b in zip(s_values, t_values, strict=True)]
        loss = loss + weight * torch.stack(errors).mean()
    return loss


def _observe(view: fx.GraphModule, data: Dataset | None) -> None:
    """Take the activation ranges anew: they move while weights do."""
    quants = [m for m in view.modules() if isinstance(m, ActivationQuant)]
    if not quants or data is None:
        return
    for q in quants:
        q.low.zero_()
        q.high.zero_()
    with observing(view), torch.no_grad():
        view(fast_layout(data.train.batch(list(range(min(len(data.train), 128))))[0]))


def _rounding(view: fx.GraphModule, on: bool) -> None:
    """Switch the INT8 regions' rounding: training begins without it, which is faster and steadier."""
    for q in view.modules():
        if isinstance(q, ActivationQuant):
            q.observing = not on


def _check(
    best: tuple[float, dict[str, Tensor]],
    student: fx.GraphModule,
    average: _Average,
    view: fx.GraphModule,
    judge: Judge,
    ctx: Context,
    history: list[Mapping[str, float]],
    box: TimeBox,
) -> tuple[float, dict[str, Tensor]]:
    """Evaluate the averaged weights on the search split; keep them if they are the best so far."""
    own = copy.deepcopy(student.state_dict())
    student.load_state_dict(average.shadow)
    _observe(view, ctx.data)
    found = judge(view)
    loss = found["kl"] + (0.0 if math.isnan(found["ce"]) else found["ce"])
    history.append({"progress": box.progress, "step": float(box.step), "loss": loss, **found})
    ctx.reporter.event("finetune", **history[-1])
    if loss < best[0]:
        best = (loss, copy.deepcopy(average.shadow))
    student.load_state_dict(own)
    return best
