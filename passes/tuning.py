"""A student in training as a whole: the loss, the steps, the choice of their size, the best state."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hantc.data.dataset import Dataset
from hantc.dialect.emitter import opaque_leaves
from hantc.dialect.examples import example_inputs
from hantc.dialect.fakequant import ActivationQuant, observing
from hantc.dialect.graph import with_taps
from hantc.passes.assemble import Blueprint, rounded_view
from hantc.passes.checkpoint import Checkpoint, Saved, part_of, prefixed
from hantc.passes.engine import (
    Judge,
    OutputKind,
    TimeBox,
    augmentation,
    divergence,
    fast_layout,
    fast_module,
    first_output,
    mixed,
    moved,
    multiplied_in_bf16,
    output_kind,
    relative_mse,
    set_rate,
    takes_bf16,
    training_batches,
)
from hantc.passes.place import CPU, copied_to
from hantc.passes.state import Context, State

RATES = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5)  # Adam's, tried in short trainings; students made of candidates from scratch
# want the large ones, those made from the teacher's weights are thrown off by them
_FIRST = 2  # the one that is tried first, and taken where there is no time to try
_TRIAL_SHARE = 0.03  # of the time and of the steps, for each that is tried
_TRIALS = 5  # times that share is what all of them may take, evaluations included
_LEAST_TRIAL = 1.0  # seconds: shorter ones tell nothing
_OLD_RATE = 1.0  # share of the rate for what was the teacher's; little tried: 0.3 ended 0.7 points lower once
_FEATURES = 1.0  # weight of the region outputs' relative error at the start; falls to zero over the first part
_FEATURE_SHARE = 0.7
_MIX = 0.5  # share of batches of blended images
_EMA = 0.995  # decay of the running average of the weights that is evaluated and kept
_ROUND_FROM = 0.8  # share of the steps after which INT8 regions round in training too
_CHECKS = 16  # evaluations on the search split, at most
_CHECK_SHARE = 12.0  # and training lasts this many times as long as evaluating
RECIPE = {
    "version": 11,
    "rates": RATES,
    "mix": _MIX,
    "old": _OLD_RATE,
    "features": [_FEATURES, _FEATURE_SHARE],
    "ema": _EMA,
}

Best = tuple[float, dict[str, Tensor]]  # a state of the student, with its `goal`
History = list[Mapping[str, float]]


class Average:
    """Exponential moving average of a module's float tensors, on its device."""

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


