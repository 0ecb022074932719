"""Redistil: student -> student whose regions undo each other's errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from hantc.core.types import digest
from hantc.data.augment import Augment
from hantc.data.dataset import Dataset
from hantc.dialect.examples import example_inputs
from hantc.dialect.graph import with_taps
from hantc.ops.readout import fit_readout
from hantc.passes.assemble import student_facts
from hantc.passes.engine import Judge, augmentation, different, fit_images, output_kind, training_batches
from hantc.passes.state import Context, State
from hantc.passes.training import activations

_POSITIONS = 1 << 19  # of the largest maps that the fits look at together
_IMAGES = (64, 512)  # for the same, at least and at most
RECIPE = {"version": 2, "images": _IMAGES, "positions": _POSITIONS}


class Redistil:
    """Student -> student whose regions are fitted, front to back, to the teacher's values on the student's own."""

    name: ClassVar[str] = "redistil"
    requires: ClassVar[tuple[str, ...]] = ("network", "match", "plan", "student")
    ensures: ClassVar[tuple[str, ...]] = ("student",)

    def call(self, state: State, ctx: Context) -> State:
        """Fit the last convolution of every replaced region; taken back where the whole does not get nearer to the
        teacher (search split). Candidates learnt on the teacher's activations, and errors of many add up: each fit
        sees those of the regions before it."""
        assert state.student is not None and state.plan is not None and state.network is not None
        assert state.match is not None
        student = state.student
        regions = {r.name: r for r in state.match.regions}
        held = [n.name for n in student.graph.nodes if n.op == "call_module" and n.name in regions]
        if ctx.data is None or not held:
            return state
        own = {"recipe": RECIPE, "images": [ctx.effort.score_images, ctx.effort.batch_size, ctx.config.seed]}
        key = digest({**student_facts(state, student, ctx.data), **own})
        stored = ctx.store.get_tensors("redistilled", key)
        if stored is not None:
            student.load_state_dict({k: torch.from_numpy(v) for k, v in stored.items()})
            return state
        fitted = copy.deepcopy(student)
        kind = output_kind(state.network, example_inputs(state.network.meta["info"], 2)[0], ctx.data.num_classes)
        judge = Judge(state.network, ctx.data.search, kind, limit=ctx.effort.score_images, blend=True)
        with ctx.reporter.bar("fitting the student's regions", 3) as bar:
            before = judge(student)["kl"]
            bar.advance()
            augment = augmentation(state.network, ctx.data, kind)
            x = _images(ctx, ctx.data, augment, max(math.prod(regions[r].out_shape[1:]) for r in held))
            taps = [regions[r].output for r in held]
            wanted = activations(with_taps(state.network, taps, output=False), taps, x)
            walk = _FrontToBack(fitted, {r: wanted[regions[r].output] for r in held})
            with torch.no_grad():
                walk.run(x)
            bar.advance()
            after = judge(fitted)["kl"]
            bar.advance()
        better = after < before  # not for nan
        ctx.reporter.event("redistil", fitted=len(walk.fitted), before=before, after=after, taken=better)
        student = fitted if better else student
        tensors = {k: v.detach().contiguous().numpy() for k, v in student.state_dict().items()}
        ctx.store.put_tensors("redistilled", key, tensors)
        return replace(state, student=student)


def _images(ctx: Context, data: Dataset, augment: Augment | None, positions: int) -> Tensor:
    """As many training images as the largest maps allow, none of them twice."""
    size = min(ctx.effort.batch_size, len(data.train))
    n = different(data, size, fit_images(positions, _POSITIONS, _IMAGES))
    batches = training_batches(data, size, augment, ctx.config.seed + 3)
    return torch.cat([next(batches)[0] for _ in range(math.ceil(n / size))])[:n]


class _FrontToBack(fx.Interpreter):
    """Runs a student, and fits each region on what reaches it before it runs."""

    def __init__(self, student: fx.GraphModule, targets: Mapping[str, Tensor]) -> None:
        super().__init__(student)
        self.targets, self.fitted = targets, list[str]()

    def run_node(self, n: fx.Node) -> Any:
        """As fx, behind the fit."""
        if n.name in self.targets:
            region = self.module.get_submodule(str(n.target))
            assert isinstance(region, fx.GraphModule)
            if fit_readout(region, self.env[n.all_input_nodes[0]], self.targets[n.name]):
                self.fitted.append(n.name)
        return super().run_node(n)
