"""Times the selection on made-up problems of the paper's size: python tools/bench/ilp.py [--k 10] [--gap 0.01]"""

from __future__ import annotations

import argparse
import math
import random
import time
from itertools import pairwise

from rich.console import Console
from rich.table import Table

from hantc.search.baselines import greedy
from hantc.search.ilp import solve, solve_diverse
from hantc.search.pareto import reachable
from hantc.search.problem import Border, Item, Problem, overlap


def make(kind: str, n: int, m: int, seed: int, fraction: float = 0.5) -> Problem:
    """n atoms, m candidates each, costs relative to a teacher of 1 ms per region.

    `independent`: scores and costs unrelated. `trade-off`: a fast candidate scores badly, with noise, so that
    few are beaten outright. `mixed`: trade-off, with an int8 twin for each candidate, borders, and two-atom
    spans."""
    rng = random.Random(seed)
    items: list[Item] = []

    def add(atoms: range, weight: float, j: int) -> None:
        region = f"r{atoms[0]}-{atoms[-1]}"
        cost = weight * rng.uniform(0.05, 1.0)
        score = rng.random() if kind == "independent" else weight * 0.05 / (cost / weight) * rng.lognormvariate(0, 0.3)
        items.append(Item(region, f"c{j}", "fp32", score, cost, frozenset(atoms)))
        if kind == "mixed":
            items.append(Item(region, f"c{j}", "int8", score * 1.1, cost * rng.uniform(0.3, 1.1), frozenset(atoms)))

    for a in range(n):
        weight = rng.uniform(0.2, 1.8)
        items.append(Item(f"r{a}-{a}", "teacher", "fp32", 0.0, weight, frozenset({a})))
        for j in range(m - 1):
            add(range(a, a + 1), weight, j)
        if kind == "mixed" and a + 1 < n:
            for j in range(20):
                add(range(a, a + 2), 1.5 * weight, j)
    teacher = math.fsum(i.cost for i in items if i.candidate == "teacher")
    ends = (None, *range(n), None)
    borders = tuple(Border(x, y, 0.05) for x, y in pairwise(ends)) if kind == "mixed" else ()
    return Problem(n, tuple(items), 0.1 * teacher, fraction * 1.1 * teacher, borders)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=46, help="regions")
    parser.add_argument("--m", type=int, default=197, help="candidates per region")
    parser.add_argument("--k", type=int, default=10, help="diverse selections")
    parser.add_argument("--gap", type=float, default=0.01)
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds for the k selections")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=0.5, help="fraction of the teacher's cost")
    args = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    for kind in ("independent", "trade-off", "mixed"):
        problem = make(kind, args.n, args.m, args.seed, args.budget)
        low, high = reachable(problem)
        t0 = time.perf_counter()
        one = solve(problem, gap=args.gap)
        t1 = time.perf_counter()
        plain = greedy(problem)
        t2 = time.perf_counter()
        many = solve_diverse(problem, args.k, gap=args.gap, time_limit=args.time_limit)
        t3 = time.perf_counter()
        shared = max((overlap(problem, a, b) for i, a in enumerate(many) for b in many[:i]), default=0)
        rows.append(
            (
                kind,
                str(len(problem.items)),
                f"{low:.2f}…{high:.2f} (asked {problem.budget:.2f})",
                f"{t1 - t0:.2f} s",
                f"{one.score:.4f} (gap {one.gap:.2%})",
                f"{plain.score:.4f}, {t2 - t1:.2f} s",
                f"{len(many)} in {t3 - t2:.1f} s",
                f"{max(s.score for s in many):.4f}",
                f"{max(s.gap for s in many):.2%}",
                f"{shared}/{args.n}",
            )
        )
    names = ("problem", "items", "reachable ms", "k=1", "score", "greedy score", f"k={args.k}", "worst score",
             "worst gap", "most atoms shared")  # fmt: skip
    table = Table(title=f"N={args.n} M={args.m} gap={args.gap:g} budget={args.budget:g}", show_header=False)
    for name, *values in zip(names, *rows, strict=True):
        table.add_row(name, *values)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
