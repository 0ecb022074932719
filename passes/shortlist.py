"""Which of the measured candidates are worth training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hantc.core.types import CostTable, Region
from hantc.ops.registry import DERIVED, is_exact
from hantc.passes.limits import Allowance
from hantc.passes.state import Proposal

_MIN_GAIN = 0.92  # a candidate must cost at most this share of the teacher's operation to be trained


def shortlist(
    proposals: Sequence[Proposal],
    costs: CostTable,
    regions: Mapping[str, Region],
    places: tuple[int, int],
    budget: float,
    bounds: Sequence[Allowance] = (),
    *,
    whole: bool = False,
) -> tuple[list[Proposal], list[tuple[str, str, str, str]]]:
    """The candidates worth training: cheaper than the teacher's operation, and the most capable (by MACs)
    that fit under a few ceilings set around the asked `budget` (share of the teacher's latency). `places`:
    ceilings per region and per span for those from scratch (one less where there are derived ones); derived ones,
    which hardly need training, get one more. `bounds`: what else is bounded; a candidate counts by what it is
    nearest to using up, and need not be faster. What a candidate's weights make a network fetch counts as its latency.
    `whole`: for single regions, all that are cheaper. Also (region,
    candidate, precision, reason) of those left out."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for row in costs.rows:
        rows.setdefault((row.region, row.candidate), {})[row.precision] = costs.marginal_ms(row)
    kept: list[Proposal] = []
    skipped: list[tuple[str, str, str, str]] = []
    rivals: dict[tuple[str, bool], list[tuple[float, Proposal]]] = {}
    for p in proposals:
        teacher = rows[p.region, "teacher"]
        base = next(precision for precision in teacher if precision != "int8")
        best = min(rows.get((p.region, p.spec.name), {"": math.inf}).values())
        bar = min(teacher.values())
        if best > (1.0 if bounds else _MIN_GAIN) * bar:
            skipped.append(
                (p.region, p.spec.name, "*", f"not faster: {best:.3f} ms against the teacher's {bar:.3f} ms")
            )
        elif p.spec.family == "identity" or is_exact(p.spec):
            kept.append(p)
        else:
            strain = max([best / teacher[base], *(budget * b.strain(p.region, p.spec.name) for b in bounds)])
            rivals.setdefault((p.region, p.spec.family in DERIVED), []).append((strain, p))
    for (name, derived), options in rivals.items():
        if whole and len(regions[name].atoms) == 1:
            kept += [p for _, p in options]
            continue
        n = places[len(regions[name].atoms) > 1]
        if derived:
            n += 1
        elif (name, True) in rivals:
            n = max(1, n - 1)
        chosen = _under_ceilings(options, n, budget)
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
