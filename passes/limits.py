"""What a student may have beside its latency: weights, multiply-accumulates, memory for activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from hantc.core.config import Cap
from hantc.core.errors import BudgetError
from hantc.core.types import WEIGHT_BYTES, Signature
from hantc.dialect.examples import example_inputs
from hantc.dialect.graph import count_macs, count_params, peak_activations, shapes_of
from hantc.ops.registry import build
from hantc.passes.plug import origin_for, teacher_part
from hantc.passes.state import Context, State
from hantc.search.ilp import cheapest
from hantc.search.problem import Item, Problem, fits

Uses = Mapping[tuple[str, str], float]  # by (region, candidate)


@dataclass(frozen=True)
class Allowance:
    """One bound. `uses`: what each candidate takes in its region. Weights and products add up over the regions, to
    `fixed`, which lies outside all of them; of memory the largest peak counts."""

    option: str
    what: str
    teacher: float
    most: float
    fixed: float
    uses: Uses
    adds_up: bool

    def strain(self, region: str, candidate: str) -> float:
        """How far a candidate is from its share of what is allowed: 1 is just it, above 1 too much."""
        own = self.uses.get((region, "teacher"), 0.0)
        share = self.uses[region, candidate] / own if own > 0 else 0.0
        if not self.adds_up:
            return self.uses[region, candidate] / self.most
        return share * self.teacher / self.most

    def too_small(self, least: float) -> BudgetError:
        """The error where nothing that can be picked takes less than `least`."""
        share = least / self.teacher
        return BudgetError(
            f"the student cannot have {self.most:,.0f} {self.what} ({self.most / self.teacher:.3f} of the teacher's "
            f"{self.teacher:,.0f}): the least reachable is {least:,.0f}",
            nearest=share,
            where=self.option,
            hint=f"{self.option} {min(1.0, share * 1.001 + 5e-4):.3f}, or --effort thorough for more candidates",
        )


def allowances(state: State, ctx: Context) -> tuple[Allowance, ...]:
    """Every bound that was asked for."""
    config, found = ctx.config, []
    if config.budget_params is not None:
        found.append(_summed(state, "--budget-params", "weights", config.budget_params, "params"))
    if config.budget_macs is not None:
        found.append(_summed(state, "--budget-macs", "multiply-accumulates", config.budget_macs, "macs"))
    if config.budget_memory is not None:
        found.append(_memory(state, ctx, config.budget_memory))
    return tuple(found)


def _summed(state: State, option: str, what: str, cap: Cap, figure: str) -> Allowance:
    assert state.network is not None and state.match is not None and state.costs is not None
    if figure == "params":
        teacher = count_params(state.network)
    else:
        shapes = shapes_of(state.network, example_inputs(state.network.meta["info"], 1))
        teacher = count_macs(state.network, shapes)
    blocks = {r.atoms[0]: getattr(r, figure) for r in state.match.regions if len(r.atoms) == 1}
    # what a part holds beside its blocks is counted outside all regions
    beyond = {r.name: getattr(r, figure) - sum(blocks[a] for a in r.atoms) for r in state.match.regions}
    uses = {(r.region, r.candidate): max(0.0, getattr(r, figure) - beyond[r.region]) for r in state.costs.rows}
    inside = sum(blocks.values())
    return Allowance(option, what, teacher, cap.of(teacher), max(0.0, teacher - inside), uses, adds_up=True)


def _memory(state: State, ctx: Context, cap: Cap) -> Allowance:
    """Peaks of what is alive at once, at the run's batch and in its floating-point precision (INT8 regions take
    less). A region has one input and one output, so that its peak is the network's while it runs."""
    assert state.network is not None and state.match is not None and state.costs is not None
    size = WEIGHT_BYTES.get(ctx.base, 4) * ctx.config.batch
    inside = {n for r in state.match.regions if len(r.atoms) == 1 for n in r.nodes}
    shapes = shapes_of(state.network, example_inputs(state.network.meta["info"], 1))
    glue = size * peak_activations(state.network, shapes, passing=inside) // _own_batch(state.network)
    uses: dict[tuple[str, str], float] = {}
    specs = {(p.region, p.spec.name): p.spec for p in state.proposals or ()}
    for row in state.costs.rows:
        key = (row.region, row.candidate)
        if key in uses:
            continue
        region = state.match.region(row.region)
        if row.candidate == "teacher":
            module = teacher_part(state.network, region)
        else:
            origin = origin_for(specs[key], state.network, state.match, region)
            module = build(specs[key], Signature.of(region), origin=origin)
        uses[key] = size * _peak(module, region.in_shape)
    teacher = max([glue, *(v for (_, c), v in uses.items() if c == "teacher")])
    return Allowance("--budget-memory", "bytes of activations", teacher, cap.of(teacher), glue, uses, adds_up=False)


def activation_bytes(network: fx.GraphModule, ctx: Context) -> int:
    """A network's largest sum of activations that are alive at once, as `--budget-memory` counts them."""
    peak = peak_activations(network, shapes_of(network, example_inputs(network.meta["info"], 1)))
    return WEIGHT_BYTES.get(ctx.base, 4) * ctx.config.batch * peak // _own_batch(network)


def _own_batch(network: fx.GraphModule) -> int:
    """The batch that a file fixes; 1 where it leaves it open."""
    shapes = [spec.shape for spec in network.meta["info"].inputs[:1]]
    return next((shape[0] for shape in shapes if shape and isinstance(shape[0], int)), 1)


def _peak(module: fx.GraphModule, in_shape: Sequence[int]) -> int:
    return peak_activations(module, shapes_of(module, [torch.zeros(1, *in_shape)]))


def check_reachable(state: State, bounds: Sequence[Allowance]) -> None:
    """BudgetError, naming the option and the nearest amount, for a bound that alone cannot be met."""
    assert state.match is not None and state.scores is not None
    rows = [r for r in state.scores if not r.dropped]
    for bound in bounds:
        atoms = {r.name: frozenset(r.atoms) for r in state.match.regions}
        known = [(r.region, r.candidate) for r in rows if (r.region, r.candidate) in bound.uses]
        offers = [(atoms[region], bound.uses[region, candidate]) for region, candidate in known]
        if bound.adds_up:
            items = tuple(Item(str(i), "", "fp32", 0.0, use, a) for i, (a, use) in enumerate(offers))
            least = cheapest(Problem(state.match.n_atoms, items, bound.fixed, math.inf)).cost
        else:  # an atom's least peak is that of the best region that covers it
            every = range(state.match.n_atoms)
            least = max([bound.fixed, *(min(use for a, use in offers if atom in a) for atom in every)])
        if not fits(least, bound.most):
            raise bound.too_small(least)