class Tuner:
    """One student's training. All of it changes `student` in place, which is back on the CPU behind `train`."""

    def __init__(self, state: State, ctx: Context, data: Dataset, student: fx.GraphModule) -> None:
        assert state.network is not None and state.plan is not None and state.match is not None
        network = state.network
        self.ctx, self.data, self.student = ctx, data, student
        self.kind: OutputKind = output_kind(network, example_inputs(network.meta["info"], 2)[0], data.num_classes)
        blueprint = Blueprint.of(state.plan.choices)
        names = {n.name for n in student.graph.nodes}
        self.held = [c.region for c in state.plan.choices if c.region in names]
        if opaque_leaves(network):
            ctx.note("opaque operations pass no gradient: fine-tuning works on the regions before them")
        self.device = ctx.place(network)
        taps = [state.match.region(r).output for r in self.held]
        self.teacher = copied_to(self.device, fast_module(with_taps(network, taps)))
        fast_module(student).to(self.device)
        self.view = rounded_view(student, blueprint, ctx.quant).to(self.device)
        self.rounds = any(isinstance(m, ActivationQuant) for m in self.view.modules())
        self.tapped = with_taps(self.view, self.held)
        self.augment = augmentation(network, data, self.kind)
        self.mixed = ctx.mixes(self.device) and takes_bf16(student)
        self.size = min(ctx.effort.batch_size, len(data.train))
        images = min(1000, 2 * ctx.effort.score_images)
        plain = copied_to(self.device, network)
        self.judge = Judge(plain, data.search, self.kind, limit=images, blend=True, device=self.device)
        self._observe()

    def choose_rate(self, seconds: float, steps: int) -> float:
        """The step size to train with, found by short trainings: from the middle of `RATES` downwards, or upwards,
        for as long as they end better; then one size larger, if that did good too.

        A short training has no time to get over what large steps upset, and favours ones too small for a long one
        (Wu et al. 2018, "Understanding short-horizon bias in stochastic meta-optimization"): on EfficientNet-B0
        1e-4 won trials of 50 s, but 3e-4 was ahead from 70 s on."""
        share = _TRIAL_SHARE * seconds
        if share < _LEAST_TRIAL:
            return RATES[_FIRST]
        untrained = self._evaluate(Average(self.student))
        aim = goal(untrained, untrained)
        found: dict[int, float] = {}
        deadline = time.monotonic() + _TRIALS * share  # evaluating may take longer than training
        with self.ctx.reporter.bar("trying step sizes", 1.0) as bar:

            def loss(i: int) -> float:
                if i not in found and found and time.monotonic() > deadline:
                    return math.inf
                if i not in found:
                    found[i] = self._trial(RATES[i], share, max(5, round(_TRIAL_SHARE * steps)), untrained)
                    bar.advance(0.25)
                return found[i]

            best = _climb(loss, _FIRST, len(RATES))
        if best > 0 and found.get(best - 1, math.inf) < aim:
            best -= 1
        self.ctx.reporter.event("rates", tried={f"{RATES[i]:g}": v for i, v in found.items()}, chosen=RATES[best])
        return RATES[best]

    def _trial(self, rate: float, seconds: float, steps: int, untrained: Mapping[str, float]) -> float:
        """The `goal` after a short training, which is then undone."""
        start = copy.deepcopy(self.student.state_dict())
        average, optimizer, box = Average(self.student), self._optimizer(rate), TimeBox(seconds, steps)
        generator = torch.Generator().manual_seed(self.ctx.config.seed)
        try:
            for x, y in training_batches(self.data, self.size, self.augment, self.ctx.config.seed + 2):
                if not self._step(optimizer, *mixed(x, y, generator, _MIX), box):
                    return math.inf
                average.update(self.student)
                if not box.advance():
                    break
            found = goal(self._evaluate(average), untrained)
            return found if math.isfinite(found) else math.inf
        finally:
            self.student.load_state_dict(start)
            self._observe()  # ranges live in the view, and may have become non-finite too

    def train(self, seconds: float, steps: int, checkpoint: Checkpoint) -> History:
        """Train from where `checkpoint` is, keep the best state; one record per evaluation."""
        saved, entered = checkpoint.load(), time.monotonic()
        average, history = Average(self.student), History()
        rate = float(saved.extra["rate"]) if saved is not None else self.choose_rate(seconds, steps)
        seconds = max(0.5 * seconds, seconds - (time.monotonic() - entered))
        best = self._resume(saved, average, history)
        optimizer = self._optimizer(rate)
        box = TimeBox(seconds, steps, begun=saved.progress if saved is not None else 0.0)
        generator = torch.Generator().manual_seed(self.ctx.config.seed)
        with self.ctx.reporter.bar("fine-tuning", 1.0) as bar:
            bar.advance(box.begun)
            done = box.begun
            best, spent = self._check(best, average, history, box)
            checked = box.progress
            for x, y in training_batches(self.data, self.size, self.augment, self.ctx.config.seed + 1):
                if not self._step(optimizer, *mixed(x, y, generator, _MIX), box):
                    self.ctx.note(
                        "fine-tuning met a non-finite loss and stopped early; the best state before it is kept"
                    )
                    break
                average.update(self.student)
                more = box.advance()
                bar.advance(max(0.0, box.progress - done))
                done = max(done, box.progress)
                # by progress: where steps end the training, a busy machine must not decide which states are looked at
                if not more or box.progress - checked > max(_CHECK_SHARE * spent / box.seconds, 1 / _CHECKS):
                    best, spent = self._check(best, average, history, box)
                    checked = box.progress
                    self._observe()
                if not more:
                    break
                if checkpoint.due():
                    states = {"own": self.student.state_dict(), "average": average.shadow, "best": best[1]}
                    facts = {"history": history, "count": average.count, "best": best[0], "rate": rate}
                    checkpoint.save(prefixed(states), box.progress, facts)
        self.student.load_state_dict(best[1])
        self.student.eval().to(CPU)
        return history

    def _step(self, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor | None, box: TimeBox) -> bool:
        """One step; False if the loss is not finite."""
        _rounding(self.view, box.progress >= _ROUND_FROM)
        set_rate(optimizer, box.rate())
        optimizer.zero_grad(set_to_none=True)
        x, y = moved(x, y, self.device)
        # where INT8 is rounded to, BF16 would round as much again
        half = self.mixed and not (self.rounds and box.progress >= _ROUND_FROM)
        loss = _loss(self.teacher, self.tapped, self.kind, x, y, box.progress, mixed=half)
        if not torch.isfinite(loss):
            return False
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 5.0)
        optimizer.step()
        return True

    def _optimizer(self, rate: float) -> torch.optim.Optimizer:
        new = {id(p) for r in self.held for p in self.student.get_submodule(r).parameters()}
        groups = [
            {"params": [p for p in self.student.parameters() if id(p) in new], "lr": rate},
            {"params": [p for p in self.student.parameters() if id(p) not in new], "lr": rate * _OLD_RATE},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=1e-4)

    def _resume(self, saved: Saved | None, average: Average, history: History) -> Best:
        """Take up what an interrupted run left; the best state so far."""
        if saved is None:
            return math.inf, copy.deepcopy(self.student.state_dict())
        self.student.load_state_dict(part_of(saved.tensors, "own"))
        shadow = part_of(saved.tensors, "average")
        average.shadow, average.count = {k: v.to(self.device) for k, v in shadow.items()}, int(saved.extra["count"])
        history += saved.extra["history"]
        return float(saved.extra["best"]), part_of(saved.tensors, "best")

    def _evaluate(self, average: Average) -> dict[str, float]:
        """The averaged weights on the search split, rounded as they will run; leaves them in the student."""
        self.student.load_state_dict(average.shadow)
        self._observe()
        _rounding(self.view, True)
        return self.judge(self.view)

    def _observe(self) -> None:
        """Take the activation ranges anew: they move while weights do."""
        quants = [m for m in self.view.modules() if isinstance(m, ActivationQuant)]
        if not quants:
            return
        for q in quants:
            q.low.zero_()
            q.high.zero_()
        n = min(len(self.data.train), 128)
        x, _ = self.data.train.batch(list(range(n)))
        with observing(self.view, n), torch.no_grad():
            self.view(fast_layout(x).to(self.device))

    def _check(self, best: Best, average: Average, history: History, box: TimeBox) -> tuple[Best, float]:
        """Evaluate, and keep the state if its `goal` is the least so far. Also how many seconds it took."""
        begun = time.monotonic()
        own = copy.deepcopy(self.student.state_dict())
        found = self._evaluate(average)
        loss = goal(found, history[0] if history else found)
        history.append({"progress": box.progress, "step": float(box.step), "loss": loss, **found})
        self.ctx.reporter.event("finetune", **history[-1])
        if loss < best[0]:
            best = (loss, copy.deepcopy(average.shadow))
        self.student.load_state_dict(own)
        return best, time.monotonic() - begun


