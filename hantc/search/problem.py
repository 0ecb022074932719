"""The selection problem and its answers: plain numbers, validated, with the reason for whatever is left out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from hantc.core.errors import BudgetError, HantcError, UsageError
from hantc.core.types import Fetching

# Budgets and bounds hold to this share of themselves: the solvers work in floating point.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Item:
    """One (region, candidate, precision) that may be picked. `score`: what it costs in accuracy (lower is better);
    `cost`: milliseconds; `atoms`: the smallest regions that it covers, several for a span."""

    region: str
    candidate: str
    precision: str
    score: float
    cost: float
    atoms: frozenset[int]
    uses: tuple[float, ...] = ()  # of each of the problem's limits
    load_mb: float = 0.0  # on the caches

    @property
    def int8(self) -> bool:
        """Whether the item computes in int8, which is what borders pay for."""
        return self.precision == "int8"

    def __str__(self) -> str:
        return f"{self.region}/{self.candidate}/{self.precision}"


@dataclass(frozen=True)
class Border:
    """Two neighbouring atoms; `cost` (ms) is paid when exactly one side is int8. None stands for what is
    always fp32: glue between regions, or the graph's input or output."""

    left: int | None
    right: int | None
    cost: float


@dataclass(frozen=True)
class Limit:
    """A further sum that is bounded: `fixed` and the uses of all that is picked come to at most `most`."""

    name: str
    fixed: float
    most: float


@dataclass(frozen=True)
class Problem:
    """Pick items that cover each of the atoms 0…n_atoms-1 exactly once, with the least sum of scores, so that
    `fixed_cost` + costs + borders + `fetching` of all items' loads <= `budget` (ms; `math.inf` for none), and every
    one of `limits` holds."""

    n_atoms: int
    items: tuple[Item, ...]
    fixed_cost: float
    budget: float
    borders: tuple[Border, ...] = ()
    limits: tuple[Limit, ...] = ()
    fetching: Fetching = field(default_factory=Fetching)


@dataclass(frozen=True)
class Solution:
    """A selection. `items` are indices into `problem.items`, in the order of their first atom; `cost` (ms)
    includes the fixed cost, the borders and the fetching.

    `optimal`: proved to be within the asked gap of the best; `gap`: what is proved, relative to the objective
    (inf: nothing is)."""

    items: tuple[int, ...]
    score: float
    cost: float
    optimal: bool
    gap: float


class NoMoreSolutionsError(HantcError):
    """No selection differs enough from the earlier ones within the budget, or none was found in time."""


@dataclass(frozen=True)
class Usable:
    """The part of a problem that can be solved: indices into `problem.items` and `problem.borders`, and one
    line for each one left out."""

    items: tuple[int, ...]
    borders: tuple[int, ...]
    reasons: tuple[str, ...]


def usable(problem: Problem) -> Usable:
    """Which items and borders count. Never raises."""
    reasons: list[str] = []

    def fine(name: str, flaw: str) -> bool:
        if flaw:
            reasons.append(f"{name}: {flaw}")
        return not flaw

    items = tuple(i for i, item in enumerate(problem.items) if fine(str(item), _item_flaw(item, problem)))
    borders = tuple(
        i
        for i, border in enumerate(problem.borders)
        if fine(f"border {border.left}-{border.right}", _border_flaw(border, problem.n_atoms))
    )
    return Usable(items, borders, tuple(reasons))


def _item_flaw(item: Item, problem: Problem) -> str:
    if not math.isfinite(item.score):
        return f"score is {item.score}"
    if not math.isfinite(item.cost):
        return f"cost is {item.cost}"
    if not (math.isfinite(item.load_mb) and item.load_mb >= 0):
        return f"loads caches with {item.load_mb} MB"
    if not item.atoms:
        return "covers no atom"
    if len(item.uses) != len(problem.limits) or not all(math.isfinite(u) and u >= 0 for u in item.uses):
        return f"uses are {item.uses}"
    outside = sorted(a for a in item.atoms if not 0 <= a < problem.n_atoms)
    return f"covers atoms {outside}, which do not exist" if outside else ""


def _border_flaw(border: Border, n_atoms: int) -> str:
    if not math.isfinite(border.cost):
        return f"cost is {border.cost}"
    if border.cost < 0:
        return f"cost is negative ({border.cost:g} ms)"  # a change of precision never saves time: a noisy figure
    if border.left == border.right:
        return "both sides are the same"
    outside = [a for a in (border.left, border.right) if a is not None and not 0 <= a < n_atoms]
    return f"atoms {outside} do not exist" if outside else ""


