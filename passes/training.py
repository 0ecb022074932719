"""Candidates in training: all side by side on the teacher's activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from hantc.core.store import Store
from hantc.core.types import CandidateSpec, Region, digest
from hantc.data.dataset import Dataset
from hantc.dialect.examples import example_inputs
from hantc.dialect.graph import with_taps
from hantc.dialect.spread import Activations, image_variance, ordinary
from hantc.ops.registry import DERIVED
from hantc.passes.checkpoint import Checkpoint, part_of, prefixed
from hantc.passes.contest import RUNGS, Entrant, outdone
from hantc.passes.engine import (
    TimeBox,
    augmentation,
    calibrate_norm,
    fast_module,
    output_kind,
    relative_mse,
    set_rate,
    trainable,
    training_batches,
)
from hantc.passes.state import Context

RATE = 3e-3  # Adam, cosine; losses are relative to the region's variance, so one rate serves all
RECIPE = {
    "version": 9,
    "optimizer": "adam",
    "rate": RATE,
    "loss": "relative_mse",
    "rungs": RUNGS,
}
_POSITIONS = 1 << 16  # of a region's input maps that a candidate is derived from; fits look at fewer still
_SAMPLES = (32, 256)  # images for the same, at least and at most
_STEP_POSITIONS = 1 << 13  # of a region's input maps that a candidate learns from in one step, at least
_LEAST_IMAGES = 16  # in one step, however large the maps


@dataclass
class Job:
    """One candidate in training."""

    region: Region
    spec: CandidateSpec
    module: fx.GraphModule
    key: str
    cost: float = math.inf  # ms, in the cheaper precision
    loss: float = float("nan")
    dead: str = ""
    rival: str = ""  # the candidate that made this one pointless
    seen: int = field(default=0)
    steps: int = 0

    @property
    def rate(self) -> float:
        """Base learning rate."""
        return RATE * (DERIVED[self.spec.family].start if self.spec.family in DERIVED else 1.0)


def gather(network: fx.GraphModule, regions: Sequence[Region], data: Dataset) -> dict[str, Tensor]:
    """The teacher's activations that enter `regions`, by node name: (n, *in_shape), the fewer images the larger
    the region's maps are, from the train split."""
    taps = sorted({r.input for r in regions})
    if not taps:
        return {}
    least, most = _SAMPLES
    size = {r.input: math.prod(r.in_shape[1:]) for r in regions}
    tapped = with_taps(network, taps)
    found: dict[str, list[Tensor]] = {t: [] for t in taps}
    n = min(most, len(data.train))
    for i in range(0, n, least):
        x, _ = data.train.batch(list(range(i, min(n, i + least))))
        for tap, value in activations(tapped, taps, x).items():
            if i * size[tap] < _POSITIONS:
                found[tap].append(value)
    samples = {tap: torch.cat(found.pop(tap)) for tap in taps}
    # the others would decide every fit alone
    return {tap: value[ordinary(image_variance(value))] for tap, value in samples.items()}


def checkpoint_of(store: Store, jobs: Sequence[Job]) -> Checkpoint:
    """Where these jobs' common training is kept while it is under way."""
    return Checkpoint(store, digest(sorted(j.key for j in jobs)))


