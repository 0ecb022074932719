"""Candidates in training: all side by side on the teacher's activations."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, fx

from hantc.core.types import CandidateSpec, Region, digest
from hantc.data.augment import Augment
from hantc.data.dataset import Dataset
from hantc.dialect.examples import example_inputs
from hantc.dialect.graph import with_taps
from hantc.dialect.spread import Activations, enough, image_variance, ordinary
from hantc.ops.readout import fit_readout
from hantc.ops.registry import DERIVED, is_exact
from hantc.passes.checkpoint import Checkpoint, part_of, prefixed
from hantc.passes.contest import RUNGS, Entrant, Rung, outdone
from hantc.passes.engine import (
    TimeBox,
    augmentation,
    calibrate_norm,
    different,
    epochs,
    fast_module,
    fit_images,
    multiplied_in_bf16,
    output_kind,
    relative_mse,
    set_rate,
    statistics_at_once,
    takes_bf16,
    trainable,
    training_batches,
)
from hantc.passes.place import CPU, copied_to
from hantc.passes.state import Context

# steps from one of a derived candidate's to its next, where time is short: it starts near its end, others far from it
_DERIVED_EVERY = 3
# Adam, cosine; losses are relative to the region's variance, so one rate serves all candidates from scratch: of 100 of
# them 88 ended nearer to the teacher than at 3e-3 (EfficientNet-B0: median error 0.168 for 0.197; ResNet-56: 0.043 for
# 0.055), and the best of four rates for each was better by 0 % in the median, 4 % in the 90th percentile
RATE = 1e-2
_DERIVED_RATE = 3e-3  # of what starts from the teacher's weights, times its family's own share
RECIPE = {
    "version": 13,
    "optimizer": "adam",
    "rate": [RATE, _DERIVED_RATE],
    "loss": "relative_mse",
    "rungs": [asdict(r) for r in RUNGS],
    "derived_every": _DERIVED_EVERY,
}
_POSITIONS = 1 << 16  # of a region's input maps that a candidate is derived from; fits look at fewer still
_SAMPLES = (32, 256)  # images for the same, at least and at most
_FIT_POSITIONS = 1 << 13  # of a region's output maps that a candidate's first weights are fitted to
_FIT_IMAGES = (32, 512)  # images for the same, at least and at most
_STEP_POSITIONS = 1 << 13  # of a region's input maps that a candidate learns from in one step, at least
_LEAST_IMAGES = 16  # in one step, however large the maps
_STARTED = 1e-6  # share of the training that first weights count as
_LEAST_SHARE = 0.5  # of its time that training keeps, however long its first weights took
_FEW_STEPS = 20  # fewer are worth a warning


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
    mixed: bool = False  # whether it multiplies in BF16 while it learns

    @property
    def rate(self) -> float:
        """Base learning rate."""
        return _DERIVED_RATE * DERIVED[self.spec.family].start if self.spec.family in DERIVED else RATE

    def due(self, step: int, *, hurried: bool) -> bool:
        """Whether it learns from the batch of this step. `hurried`: what it takes, the others miss."""
        return not hurried or self.spec.family not in DERIVED or step % _DERIVED_EVERY == 0


def gather(network: fx.GraphModule, regions: Sequence[Region], data: Dataset) -> dict[str, Tensor]:
    """The teacher's activations that enter `regions`, by node name: (n, *in_shape), the fewer images the larger
    the region's maps are, from the train split."""
    taps = sorted({r.input for r in regions})
    if not taps:
        return {}
    least, most = _SAMPLES
    size = {r.input: math.prod(r.in_shape[1:]) for r in regions}
    tapped = with_taps(network, taps, output=False)
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


def checkpoint_of(ctx: Context, jobs: Sequence[Job]) -> Checkpoint:
    """Where these jobs' common training is kept while it is under way: its progress is a share of what it may take."""
    return Checkpoint(ctx.store, digest([sorted(j.key for j in jobs), ctx.effort.time_limit_s]))


def seconds_for(ctx: Context, share: tuple[float, float]) -> float:
    """What training may take; `share` as in `train`."""
    return min(ctx.effort.distill_share * ctx.clock.limit_s * share[0], 0.6 * ctx.clock.remaining() * share[1])