def clean(problem: Problem) -> tuple[Problem, list[str]]:
    """The problem without the items and borders that cannot count (non-finite figures, atoms that do not
    exist), and a line for each of them. Item indices change."""
    use = usable(problem)
    kept = replace(
        problem,
        items=tuple(problem.items[i] for i in use.items),
        borders=tuple(problem.borders[i] for i in use.borders),
    )
    return kept, list(use.reasons)


def validate(problem: Problem) -> Usable:
    """`usable`, after checking that there is something to solve.

    Raises UsageError for a budget that is no number, HantcError for a fixed cost that is none or an atom that
    no item covers."""
    if math.isnan(problem.budget):
        raise UsageError("the latency budget is not a number", where="search", hint="give it as 0.5 or 8ms")
    if not math.isfinite(problem.fixed_cost):
        raise HantcError(
            f"the cost outside all regions is {problem.fixed_cost}",
            where="search",
            hint="measure again: the teacher's latency or its glue cost is not finite",
        )
    if not all(
        math.isfinite(x) and x >= 0
        for x in (*problem.fetching.knees, problem.fetching.ms_per_mb, problem.fetching.mb_per_ms)
    ):
        raise HantcError(f"weights cannot cost {problem.fetching}", where="search", hint="measure again")
    use = usable(problem)
    covered = {a for i in use.items for a in problem.items[i].atoms}
    missing = [a for a in range(problem.n_atoms) if a not in covered]
    if missing:
        dropped = f"; left out: {'; '.join(use.reasons[:5])}" if use.reasons else ""
        raise HantcError(
            f"no candidate covers atoms {missing}{dropped}",
            where="search",
            hint="every atom needs at least its teacher, with a finite score and cost",
        )
    return use


def evaluate(problem: Problem, picked: Iterable[int]) -> tuple[float, float]:
    """(score, cost) of a selection: cost in ms with the fixed cost, borders and fetching. HantcError unless `picked`
    covers every atom exactly once."""
    owner: dict[int, int] = {}
    chosen = sorted(set(picked))
    for i in chosen:
        for atom in problem.items[i].atoms:
            if atom in owner:
                raise HantcError(f"atom {atom} is covered twice", where="search")
            owner[atom] = i
    if len(owner) != problem.n_atoms:
        raise HantcError(f"{problem.n_atoms - len(owner)} atoms are not covered", where="search")

    def is_int8(atom: int | None) -> bool:
        return atom is not None and problem.items[owner[atom]].int8

    score = math.fsum(problem.items[i].score for i in chosen)
    # No border inside one item: both its sides have the same precision.
    borders = (
        b for b in problem.borders if not _border_flaw(b, problem.n_atoms) and is_int8(b.left) != is_int8(b.right)
    )
    fetching = problem.fetching.ms(math.fsum(problem.items[i].load_mb for i in chosen))
    items = (problem.items[i].cost for i in chosen)
    return score, math.fsum([problem.fixed_cost, *items, *(b.cost for b in borders), fetching])


def make_solution(problem: Problem, picked: Iterable[int], *, optimal: bool, gap: float) -> Solution:
    """The selection as a Solution, its figures summed from the items. HantcError unless an exact cover."""
    chosen = sorted(set(picked), key=lambda i: (min(problem.items[i].atoms), i))
    score, cost = evaluate(problem, chosen)
    return Solution(tuple(chosen), score, cost, optimal, gap)


def fits(cost: float, bound: float) -> bool:
    """Whether `cost` is within `bound`, to the solver's tolerance."""
    return cost <= bound + TOLERANCE * abs(bound)


def overlap(problem: Problem, a: Solution, b: Solution) -> int:
    """How many atoms two selections treat alike: covered by the very same item."""
    return sum(len(problem.items[i].atoms) for i in set(a.items) & set(b.items))


def overlap_cap(n_atoms: int, max_overlap: float) -> int:
    """Most atoms that two diverse selections may share: the share `max_overlap`, and never all of them."""
    return max(0, min(math.floor(max_overlap * n_atoms + 1e-9), n_atoms - 1))


def budget_error(problem: Problem, nearest: float) -> BudgetError:
    """The error for a budget below the least reachable cost `nearest` (ms)."""
    return BudgetError(
        f"no selection costs {problem.budget:.4g} ms or less: the least reachable is {nearest:.4g} ms "
        f"({problem.fixed_cost:.4g} ms of it outside all regions)",
        nearest=nearest,
        where="search",
        hint=f"ask for a budget of {_round_up(nearest):.4g} ms or more",
    )


def _round_up(value: float) -> float:
    """To four digits, upwards, so that the figure shown is itself reachable."""
    if value <= 0 or not math.isfinite(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return math.ceil(value / unit) * unit