def train(network: fx.GraphModule, jobs: Sequence[Job], ctx: Context, data: Dataset, checkpoint: Checkpoint) -> None:
    """Train all jobs side by side on the teacher's activations (phase 1 of the paper, §3.2): relative squared
    error, Adam, cosine; as many steps as the time share allows."""
    taps = sorted({j.region.input for j in jobs} | {j.region.output for j in jobs})
    tapped = fast_module(with_taps(network, taps))
    sample = example_inputs(network.meta["info"], 2)[0]
    kind = output_kind(network, sample, data.num_classes)
    augment = augmentation(network, data, kind)
    size = min(ctx.effort.batch_size, len(data.train))
    steps = ctx.effort.distill_epochs * max(1, (len(data.train) + len(data.more or ())) // size)
    seconds = ctx.effort.distill_share * ctx.clock.limit_s
    rates = sorted({j.rate for j in jobs})
    groups = [(rate, trainable([j.module for j in jobs if j.rate == rate])) for rate in rates]
    optimizer = torch.optim.Adam([{"params": params, "lr": rate} for rate, params in groups if params])
    box = TimeBox(min(seconds, 0.6 * ctx.clock.remaining()), steps, begun=resume(jobs, checkpoint))
    rungs = [r for r in RUNGS if r[0] > box.begun]
    with ctx.reporter.bar(f"distilling {len(jobs)} candidates", 1.0) as bar:
        bar.advance(box.begun)
        done = box.begun
        for x, _ in training_batches(data, size, augment, ctx.config.seed):
            values = activations(tapped, taps, x)
            if box.step == 0:
                for j in jobs:
                    fast_module(j.module).train()
                    if not box.begun and j.spec.family not in DERIVED:
                        calibrate_norm(j.module, values[j.region.output], values[j.region.input])
            set_rate(optimizer, box.rate())
            optimizer.zero_grad(set_to_none=True)
            for j in jobs:
                step(j, values)
            optimizer.step()
            if rungs and box.progress >= rungs[0][0]:
                _retire(jobs, rungs.pop(0)[1])
            more = box.advance()
            bar.advance(max(0.0, box.progress - done))
            done = max(done, box.progress)
            if not more:
                break
            if checkpoint.due():
                save(jobs, checkpoint, box.progress)
    for j in jobs:
        j.module.eval()
        ctx.reporter.event("distilled", region=j.region.name, candidate=j.spec.name, mse=j.loss, images=j.seen)


def save(jobs: Sequence[Job], checkpoint: Checkpoint, progress: float) -> None:
    """Keep how far all jobs have come."""
    facts = {j.key: [j.loss, j.dead, j.rival, j.seen, j.steps] for j in jobs}
    checkpoint.save(prefixed({j.key: j.module.state_dict() for j in jobs}), progress, facts)


def resume(jobs: Sequence[Job], checkpoint: Checkpoint) -> float:
    """Take up what an interrupted run left; the share that it did."""
    saved = checkpoint.load()
    if saved is None or any(j.key not in saved.extra for j in jobs):
        return 0.0
    for j in jobs:
        j.module.load_state_dict(part_of(saved.tensors, j.key))
        j.loss, j.dead, j.rival, j.seen, j.steps = saved.extra[j.key]
    return saved.progress


def activations(tapped: fx.GraphModule, taps: Sequence[str], x: Tensor) -> Activations:
    """The teacher's values at `taps` for one batch; `tapped` as `with_taps` made it."""
    with torch.no_grad():
        _, values = tapped(x)
    return Activations(dict(zip(taps, values, strict=True)))


def step(job: Job, values: Activations, *, whole: bool = False) -> None:
    """Forward and backward of one candidate, on those images of the batch that it needs (`whole`: on all usual ones);
    a non-finite loss ends its training, not the run."""
    if job.dead or job.rival:
        return
    ends = (job.region.input, job.region.output)
    (source, target), variance, usual = (values[e] for e in ends), values.variance(ends[1]), values.usual(*ends)
    chosen = _chosen(job, source.shape[0], usual, whole=whole)
    if chosen is not None:
        source, target, variance = source[chosen], target[chosen], variance[chosen]
    loss = relative_mse(job.module(source), target, variance)
    if not torch.isfinite(loss):
        job.dead = "its training diverged (non-finite loss)"
        for p in job.module.parameters():
            p.grad = None
        return
    if loss.requires_grad:
        loss.backward()
    job.steps += 1
    decay = min(0.98, job.steps / (job.steps + 3))  # young averages follow quickly
    value = float(loss.detach())
    job.loss = value if math.isnan(job.loss) else decay * job.loss + (1 - decay) * value
    job.seen += source.shape[0]


def _chosen(job: Job, n: int, usual: Tensor | None, *, whole: bool) -> Tensor | None:
    """Which images of a batch of `n` a candidate learns from in this step; None: all.

    Those that are not usual stay out: norms in training would take their statistics from them alone. And a
    convolution learns from positions: where an image has many, a part of the images is enough, in turn."""
    least = math.ceil(_STEP_POSITIONS / math.prod(job.region.in_shape[1:]))
    wanted = n if whole else max(_LEAST_IMAGES, least)
    images = torch.arange(n) if usual is None else usual.nonzero().flatten()
    if len(images) <= wanted:
        return None if usual is None else images
    return images.roll(-job.steps * wanted % len(images))[:wanted]


def _retire(jobs: Sequence[Job], clearly: float) -> None:
    """Successive halving: stop training what a rival of its region already makes pointless."""
    alive = [j for j in jobs if not (j.dead or j.rival)]
    entrants = [Entrant(j.region.name, j.spec.name, j.cost, j.loss) for j in alive]
    for job, rival in zip(alive, outdone(entrants, clearly), strict=True):
        job.rival = rival if trainable([job.module]) else ""