def goal(found: Mapping[str, float], untrained: Mapping[str, float]) -> float:
    """What fine-tuning is judged by on the search split: the distance from the teacher and, as far as that is below
    the untrained student's, the cross-entropy with the labels. What training adds to the latter says nothing: a teacher
    may know the images by heart, a student that was just made from it does too, and forgets them as it learns."""
    labels = untrained["ce"]
    if not math.isfinite(labels):
        return found["kl"]
    return found["kl"] + (found["ce"] if found["ce"] < labels else labels)


def _climb(loss: Callable[[int], float], start: int, n: int) -> int:
    """Index of the least loss, walking from `start` to the side that gets better."""
    best, least = start, loss(start)
    for step in (1, -1):
        while 0 <= best + step < n and (found := loss(best + step)) < least:
            best, least = best + step, found
        if best != start:
            break
    return best


def _loss(
    teacher: fx.GraphModule,
    tapped: fx.GraphModule,
    kind: OutputKind,
    x: Tensor,
    y: Tensor | None,
    progress: float,
    *,
    mixed: bool = False,
) -> Tensor:
    """γ_CE·CE + γ_KL·KL, both 1 (paper §3.4), and at first the region outputs' error on the student's own
    activations: errors of many replacements add up, and each region can learn to undo those before it."""
    with torch.no_grad():
        t_out, t_values = teacher(x)
    with multiplied_in_bf16(mixed, x.device):
        s_out, s_values = tapped(x)
    s, t = first_output(s_out).float(), first_output(t_out)
    loss = divergence(kind, s, t).mean()
    if y is not None and kind.classifier:
        loss = loss + F.nll_loss(kind.log_probs(s), y)
    weight = _FEATURES * max(0.0, 1 - progress / _FEATURE_SHARE)
    if weight > 0 and s_values:
        errors = [relative_mse(a.float(), b) for a, b in zip(s_values, t_values, strict=True)]
        loss = loss + weight * torch.stack(errors).mean()
    return loss


def _rounding(view: fx.GraphModule, on: bool) -> None:
    """Switch the INT8 regions' rounding: training begins without it, which is faster and steadier."""
    for q in view.modules():
        if isinstance(q, ActivationQuant):
            q.rounding = on
