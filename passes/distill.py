"""Distill: latency table -> candidates trained against the teacher, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from hantc.core.types import CandidateSpec, CostTable, Region, Signature, digest
from hantc.data.dataset import Dataset
from hantc.dialect.examples import example_inputs
from hantc.dialect.graph import with_taps
from hantc.ops.registry import build
from hantc.passes.engine import (
    TimeBox,
    augmentation,
    calibrate_norm,
    epochs,
    fast_module,
    output_kind,
    relative_mse,
    set_rate,
    trainable,
)
from hantc.passes.state import Context, Proposal, State, WeightMap

DEFAULT_BUDGET = 0.5
_RATE = 3e-3  # Adam, cosine; losses are relative to the region's variance, so one rate serves all
_MIN_GAIN = 0.92  # a candidate must cost at most this share of the teacher's operation to be trained
_RECIPE = {"version": 3, "optimizer": "adam", "rate": _RATE, "loss": "relative_mse"}


@dataclass
class Job:
    """One candidate in training."""

    region: Region
    spec: CandidateSpec
    module: fx.GraphModule
    key: str
    loss: float = float("nan")
    dead: str = ""
    seen: int = field(default=0)


def shortlist(
    proposals: Sequence[Proposal],
    costs: CostTable,
    regions: Mapping[str, Region],
    places: tuple[int, int],
    budget: float,
) -> tuple[list[Proposal], list[tuple[str, str, str, str]]]:
    """The candidates worth training: cheaper than the teacher's operation, and the most capable (by MACs)
    that fit under a few ceilings set around the asked `budget` (share of the teacher's latency). `places`:
    ceilings per region and per span. Also (region, candidate, precision, reason) of those left out."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for row in costs.rows:
        rows.setdefault((row.region, row.candidate), {})[row.precision] = row.latency_ms
    kept: list[Proposal] = []
    skipped: list[tuple[str, str, str, str]] = []
    by_region: dict[str, list[tuple[float, Proposal]]] = {}
    for p in proposals:
        teacher = rows[p.region, "teacher"]
        best = min(rows.get((p.region, p.spec.name), {"": math.inf}).values())
        bar = min(teacher.values())
        if best > _MIN_GAIN * bar:
            skipped.append(
                (p.region, p.spec.name, "*", f"not faster: {best:.3f} ms against the teacher's {bar:.3f} ms")
            )
        elif p.spec.family == "identity":
            kept.append(p)
        else:
            by_region.setdefault(p.region, []).append((best / teacher["fp32"], p))
    for name, options in by_region.items():
        chosen = _under_ceilings(options, places[len(regions[name].atoms) > 1], budget)
        kept += chosen
        names = {c.spec.name for c in chosen}
        reason = "another of no more latency has more capacity"
        skipped += [(name, p.spec.name, "*", reason) for _, p in options if p.spec.name not in names]
    return kept, skipped


def _under_ceilings(options: Sequence[tuple[float, Proposal]], places: int, budget: float) -> list[Proposal]:
    """The candidate of most MACs under each of `places` latency ceilings, from 1.2 of the budget downwards."""
    chosen: dict[str, Proposal] = {}
    for i in range(places):
        ceiling = 1.2 * budget * 0.6**i
        fit = [(t, p) for t, p in options if t <= ceiling]
        if fit:
            best = max(fit, key=lambda f: (f[1].macs, -f[0], f[1].spec.name))[1]
        else:
            best = min(options, key=lambda f: (f[0], -f[1].macs, f[1].spec.name))[1]  # none fits: the cheapest
        chosen[best.spec.name] = best
    return list(chosen.values())


class Distill:
    """Latency table -> trained candidates: one teacher pass feeds every region and every candidate."""

    name: ClassVar[str] = "distill"
    requires: ClassVar[tuple[str, ...]] = ("network", "match", "proposals", "costs")
    ensures: ClassVar[tuple[str, ...]] = ("weights", "costs")

    def call(self, state: State, ctx: Context) -> State:
        """Train what the store does not hold."""
        assert state.network is not None and state.match is not None and state.costs is not None
        if ctx.data is None:
            return replace(state, weights={})
        regions = {r.name: r for r in state.match.regions}
        places = (ctx.effort.per_region, ctx.effort.per_span)
        budget = min(1.0, wanted_ms(state.costs, ctx) / state.costs.teacher_ms)
        kept, skipped = shortlist(state.proposals or (), state.costs, regions, places, budget)
        weights: dict[tuple[str, str], WeightMap] = {}
        jobs: list[Job] = []
        for p in kept:
            key = weights_key(state, ctx, p)
            stored = ctx.store.get_tensors("weights", key)
            if stored is not None:
                weights[p.region, p.spec.name] = {k: torch.from_numpy(v) for k, v in stored.items()}
                continue
            torch.manual_seed(int(key[:8], 16))
            module = build(p.spec, Signature.of(regions[p.region]))
            if not trainable([module]):
                weights[p.region, p.spec.name] = {}
            else:
                jobs.append(Job(regions[p.region], p.spec, module, key))
        if jobs:
            train(state.network, jobs, ctx, ctx.data)
        for job in jobs:
            if not job.dead and not all(torch.isfinite(p).all() for p in job.module.parameters()):
                job.dead = "its training diverged (non-finite weights)"
            if job.dead:
                ctx.note(f"{job.region.name} {job.spec.name} dropped: {job.dead}")
                skipped.append((job.region.name, job.spec.name, "*", job.dead))
                continue
            tensors = {k: v.detach().cpu().contiguous() for k, v in job.module.state_dict().items()}
            ctx.store.put_tensors("weights", job.key, {k: v.numpy() for k, v in tensors.items()})
            weights[job.region.name, job.spec.name] = tensors
        ctx.reporter.event("distill", trained=len(jobs), reused=len(kept) - len(jobs))
        table = replace(state.costs, skipped=state.costs.skipped + tuple(skipped))
        return replace(state, weights=weights, costs=table)


def wanted_ms(costs: CostTable, ctx: Context) -> float:
    """The latency asked for, in milliseconds (default: half the teacher's)."""
    if ctx.config.budget is not None:
        return ctx.config.budget.in_ms(costs.teacher_ms)
    return DEFAULT_BUDGET * costs.teacher_ms


def weights_key(state: State, ctx: Context, p: Proposal) -> str:
    """Store key of a candidate's trained weights: teacher, region, candidate, data and recipe."""
    assert ctx.data is not None and state.match is not None
    region = state.match.region(p.region)
    return digest(
        {
            "teacher": state.model_hash,
            "region": [region.input, region.output],
            "spec": asdict(p.spec),
            "data": ctx.data.fingerprint,
            "recipe": {**_RECIPE, "effort": ctx.config.effort, "limit": ctx.effort.time_limit_s},
            "seed": ctx.config.seed,
        }
    )


def train(network: fx.GraphModule, jobs: Sequence[Job], ctx: Context, data: Dataset) -> None:
    """Train all jobs side by side on the teacher's activations (phase 1 of the paper, §3.2): relative squared
    error, Adam, cosine; as many steps as the time share allows."""
    taps = sorted({j.region.input for j in jobs} | {j.region.output for j in jobs})
    tapped = fast_module(with_taps(network, taps))
    sample = example_inputs(network.meta["info"], 2)[0]
    kind = output_kind(network, sample, data.num_classes)
    augment = augmentation(network, data, kind)
    size = min(ctx.effort.batch_size, len(data.train))
    steps = ctx.effort.distill_epochs * max(1, len(data.train) // size)
    seconds = ctx.effort.distill_share * ctx.clock.limit_s
    optimizer = torch.optim.Adam(trainable([j.module for j in jobs]), lr=_RATE)
    box = TimeBox(min(seconds, 0.6 * ctx.clock.remaining()), steps)
    with ctx.reporter.bar(f"distilling {len(jobs)} candidates", 1.0) as bar:
        done = 0.0
        for x, _ in epochs(data.train, size, augment, ctx.config.seed):
            values = _activations(tapped, taps, x)
            if box.step == 0:
                for j in jobs:
                    fast_module(j.module).train()
                    calibrate_norm(j.module, values[j.region.output], values[j.region.input])
            set_rate(optimizer, box.rate())
            optimizer.zero_grad(set_to_none=True)
            for j in jobs:
                _step(j, values)
            optimizer.step()
            more = box.advance()
            bar.advance(max(0.0, box.progress - done))
            done = max(done, box.progress)
            if not more:
                break
    for j in jobs:
        j.module.eval()
        ctx.reporter.event("distilled", region=j.region.name, candidate=j.spec.name, mse=j.loss, images=j.seen)


def _activations(tapped: fx.GraphModule, taps: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        _, values = tapped(x)
    return dict(zip(taps, values, strict=True))


def _step(job: Job, values: Mapping[str, Tensor]) -> None:
    """Forward and backward of one candidate; a non-finite loss ends its training, not the run."""
    if job.dead:
        return
    loss = relative_mse(job.module(values[job.region.input]), values[job.region.output])
    if not torch.isfinite(loss):
        job.dead = "its training diverged (non-finite loss)"
        for p in job.module.parameters():
            p.grad = None
        return
    loss.backward()
    value = float(loss.detach())
    job.loss = value if math.isnan(job.loss) else 0.98 * job.loss + 0.02 * value
    job.seen += values[job.region.input].shape[0]
