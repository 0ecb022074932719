"""Distill: latency table -> candidates trained against the teacher, layer by layer."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import ClassVar

import torch
from torch import fx

from hantc.core.types import CostTable, Signature, digest
from hantc.data.dataset import Dataset
from hantc.ops.registry import DERIVED, build, is_exact
from hantc.passes.contest import SAME_COST
from hantc.passes.engine import trainable
from hantc.passes.limits import allowances
from hantc.passes.paper import RECIPE as PAPER
from hantc.passes.paper import train_paper
from hantc.passes.place import room
from hantc.passes.plug import origin_of
from hantc.passes.shortlist import shortlist
from hantc.passes.state import Context, Proposal, State, WeightMap
from hantc.passes.training import RECIPE, Job, checkpoint_of, gather, seconds_for, train

DEFAULT_BUDGET = 0.5
_WEIGHT_BYTES = 16  # float32, with gradient and Adam's two moments
_JOB_BYTES = 1 << 19  # of a candidate's modules and graph

Weights = dict[tuple[str, str], WeightMap]
Keyed = tuple[Proposal, str]  # with its key in the store
Skipped = tuple[str, str, str, str]  # region, candidate, precision, reason


class Distill:
    """Latency table -> trained candidates: one teacher pass feeds every region and every candidate (of those that
    fit into memory together)."""

    name: ClassVar[str] = "distill"
    requires: ClassVar[tuple[str, ...]] = ("network", "match", "proposals", "costs")
    ensures: ClassVar[tuple[str, ...]] = ("weights", "costs")

    def call(self, state: State, ctx: Context) -> State:
        """Train what the store does not hold."""
        assert state.network is not None and state.match is not None and state.costs is not None
        if ctx.data is None:
            return replace(state, weights=self._exact(state))
        regions = {r.name: r for r in state.match.regions}
        places = (ctx.effort.per_region, ctx.effort.per_span)
        budget = min(1.0, wanted_ms(state.costs, ctx) / state.costs.teacher_ms)
        whole = ctx.config.pool == "whole"
        bounds = allowances(state, ctx)
        proposals = state.proposals or ()
        idle: list[Proposal] = []
        if budget == 1.0 and not bounds and ctx.config.max_drop is None:
            took, wall = state.costs.pace * state.costs.teacher_ms, state.costs.pace * wanted_ms(state.costs, ctx)
            ctx.note(f"the teacher as it is takes {took:.2f} ms of the {wall:.2f} asked for: no candidate was trained")
            idle = [p for p in proposals if not is_exact(p.spec)]
            proposals = tuple(p for p in proposals if is_exact(p.spec))
        kept, skipped = shortlist(proposals, state.costs, regions, places, budget, bounds, whole=whole)
        skipped += [(p.region, p.spec.name, "*", "the teacher meets the budget as it is") for p in idle]
        keyed = [(p, weights_key(state, ctx, p)) for p in kept]
        weights, todo, outdone = self._stored(state, ctx, keyed)
        skipped += outdone
        wanted, trained = {key for _, key in todo}, 0
        every = parts(keyed, room(ctx.device, ctx.memory_limit) // 2)
        open_parts = [part for part in every if any(key in wanted for _, key in part)]
        for i, part in enumerate(open_parts):
            left = sum(map(len, open_parts[i:]))
            mine = [(p, key) for p, key in part if key in wanted]
            out, n = self._part(state, ctx, mine, weights, (len(part) / len(kept), len(part) / left))
            skipped, trained = skipped + out, trained + n
        ctx.reporter.event("distill", trained=trained, reused=len(kept) - len(todo))
        table = replace(state.costs, skipped=state.costs.skipped + tuple(skipped))
        return replace(state, weights=weights, costs=table)

    def _part(
        self, state: State, ctx: Context, todo: Sequence[Keyed], weights: Weights, share: tuple[float, float]
    ) -> tuple[list[Skipped], int]:
        """Train candidates side by side and add what they have become to `weights`; those that are out, and how many
        were trained. `share`: how much their part is of all, and of those left."""
        assert state.network is not None and ctx.data is not None
        jobs, still, late = self._jobs(state, ctx, ctx.data, todo, seconds_for(ctx, share))
        progress = checkpoint_of(ctx, [*jobs, *still])
        if jobs:
            if ctx.config.recipe == "paper":
                train_paper(state.network, jobs, ctx, ctx.data, progress)
            else:
                train(state.network, [*jobs, *still], ctx, ctx.data, progress, share)
        weights.update({(job.region.name, job.spec.name): _weights(job.module) for job in still})
        kept = [(job, self._keep(job, ctx, weights)) for job in jobs]
        progress.clear()
        if late:
            ctx.note(f"{len(late)} candidates were not derived for want of time: a longer --time-limit has them too")
        out = [(job.region.name, job.spec.name, "*", reason) for job, reason in kept if reason]
        return out + [(p.region, p.spec.name, "*", "no time was left to derive it") for p in late], len(jobs)

    @staticmethod
    def _exact(state: State) -> Weights:
        """The weights of exact candidates, which are the teacher's: there is nothing to learn."""
        assert state.network is not None and state.match is not None
        weights: Weights = {}
        for p in state.proposals or ():
            region = state.match.region(p.region)
            origin = origin_of(state.network, state.match, region)
            weights[p.region, p.spec.name] = _weights(build(p.spec, Signature.of(region), origin=origin))
        return weights

    @staticmethod
    def _stored(state: State, ctx: Context, kept: Sequence[Keyed]) -> tuple[Weights, list[Keyed], list[Skipped]]:
        """What the store holds of `kept`, what is to be trained, and what a rival among them is known to outdo."""
        costs, names = least_costs(state), {(p.region, p.spec.name) for p, _ in kept}
        weights: Weights = {}
        todo: list[Keyed] = []
        skipped: list[Skipped] = []
        for p, key in kept:
            serves = _as_long(ctx, ctx.store.get_meta("weights", key))
            stored = ctx.store.get_tensors("weights", key) if serves else None
            verdict = ctx.store.get_json("verdict", key) if stored is None else None
            verdict = verdict if verdict is not None and _as_long(ctx, verdict) else {}
            rival = (p.region, verdict.get("rival", ""))
            if stored is not None:
                weights[p.region, p.spec.name] = {k: torch.from_numpy(v) for k, v in stored.items()}
            elif verdict.get("dead"):
                skipped.append((p.region, p.spec.name, "*", verdict["dead"]))
            elif rival in names and costs[rival] <= SAME_COST * costs[p.region, p.spec.name]:
                # on another device, or at another precision, the rival may be the dearer one
                skipped.append((p.region, p.spec.name, "*", _outdone_by(rival[1])))
            else:
                todo.append((p, key))
        return weights, todo, skipped

    @staticmethod
    def _keep(job: Job, ctx: Context, weights: Weights) -> str:
        """Store what a trained candidate has become, and add it to `weights`; or why it is out."""
        if job.rival:
            ctx.store.put_json("verdict", job.key, {"rival": job.rival, **_limit(ctx)})
            return _outdone_by(job.rival)
        if not job.dead and not all(torch.isfinite(p).all() for p in job.module.parameters()):
            job.dead = "its training diverged (non-finite weights)"
        if job.dead:
            ctx.note(f"{job.region.name} {job.spec.name} dropped: {job.dead}")
            ctx.store.put_json("verdict", job.key, {"dead": job.dead, **_limit(ctx)})
            return job.dead
        tensors = _weights(job.module)
        ctx.store.put_tensors("weights", job.key, {k: v.numpy() for k, v in tensors.items()}, _limit(ctx))
        weights[job.region.name, job.spec.name] = tensors
        return ""

    @staticmethod
    def _jobs(
        state: State, ctx: Context, data: Dataset, todo: Sequence[Keyed], seconds: float
    ) -> tuple[list[Job], list[Job], list[Proposal]]:
        """What is to be trained, built; what has nothing to train; and what is left out, for deriving candidates has
        taken the `seconds` that training may: those derived by then are of all regions alike."""
        assert state.network is not None and state.match is not None and state.costs is not None
        costs = least_costs(state)
        regions = {p.region: state.match.region(p.region) for p, _ in todo if p.spec.family in DERIVED}
        samples = gather(state.network, list(regions.values()), data)
        built: dict[str, Job] = {}
        late: list[Proposal] = []
        deadline = time.monotonic() + seconds
        with ctx.reporter.bar(f"building {len(todo)} candidates", len(todo)) as bar:
            for p, key in _in_turn(todo):
                bar.advance()
                region = state.match.region(p.region)
                torch.manual_seed(int(key[:8], 16))
                origin = None
                if p.spec.family in DERIVED:
                    if not is_exact(p.spec) and time.monotonic() > deadline:
                        late.append(p)
                        continue
                    origin = origin_of(state.network, state.match, region, samples[region.input])
                module = build(p.spec, Signature.of(region), origin=origin)
                module.requires_grad_(not is_exact(p.spec))  # the least step would end its being exact
                built[key] = Job(region, p.spec, module, key, costs[p.region, p.spec.name])
        made = [built[key] for _, key in todo if key in built]
        jobs = [j for j in made if trainable([j.module])]
        return jobs, [j for j in made if not trainable([j.module])], late


