"""The paper's way of training candidates (§3.2), kept as the reference that ours is measured against."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import fx

from hantc.data.augment import Augment
from hantc.data.dataset import Dataset
from hantc.dialect.examples import example_inputs
from hantc.dialect.graph import with_taps
from hantc.passes.checkpoint import Checkpoint
from hantc.passes.engine import TimeBox, augmentation, epochs, fast_module, output_kind, set_rate, trainable
from hantc.passes.place import CPU, copied_to, place_of
from hantc.passes.state import Context
from hantc.passes.training import Job, activations, resume, save, step

RATE = 0.1  # cosine; of 0.3, 0.1 and 0.03 tools/bench/pool_cost.py takes the best for each candidate
_MOMENTUM = 0.9
RECIPE = {"version": 2, "optimizer": "sgd", "rate": RATE, "momentum": _MOMENTUM, "epochs": 1, "loss": "relative_mse"}


def train_paper(
    network: fx.GraphModule, jobs: Sequence[Job], ctx: Context, data: Dataset, checkpoint: Checkpoint
) -> None:
    """Train all jobs by SGD without weight decay, one epoch each, one candidate per region on each pass over the
    data. Errors are taken as in our own training, where the paper multiplies them by γ_MSE = 0.001: one rate then
    serves every region. The time limit does not hold for it."""
    begun = time.monotonic()
    rounds = one_each(sorted(jobs, key=lambda j: j.key))  # whatever their order when an interrupted run began
    sample = example_inputs(network.meta["info"], 2)[0]
    augment = augmentation(network, data, output_kind(network, sample, data.num_classes))
    size = ctx.effort.batch_size
    done = round(resume(jobs, checkpoint) * len(rounds))
    with ctx.reporter.bar(f"distilling {len(jobs)} candidates in {len(rounds)} epochs", len(rounds)) as bar:
        bar.advance(done)
        for k, part in enumerate(rounds[done:], done):
            one_epoch(network, part, data, augment, size=size, seed=ctx.config.seed + k, rate=RATE, device=ctx.device)
            save(jobs, checkpoint, (k + 1) / len(rounds))
            bar.advance(1)
    ctx.clock.excuse(time.monotonic() - begun)
    for j in jobs:
        ctx.reporter.event("distilled", region=j.region.name, candidate=j.spec.name, mse=j.loss, images=j.seen)


def one_each(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs in rounds of at most one per region, in their order."""
    rounds: list[list[Job]] = []
    turn: dict[str, int] = {}
    for j in jobs:
        k = turn[j.region.name] = turn.get(j.region.name, -1) + 1
        if k == len(rounds):
            rounds.append([])
        rounds[k].append(j)
    return rounds


def one_epoch(
    network: fx.GraphModule,
    jobs: Sequence[Job],
    data: Dataset,
    augment: Augment | None,
    *,
    size: int,
    seed: int,
    rate: float,
    device: torch.device = CPU,
) -> None:
    """One pass over the training images in batches of `size`, for one candidate of each region."""
    size = min(size, len(data.train))
    taps = sorted({j.region.input for j in jobs} | {j.region.output for j in jobs})
    device = place_of(device, network)
    tapped = copied_to(device, fast_module(with_taps(network, taps, output=False)))
    for j in jobs:
        fast_module(j.module).train().to(device)
    params = trainable([j.module for j in jobs])
    optimizer = torch.optim.SGD(params, lr=rate, momentum=_MOMENTUM) if params else None
    box = TimeBox(math.inf, max(1, len(data.train) // size))
    for x, _ in epochs(data.train, size, augment, seed):
        values = activations(tapped, taps, x.to(device))
        if optimizer is not None:
            set_rate(optimizer, box.rate())
            optimizer.zero_grad(set_to_none=True)
        for j in jobs:
            step(j, values, whole=True)
        if optimizer is not None:
            optimizer.step()
        if not box.advance():
            break
    for j in jobs:
        j.module.to(CPU).eval()