def train(
    network: fx.GraphModule,
    jobs: Sequence[Job],
    ctx: Context,
    data: Dataset,
    checkpoint: Checkpoint,
    share: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Train all jobs side by side on the teacher's activations (phase 1 of the paper, §3.2): relative squared
    error, Adam, cosine; as many steps as the time allows. `share`: these jobs' part of all there are, and of those
    that are still to be trained."""
    taps = sorted({j.region.input for j in jobs} | {j.region.output for j in jobs})
    tapped = fast_module(with_taps(network, taps, output=False))
    sample = example_inputs(network.meta["info"], 2)[0]
    kind = output_kind(network, sample, data.num_classes)
    augment = augmentation(network, data, kind)
    size = min(ctx.effort.batch_size, len(data.train))
    steps = ctx.effort.distill_epochs * max(1, (len(data.train) + len(data.more or ())) // size)
    seconds = seconds_for(ctx, share)
    rates = sorted({j.rate for j in jobs})
    groups = [(rate, trainable([j.module for j in jobs if j.rate == rate])) for rate in rates]
    optimizer = torch.optim.Adam([{"params": params, "lr": rate} for rate, params in groups if params])
    begun = resume(jobs, checkpoint)
    device = ctx.place(network)
    for j in jobs:  # what is exact stays so: its norms keep their statistics
        fast_module(j.module).train(not is_exact(j.spec))
        j.mixed = ctx.mixes(device) and takes_bf16(j.module)
    if not begun:
        entered = time.monotonic()
        initialise(jobs, tapped, taps, data, augment, ctx, size)
        seconds = max(_LEAST_SHARE * seconds, seconds - (time.monotonic() - entered))
        if checkpoint.due():
            save(jobs, checkpoint, _STARTED)
    tapped = copied_to(device, tapped)
    for j in jobs:
        j.module.to(device)
    box = TimeBox(seconds, steps, begun=begun)
    rungs = [r for r in RUNGS if r.at > box.begun]
    with ctx.reporter.bar(f"distilling {len(jobs)} candidates", 1.0) as bar:
        bar.advance(box.begun)
        done, teacher_s, started = box.begun, 0.0, time.monotonic()
        for x, _ in training_batches(data, size, augment, ctx.config.seed):
            entered = time.monotonic()
            values, hurried = activations(tapped, taps, x.to(device)), box.hurried
            teacher_s += time.monotonic() - entered
            set_rate(optimizer, box.rate())
            optimizer.zero_grad(set_to_none=True)
            for j in jobs:
                if j.due(box.step, hurried=hurried):
                    step(j, values)
            optimizer.step()
            more = box.advance()
            while rungs and box.progress >= rungs[0].at:
                _retire(jobs, rungs.pop(0), optimizer)
            bar.advance(max(0.0, box.progress - done))
            done = max(done, box.progress)
            if not more:
                break
            if checkpoint.due():
                save(jobs, checkpoint, box.progress)
    seconds_spent = round(time.monotonic() - started, 3)
    ctx.reporter.event("steps", steps=box.step, seconds=seconds_spent, teacher_seconds=round(teacher_s, 3))
    if box.step < min(steps, _FEW_STEPS) and not box.begun:
        ctx.reporter.warn(f"candidates trained for {box.step} steps only: a longer --time-limit makes them better")
    for j in jobs:
        j.module.to(CPU).eval()
        ctx.reporter.event("distilled", region=j.region.name, candidate=j.spec.name, mse=j.loss, images=j.seen)


def save(jobs: Sequence[Job], checkpoint: Checkpoint, progress: float) -> None:
    """Keep how far all jobs have come."""
    facts = {j.key: [j.loss, j.dead, j.rival, j.seen, j.steps] for j in jobs}
    alive = {j.key: j.module.state_dict() for j in jobs if not (j.dead or j.rival)}
    checkpoint.save(prefixed(alive), progress, facts)


def resume(jobs: Sequence[Job], checkpoint: Checkpoint) -> float:
    """Take up what an interrupted run left; the share that it did."""
    saved = checkpoint.load()
    if saved is None or any(j.key not in saved.extra for j in jobs):
        return 0.0
    for j in jobs:
        j.loss, j.dead, j.rival, j.seen, j.steps = saved.extra[j.key]
        if not (j.dead or j.rival):
            j.module.load_state_dict(part_of(saved.tensors, j.key))
    return saved.progress


def initialise(
    jobs: Sequence[Job],
    tapped: fx.GraphModule,
    taps: Sequence[str],
    data: Dataset,
    augment: Augment | None,
    ctx: Context,
    size: int,
) -> None:
    """Start candidates that have random weights where those alone lead: their last norms at the mean and spread of
    the teacher's values, then their last convolutions at the least-squares fit, on as many images as that takes;
    and every norm's running statistics at those of these images."""
    fresh = [j for j in jobs if j.spec.family not in DERIVED]
    values = _first_values(fresh, tapped, taps, data, augment, ctx.config.seed, size)
    with ctx.reporter.bar(f"first weights of {len(fresh)} candidates", len(fresh)) as bar:
        for j in fresh:
            source, target = (values[e][: _fit_images(j.region)] for e in _ends(j))
            usual = ordinary(image_variance(source)) & ordinary(image_variance(target))
            if enough(usual):
                source, target = source[usual], target[usual]
            calibrate_norm(j.module, target, source)
            with statistics_at_once(j.module), torch.no_grad():
                if not fit_readout(j.module, source, target):
                    j.module(source)
            bar.advance()


def _first_values(
    jobs: Sequence[Job],
    tapped: fx.GraphModule,
    taps: Sequence[str],
    data: Dataset,
    augment: Augment | None,
    seed: int,
    size: int,
) -> dict[str, Tensor]:
    """The teacher's values at `taps` for as many images as `jobs` are fitted to, none of them twice."""
    needs = {t: max((_fit_images(j.region) for j in jobs if t in _ends(j)), default=0) for t in taps}
    wanted = different(data, size, max(needs.values(), default=0))
    found: dict[str, list[Tensor]] = {t: [] for t in taps}
    batches, seen = epochs(data.train, size, augment, seed), 0
    while seen < wanted:
        x, _ = next(batches)
        for tap, value in activations(tapped, taps, x).items():
            if seen < needs[tap]:
                found[tap].append(value[: needs[tap] - seen])
        seen += x.shape[0]
    return {t: torch.cat(found.pop(t)) for t in taps if found[t]}


def _ends(job: Job) -> tuple[str, str]:
    return job.region.input, job.region.output


def _fit_images(region: Region) -> int:
    """How many images a fit of a region's candidates looks at."""
    return fit_images(math.prod(region.out_shape[1:]), _FIT_POSITIONS, _FIT_IMAGES)


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
    ends = _ends(job)
    (source, target), variance, usual = (values[e] for e in ends), values.variance(ends[1]), values.usual(*ends)
    chosen = _chosen(job, source, usual, whole=whole)
    if chosen is not None:
        source, target, variance = source[chosen], target[chosen], variance[chosen]
    with multiplied_in_bf16(job.mixed, source.device):
        made = job.module(source)
    loss = relative_mse(made.float(), target, variance)
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


def _chosen(job: Job, source: Tensor, usual: Tensor | None, *, whole: bool) -> Tensor | None:
    """Which images of a batch, whose values are `source`, a candidate learns from in this step; None: all.

    Those that are not usual stay out: norms in training would take their statistics from them alone. And a
    convolution learns from positions: where an image has many, a part of the images is enough, in turn."""
    least = math.ceil(_STEP_POSITIONS / math.prod(job.region.in_shape[1:]))
    wanted = len(source) if whole else max(_LEAST_IMAGES, least)
    images = torch.arange(len(source), device=source.device) if usual is None else usual.nonzero().flatten()
    if len(images) <= wanted:
        return None if usual is None else images
    return images.roll(-job.steps * wanted % len(images))[:wanted]


def _retire(jobs: Sequence[Job], rung: Rung, optimizer: torch.optim.Optimizer) -> None:
    """Successive halving: stop training what a rival of its region already makes pointless."""
    alive = [j for j in jobs if not (j.dead or j.rival)]
    entrants = [Entrant(j.region.name, j.spec.name, j.cost, j.loss) for j in alive]
    for job, rival in zip(alive, outdone(entrants, rung), strict=True):
        if rival and trainable([job.module]):
            job.rival = rival
            for p in job.module.parameters():  # nor does it take memory any more
                p.grad = None
                optimizer.state.pop(p, None)
