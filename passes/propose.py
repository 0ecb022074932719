"""Propose: regions -> candidate operations worth measuring."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import ClassVar

from hantc.core.types import CandidateSpec, Region, Signature
from hantc.ops.derived import structure
from hantc.ops.registry import DERIVED, Origin, families
from hantc.passes.plug import origin_of
from hantc.passes.state import Context, Proposal, State

_MAX_MACS = 1.5  # a candidate with more multiplications than this, relative to the teacher's, is hardly ever faster
_MAX_WHOLE = 24.0  # ... and with more than this cannot be; in between the cost pass asks the machine's ceilings

_Found = tuple[list[Proposal], list[tuple[str, str]]]  # of one region; of the others each spec's name and the reason


def spread(proposals: Sequence[Proposal], n: int) -> list[Proposal]:
    """`n` of the proposals: the middles of n equal parts of the range of log MACs, so that few of them are neither
    too weak nor too slow."""
    ordered = sorted(proposals, key=lambda p: (p.macs, p.spec.name))
    if len(ordered) <= n:
        return ordered
    logs = [math.log(max(p.macs, 1)) for p in ordered]
    wanted = [logs[0] + (logs[-1] - logs[0]) * (i + 0.5) / n for i in range(n)]
    chosen: dict[int, None] = {}
    for target in wanted:
        free = [i for i in range(len(ordered)) if i not in chosen]
        chosen.setdefault(min(free, key=lambda i: abs(logs[i] - target)))
    return [ordered[i] for i in sorted(chosen)]


class Propose:
    """Regions -> candidate operations worth measuring, with reasons for those that are not."""

    name: ClassVar[str] = "propose"
    requires: ClassVar[tuple[str, ...]] = ("match",)
    ensures: ClassVar[tuple[str, ...]] = ("proposals",)

    def call(self, state: State, ctx: Context) -> State:
        """Apply every family's grid to every region."""
        assert state.match is not None and state.network is not None
        proposals: list[Proposal] = []
        skipped: list[tuple[str, str, str]] = []
        alike: dict[Hashable, _Found] = {}  # networks repeat their blocks
        for region in state.match.regions:
            origin = origin_of(state.network, state.match, region)
            shapes = (Signature.of(region), region.macs, len(region.atoms))
            forms = (structure(origin.whole), *map(structure, origin.blocks))
            if shapes not in alike:
                alike[shapes] = self._region(region, ctx)
            if (shapes, forms) not in alike:
                alike[shapes, forms] = self._derived(region, origin, exact_only=ctx.data is None)
            for made, dropped in (alike[shapes], alike[shapes, forms]):
                proposals += [replace(p, region=region.name) for p in made]
                skipped += [(region.name, spec, reason) for spec, reason in dropped]
        ctx.reporter.event("propose", proposals=len(proposals), skipped=len(skipped))
        return replace(state, proposals=tuple(proposals), skipped=tuple(skipped))

    def _region(self, region: Region, ctx: Context) -> _Found:
        if ctx.data is None:
            # without data only zero-error forms are allowed: the normalized region itself, and rewrites of it
            return [], [("*", "needs --data: candidates must be distilled")]
        signature, whole = Signature.of(region), ctx.config.pool == "whole" and len(region.atoms) == 1
        by_family: dict[str, list[Proposal]] = {}
        skipped: list[tuple[str, str]] = []
        for name, family in families().items():
            for spec, reason in family.survey(signature):
                if name == "identity" and len(region.atoms) > 1:
                    reason = "the same as an identity for each block of the span"
                macs, params = family.estimate(spec, signature) if not reason else (0, 0)
                reason = reason or _too_large(macs, region, _MAX_WHOLE if whole else _MAX_MACS)
                if reason:
                    skipped.append((spec.name, reason))
                else:
                    by_family.setdefault(name, []).append(Proposal(region.name, spec, macs, params))
        share = self._shares(by_family, sum(map(len, by_family.values())) if whole else ctx.effort.measured_per_region)
        kept = [p for name, ps in by_family.items() for p in spread(ps, share[name])]
        names = {p.spec.name for p in kept}
        reason = f"not in the sample measured at --effort {ctx.config.effort}"
        if len(region.atoms) == 1:
            reason += "; --pool whole measures all of a single region's"
        skipped += [(p.spec.name, reason) for ps in by_family.values() for p in ps if p.spec.name not in names]
        return kept, skipped

    @staticmethod
    def _derived(region: Region, origin: Origin, *, exact_only: bool) -> _Found:
        """Candidates made from the teacher's own weights: few, so all of them are measured."""
        signature = Signature.of(region)
        made, skipped = [], []
        for family in DERIVED.values():
            if exact_only and not family.exact:
                continue
            for spec in family.grid():
                reason = family.reject_origin(spec, signature, origin)
                macs, params = family.size(spec, signature, origin) if not reason else (0, 0)
                if not reason and not family.exact:  # other kernels do as many multiplications in less time
                    reason = _too_large(macs, region, _MAX_MACS)
                if reason:
                    skipped.append((spec.name, reason))
                else:
                    made.append(Proposal(region.name, spec, macs, params))
        return made, skipped

    @staticmethod
    def _shares(by_family: dict[str, list[Proposal]], total: int) -> dict[str, int]:
        """Places per family: equal, what a small family leaves goes to the others."""
        shares = dict.fromkeys(by_family, 0)
        while total > 0 and any(shares[f] < len(by_family[f]) for f in by_family):
            for f, ps in by_family.items():
                if shares[f] < len(ps) and total > 0:
                    shares[f] += 1
                    total -= 1
        return shares


def _too_large(macs: int, region: Region, most: float) -> str:
    """Why a candidate of so many multiplications is not worth measuring; "" if it may be."""
    times = macs / max(region.macs, 1)
    return f"{times:.1f}× the teacher's multiplications: cannot be faster" if times > most else ""


def spec_of(name: str, proposals: Sequence[Proposal]) -> CandidateSpec:
    """The spec called `name`; KeyError if it was never proposed."""
    for p in proposals:
        if p.spec.name == name:
            return p.spec
    raise KeyError(name)
