"""Predicted against measured: what the latency table says of whole students, and what the clock says.

    python tools/bench/prediction.py MODEL.onnx ... [--selections 20] [--probes 6] [--passes 1] [--threads N]
        [--batch N] [--plot FILE.png]

Each model's table is measured as a compilation without images would (random weights do: latency hardly depends on
them). Then random selections, half of them in FP32, half of mixed precision, are built as real students and timed
beside the teacher. Which regions change and into what is drawn among the candidates that are not slower than the
teacher's own region: those that a compilation considers. `before`: the table as measured. `after`: the table corrected
by `--probes` further random selections, as a compilation corrects it by the students that it times; these are not
among the selections judged, and are spread over what is predicted (a compilation's are near its budget, as is what it
predicts by them: six that are as heavy as each other say nothing of light ones). All students are timed in turns, a
little at a time; `measured` is what each takes where the teacher beside it takes what it usually did
(`hantc.passes.turns`), `as timed` the plain median of its turns. Prints
a row a model and kind; exit code 1 if after correction a median error of what was `measured` is above 5 %, any above
15, or a student could not be built.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto

from hantc.core.errors import HantcError
from hantc.core.progress import Reporter
from hantc.core.types import ScoreRow, Signature, untouched
from hantc.inputs import make_config, prepare
from hantc.ops.registry import build
from hantc.passes.engine import statistics_at_once
from hantc.passes.plug import origin_for
from hantc.passes.program import make_plan, make_problem, parts_of, specs_of
from hantc.passes.state import Context, State
from hantc.passes.trials import corrected, evaluated, trials, turns_of, write_student
from hantc.passes.turns import at_one_state
from hantc.pipeline import PROFILE, run_passes
from hantc.report.live import RichReporter
from hantc.search.problem import Problem, Solution, make_solution

MEDIAN, WORST = 0.05, 0.15
_OF = 4


def draw(problem: Problem, rng: np.random.Generator, *, mixed: bool) -> Solution:
    """A random exact cover: each region is left alone, or becomes one of the candidates that are not slower."""
    at: dict[int, list[int]] = defaultdict(list)
    own = {min(i.atoms): i.cost for i in problem.items if untouched(i.candidate, i.precision) and len(i.atoms) == 1}
    for k, item in enumerate(problem.items):
        quick = item.cost <= 1.02 * sum(own[a] for a in item.atoms)
        if quick and (mixed or item.precision != "int8"):
            at[min(item.atoms)].append(k)
    share = rng.uniform(0.15, 1.0)  # of the regions that change: students of all speeds
    picked, atom = [], 0
    while atom < problem.n_atoms:
        lone = [k for k in at[atom] if untouched(problem.items[k].candidate, problem.items[k].precision)]
        others = [k for k in at[atom] if k not in lone]
        k = int(rng.choice(others if others and rng.random() < share else lone))
        picked.append(k)
        atom = max(problem.items[k].atoms) + 1
    return make_solution(problem, picked, optimal=False, gap=math.inf)


def spread(problem: Problem, rng: np.random.Generator, mixed: Sequence[bool]) -> list[Solution]:
    """One random cover for each of `mixed`: of `_OF` times as many of a kind those whose predicted latencies lie an
    equal number of others apart."""
    found = []
    for kind in dict.fromkeys(mixed):
        many = [draw(problem, rng, mixed=kind) for _ in range(_OF * mixed.count(kind))]
        found += sorted(many, key=lambda s: s.cost)[_OF // 2 :: _OF]
    return found


def with_weights(state: State, ctx: Context, solutions: Sequence[Solution], problem: Problem) -> State:
    """The state with random weights for all that is picked, their norms set as training would: what grows or fades
    from region to region ends in infinities, or in numbers so small that processors take longer over them."""
    assert state.network is not None and state.match is not None
    specs, made = specs_of(state), dict(state.weights or {})
    for s in solutions:
        for item in (problem.items[i] for i in s.items):
            key = (item.region, item.candidate)
            if item.candidate != "teacher" and key not in made:
                region = state.match.region(item.region)
                origin = origin_for(specs[item.candidate], state.network, state.match, region)
                torch.manual_seed(ctx.config.seed)
                module = build(specs[item.candidate], Signature.of(region), origin=origin).train()
                with statistics_at_once(module), torch.no_grad():
                    module(torch.randn(8, *region.in_shape))
                made[key] = module.eval().state_dict()
    return replace(state, weights=made)


def unscored(state: State) -> State:
    """The state with a score of 0 for every row of the table: all may be picked."""
    assert state.costs is not None
    rows = [ScoreRow(r.region, r.candidate, r.precision, 0.0, 0.0, None, 1.0, 0.0) for r in state.costs.rows]
    return replace(state, scores=tuple(rows))


def written(
    state: State, ctx: Context, problem: Problem, drawn: Sequence[tuple[str, Solution]]
) -> list[tuple[str, Solution, ModelProto]]:
    """Those that can be built: deep students of random weights may overflow, which leaves no range to quantise to."""
    kept = []
    for kind, s in drawn:
        try:
            kept.append((kind, s, write_student(state, ctx, make_plan(state, problem, s))))
        except HantcError as error:
            ctx.note(f"a student was left out: {error.message}")
    return kept


def study(model: str, args: argparse.Namespace, reporter: Reporter) -> tuple[list[dict[str, Any]], int]:
    """One record for every student of a model: what was predicted, before and after, and what it takes. Those of kind
    "probe" are what the correction was fitted to. And how many that were drawn could not be built."""
    with tempfile.TemporaryDirectory() as folder:
        store = args.store or Path(folder) / "store"
        # no student is timed in haste
        options: dict[str, Any] = {"time_limit": 86400.0}
        options |= {"target": args.target, "effort": args.effort, "out": Path(folder) / "out", "store": store}
        options |= {k: v for k, v in (("threads", args.threads), ("batch", args.batch)) if v}
        state, ctx = prepare(make_config(model, **options, backend=args.backend), reporter, measure_only=True)
        state, timings = run_passes(PROFILE, state, ctx)
        reporter.event("table", seconds=timings["cost"])
        state = unscored(state)
        problem = make_problem(state, math.inf)
        rng = np.random.default_rng(args.seed)
        kinds = [False, True] if "int8" in ctx.precisions else [False]
        records: list[dict[str, Any]] = []
        names = {False: "fp32", True: "mixed"}
        drawn = [(names[m], draw(problem, rng, mixed=m)) for m in kinds for _ in range(args.selections // len(kinds))]
        probes = spread(problem, rng, [kinds[k % len(kinds)] for k in range(args.probes)])
        state = with_weights(state, ctx, [*(s for _, s in drawn), *probes], problem)
        students = written(state, ctx, problem, [*(("probe", s) for s in probes), *drawn])
        plans = [make_plan(state, problem, s) for _, s, _ in students]
        turns = turns_of(state, ctx, [m for *_, m in students], 5 * args.passes)
        found = evaluated(state, plans, turns)
        assert state.costs is not None and state.match is not None
        tried = [e for (kind, *_), e in zip(students, found, strict=True) if kind == "probe"]
        # what the table that is judged says of students is no part of what they are judged by
        found = [replace(e, measured_ms=at_one_state(t, e.teacher_ms, 0.0)) for e, t in zip(found, turns, strict=True)]
        costs = corrected(state, trials(state, tried))
        fixed = make_problem(replace(state, costs=costs), math.inf)
        for (kind, s, _), e, own in zip(students, found, turns, strict=True):
            after = make_solution(fixed, s.items, optimal=False, gap=math.inf).cost
            facts = {"model": Path(model).stem, "kind": kind, "teacher_ms": e.teacher_ms}
            picks = [str(problem.items[i]) for i in s.items]
            facts |= {"before": s.cost, "after": after, "measured": e.measured_ms, "picks": picks}
            parts = parts_of(state.match, state.costs, e.plan)
            facts |= {"times": own, "as_timed": statistics.median(ms for ms, _ in own)}
            facts |= {"scale": state.costs.scale, "fetching": asdict(state.costs.fetching)}
            records.append({**facts, "parts": parts, "glue_ms": state.costs.glue_ms})
        return records, len(drawn) + len(probes) - len(students)


def errors(records: Sequence[dict[str, Any]], when: str, truth: str = "measured") -> list[float]:
    """Relative errors of the predictions, as they came."""
    return [r[when] / r[truth] - 1 for r in records]


def plot(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Predicted over measured, one panel a model, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(r["model"] for r in records))
    figure, axes = plt.subplots(1, len(models), figsize=(3.6 * len(models), 3.8), squeeze=False)
    for ax, model in zip(axes.flat, models, strict=True):
        mine = [r for r in records if r["model"] == model]
        top = 1.05 * max(max(r["before"], r["after"], r["measured"]) for r in mine)
        ax.fill_between([0, top], [0, 0.95 * top], [0, 1.05 * top], color="0.9", label="within 5 %")
        for kind, marker in (("fp32", "o"), ("mixed", "^")):
            own = [r for r in mine if r["kind"] == kind]
            for when, colour in (("before", "tab:gray"), ("after", "tab:blue")):
                x, y = [r["measured"] for r in own], [r[when] for r in own]
                ax.plot(x, y, marker, color=colour, ms=4, label=f"{kind}, {when}")
        ax.set(title=model, xlabel="measured, ms", ylabel="predicted, ms", xlim=(0, top), ylim=(0, top))
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("models", nargs="+", metavar="MODEL")
    p.add_argument("--selections", type=int, default=20)
    p.add_argument("--probes", type=int, default=6)
    p.add_argument(
        "--passes", type=int, default=1, help="time each student so many times as long as a compilation does"
    )
    p.add_argument("--target", default="xeon")
    p.add_argument("--backend")
    p.add_argument("--effort", default="quick")
    p.add_argument("--threads", type=int, help="default: the machine's cores")
    p.add_argument("--batch", type=int, help="default: the target's")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--store", type=Path, help="keep the measurements there")
    p.add_argument("--json", type=Path)
    p.add_argument("--plot", type=Path)
    args = p.parse_args(argv)
    reporter, records, missing = RichReporter(), list[dict[str, Any]](), 0
    for model in args.models:
        found, lost = study(model, args, reporter)
        records, missing = records + found, missing + lost
        if args.json:
            args.json.write_text(json.dumps(records, indent=1))
    print("| network | students | median error before | worst | median after | worst | after, as timed | worst |")
    print("|---|---|---|---|---|---|---|---|")
    good = not missing
    records = [r for r in records if r["kind"] != "probe"]
    for model, kind in dict.fromkeys((r["model"], r["kind"]) for r in records):
        mine = [r for r in records if (r["model"], r["kind"]) == (model, kind)]
        cells = []
        for when, truth in (("before", "measured"), ("after", "measured"), ("after", "as_timed")):
            sizes = [abs(e) for e in errors(mine, when, truth)]
            middle, worst = statistics.median(sizes), max(sizes)
            cells += [f"{100 * middle:.1f} %", f"{100 * worst:.1f} %"]
            good &= truth != "measured" or when != "after" or (middle <= MEDIAN and worst <= WORST)
        print(f"| {model} | {len(mine)} {kind} | {' | '.join(cells)} |")
    if missing:
        print(f"{missing} students could not be built", file=sys.stderr)
    if args.plot:
        plot(args.plot, records)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