def _in_turn(todo: Sequence[Keyed]) -> list[Keyed]:
    """Candidates from scratch and exact ones, then the derived ones of all regions by turns: deriving takes long."""
    quick = [(p, key) for p, key in todo if p.spec.family not in DERIVED or is_exact(p.spec)]
    regions: dict[str, list[Keyed]] = {}
    for p, key in todo:
        if p.spec.family in DERIVED and not is_exact(p.spec):
            regions.setdefault(p.region, []).append((p, key))
    rounds = itertools.zip_longest(*regions.values())
    return quick + [found for turn in rounds for found in turn if found is not None]


def parts(kept: Sequence[Keyed], room: int) -> list[list[Keyed]]:
    """Candidates in parts that fit into `room` bytes with their gradients and moments; a region's stay together, for
    they are compared. Parts do not depend on what was trained before, so that an interrupted one is found again."""
    regions: dict[str, list[Keyed]] = {}
    for p, key in kept:
        regions.setdefault(p.region, []).append((p, key))
    found: list[list[Keyed]] = []
    free = 0
    for mine in regions.values():
        size = sum(_JOB_BYTES + _WEIGHT_BYTES * p.params for p, _ in mine)
        if not found or size > free:
            found.append([])
            free = room
        found[-1] += mine
        free -= size
    return found


def _weights(module: fx.GraphModule) -> WeightMap:
    return {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}


def _limit(ctx: Context) -> dict[str, str]:
    """How long the run may take in which a candidate is trained, in seconds: kept beside what becomes of it."""
    return {"limit": repr(float(ctx.effort.time_limit_s))}


def _as_long(ctx: Context, kept: Mapping[str, str] | None) -> bool:
    """Whether something was trained in a run that might take as long as this one, or longer."""
    return kept is not None and float(kept.get("limit", 0.0)) >= ctx.effort.time_limit_s


def _outdone_by(rival: str) -> str:
    return f"{rival} costs no more and was nearer to the teacher when both had trained alike"


def least_costs(state: State) -> dict[tuple[str, str], float]:
    """Latency of each (region, candidate) in its cheapest precision, with what its weights make a network fetch, in
    milliseconds."""
    assert state.costs is not None
    costs: dict[tuple[str, str], float] = {}
    for row in state.costs.rows:
        at = (row.region, row.candidate)
        costs[at] = min(state.costs.marginal_ms(row), costs.get(at, math.inf))
    return costs


def wanted_ms(costs: CostTable, ctx: Context) -> float:
    """The latency asked for, in milliseconds of the table's clock (default: half the teacher's, or the
    teacher's where something else is bounded)."""
    if ctx.config.budget is not None and ctx.config.budget.ms is not None:
        return ctx.config.budget.ms / costs.pace
    if ctx.config.budget is not None:
        return ctx.config.budget.in_ms(costs.reference_ms)
    return costs.teacher_ms if ctx.config.limited else DEFAULT_BUDGET * costs.teacher_ms


def weights_key(state: State, ctx: Context, p: Proposal) -> str:
    """Store key of a candidate's trained weights: teacher, region, candidate, data and recipe. Not the time limit: what
    a longer run has trained serves a shorter one."""
    assert ctx.data is not None and state.match is not None
    region = state.match.region(p.region)
    recipe = ctx.recipe(RECIPE) if ctx.config.recipe == "hantc" else PAPER
    if ctx.config.pool == "whole":  # many more share the time, and compete for places
        recipe = {**recipe, "pool": "whole"}
    return digest(
        {
            "teacher": state.model_hash,
            "region": [region.input, region.output],
            "spec": asdict(p.spec),
            "data": ctx.data.training_stamp,
            "recipe": {**recipe, "effort": ctx.config.effort},
            "seed": ctx.config.seed,
        }
    )
