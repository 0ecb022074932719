"""What training a pool costs: hantc's way against the paper's, side by side in one run.

    python tools/bench/pool_cost.py [MODEL DATA] [--per-region 4] [--images N] [--rates 0.3 0.1 0.03]

By default with the demo's teacher. Of every single region's whole pool, so many candidates are drawn at random and
trained twice, from the same weights. The paper's way: SGD, one epoch, one candidate per region on each pass; tried at
each rate, and a candidate's goal is the least error it reached at any of them, while only one try is counted. Our
way: all candidates on one teacher pass, Adam, cosine runs of 1/8, 1/4, … of an epoch, where each candidate stops when
it has reached its goal. Errors are taken on search images, over the region's variance. Compute is processor time of
the training steps, on our side with the fit that they start from; looking at the errors is not counted on either side.
Prints both, per candidate, and the ratio.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx

from hantc.core.memory import retained_memory
from hantc.core.types import MatchResult, Signature
from hantc.data.augment import Augment
from hantc.data.dataset import Dataset
from hantc.dialect.examples import example_inputs
from hantc.dialect.graph import with_taps
from hantc.inputs import make_config, prepare
from hantc.ops.registry import build, propose
from hantc.passes import paper, training
from hantc.passes.engine import (
    TimeBox,
    augmentation,
    epochs,
    fast_module,
    output_kind,
    relative_mse,
    set_rate,
    trainable,
)
from hantc.passes.load import Load
from hantc.passes.match import Match
from hantc.passes.normalize import Normalize
from hantc.passes.state import Context
from hantc.passes.training import Job, activations, initialise, step
from hantc.pipeline import run_passes
from hantc.report.live import RichReporter

ROOT = Path(__file__).resolve().parents[2]
DEMO = (ROOT / "tools" / "demo" / "digits_efficientnet.onnx", ROOT / "build" / "demo" / "digits.npz")
LENGTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)  # of our runs, in epochs, one after the other
LOOKS = 6  # at the errors, in each of them
SIZE = 64


@dataclass
class Bench:
    """What both ways train on."""

    network: fx.GraphModule
    data: Dataset
    augment: Augment | None
    ctx: Context
    held: dict[str, Tensor]  # the teacher's values on search images, by node
    seed: int

    def error(self, job: Job) -> float:
        """Relative error of a candidate as it would run."""
        job.module.eval()
        with torch.no_grad():
            found = float(relative_mse(job.module(self.held[job.region.input]), self.held[job.region.output]))
        return found if math.isfinite(found) else math.inf


def sample(match: MatchResult, per_region: int, seed: int) -> list[Job]:
    """Candidates drawn from the pool of every region that is not a span, built; without those that have no weights."""
    rng = random.Random(seed)
    jobs = []
    for region in (r for r in match.regions if len(r.atoms) == 1):
        signature = Signature.of(region)
        pool = [s for s in propose(signature) if s.family != "identity"]
        for spec in rng.sample(pool, min(per_region, len(pool))):
            torch.manual_seed(seed)
            job = Job(region, spec, build(spec, signature), f"{region.name} {spec.name}")
            if trainable([job.module]):
                jobs.append(job)
    return jobs


def copies(jobs: Sequence[Job]) -> list[Job]:
    """The same candidates, not trained yet."""
    return [replace(j, module=copy.deepcopy(j.module)) for j in jobs]


def by_paper(bench: Bench, jobs: Sequence[Job], rate: float) -> tuple[dict[str, float], float]:
    """Each candidate's error after the paper's training, and the processor seconds of it."""
    begun = time.process_time()
    for k, part in enumerate(paper.one_each(jobs)):
        paper.one_epoch(bench.network, part, bench.data, bench.augment, size=SIZE, seed=bench.seed + k, rate=rate)
    spent = time.process_time() - begun
    return {j.key: bench.error(j) for j in jobs}, spent


def ends(jobs: Sequence[Job]) -> list[str]:
    """The nodes whose values these candidates are trained on."""
    return sorted({j.region.input for j in jobs} | {j.region.output for j in jobs})


def tapped_for(network: fx.GraphModule, jobs: Sequence[Job]) -> tuple[list[str], fx.GraphModule]:
    """Those nodes, and the teacher as far as they go."""
    taps = ends(jobs)
    return taps, with_taps(network, taps, output=False)


def by_hantc(bench: Bench, jobs: Sequence[Job], goals: dict[str, float]) -> tuple[dict[str, float], float, float]:
    """When each candidate had reached its goal (processor seconds from the start; inf: never), the seconds of it
    all, and those that the teacher took."""
    reached = dict.fromkeys(goals, math.inf)
    spent = teacher = 0.0
    size = min(SIZE, len(bench.data.train))
    for k, length in enumerate(LENGTHS):
        jobs = [j for j in jobs if reached[j.key] == math.inf and not j.dead]
        if not jobs:
            break
        steps = max(LOOKS, round(length * len(bench.data.train) / SIZE))
        optimizer = torch.optim.Adam(trainable([j.module for j in jobs]), lr=training.RATE)
        box = TimeBox(math.inf, steps)
        begun = time.process_time()
        taps, tapped = tapped_for(bench.network, jobs)
        for j in jobs:
            fast_module(j.module).train()
        if k == 0:
            initialise(jobs, tapped, taps, bench.data, bench.augment, bench.ctx, size)
            spent += time.process_time() - begun
            jobs = look(bench, jobs, goals, reached, spent)
            if not jobs:
                break
            begun = time.process_time()
            taps, tapped = tapped_for(bench.network, jobs)
        for x, _ in epochs(bench.data.train, size, bench.augment, bench.seed + k):
            asked = time.process_time()
            values = activations(tapped, taps, x)
            teacher += time.process_time() - asked
            for j in jobs:
                j.module.train()
            set_rate(optimizer, box.rate())
            optimizer.zero_grad(set_to_none=True)
            for j in jobs:
                step(j, values)
            optimizer.step()
            more = box.advance()
            spent += time.process_time() - begun
            if not more or box.step % max(1, steps // LOOKS) == 0:
                jobs = look(bench, jobs, goals, reached, spent)
            if not more or not jobs:
                break
            begun = time.process_time()
            if taps != ends(jobs):
                taps, tapped = tapped_for(bench.network, jobs)
    return reached, spent, teacher


def look(
    bench: Bench, jobs: Sequence[Job], goals: dict[str, float], reached: dict[str, float], spent: float
) -> list[Job]:
    """Note in `reached` who is there; the others."""
    for j in jobs:
        if bench.error(j) <= goals[j.key]:
            reached[j.key] = spent
    return [j for j in jobs if reached[j.key] == math.inf and not j.dead]


def bench_of(model: str, data: str, place: Path, images: int | None, seed: int) -> tuple[Bench, MatchResult]:
    """The imported teacher with its data, and its regions."""
    config = make_config(model, target="xeon", data=data, out=place / "out", store=place / "store", seed=seed)
    state, ctx = prepare(config, RichReporter(quiet=True))
    state, _ = run_passes((Load(), Normalize(), Match()), state, ctx)
    assert state.network is not None and state.match is not None and ctx.data is not None
    dataset = ctx.data
    if images is not None and images < len(dataset.train):
        dataset = replace(dataset, train=dataset.train.subset(range(images)))
    network = fast_module(state.network)
    kind = output_kind(network, example_inputs(network.meta["info"], 2)[0], dataset.num_classes)
    taps = sorted({n for r in state.match.regions for n in (r.input, r.output)})
    x, _ = dataset.search.batch(list(range(min(128, len(dataset.search)))))
    held = activations(with_taps(network, taps), taps, x)
    return Bench(network, dataset, augmentation(network, dataset, kind), ctx, held, seed), state.match


def report(jobs: Sequence[Job], reached: dict[str, float], paper_s: float, ours: float, teacher: float) -> float:
    """Print what both took; the ratio."""
    met = sum(math.isfinite(t) for t in reached.values())
    ratio = ours / paper_s
    print(f"paper: {paper_s:.1f} s, {paper_s / len(jobs):.2f} s a candidate")
    print(f"hantc: {ours:.1f} s, {ours / len(jobs):.2f} s a candidate, {teacher / ours:.0%} of it in the teacher")
    print(f"{met} of {len(jobs)} candidates as near to the teacher; ratio of compute {ratio:.3f} (1/{1 / ratio:.1f})")
    return ratio


def main(argv: Sequence[str], say: Callable[[str], None] = print) -> int:
    """Print the comparison; exit code 1 if ours takes more than a fifth, or leaves a candidate in twenty behind."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("model", nargs="?")
    p.add_argument("data", nargs="?")
    p.add_argument("--per-region", type=int, default=4)
    p.add_argument("--images", type=int, help="train on the first so many images only; one epoch is as many")
    p.add_argument("--rates", type=float, nargs="+", default=[0.3, paper.RATE, 0.03])
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    if args.data is None:
        args.model, args.data = map(str, DEMO)
        if not DEMO[1].exists():
            made = [sys.executable, str(ROOT / "tools" / "demo" / "data.py"), args.data]
            subprocess.run(made, stdout=sys.stderr, check=True)  # stdout is for the comparison
    with tempfile.TemporaryDirectory() as folder, retained_memory():
        bench, match = bench_of(args.model, args.data, Path(folder), args.images, args.seed)
        jobs = sample(match, args.per_region, args.seed)
        n = len({j.region.name for j in jobs})
        say(f"{len(jobs)} candidates of {n} regions, epochs of {len(bench.data.train)} images")
        goals = dict.fromkeys((j.key for j in jobs), math.inf)
        times = []
        for rate in args.rates:
            errors, seconds = by_paper(bench, copies(jobs), rate)
            goals = {k: min(goals[k], v) for k, v in errors.items()}
            times.append(seconds)
            mid = sorted(errors.values())[len(errors) // 2]
            say(f"paper at rate {rate:g}: median error {mid:.3f}, {seconds:.1f} s")
        broken = {k for k, v in goals.items() if not math.isfinite(v)}  # no goal, whatever we reach
        if broken:
            say(f"{len(broken)} left out: the paper's training diverged at each rate")
            jobs = [j for j in jobs if j.key not in broken]
            goals = {k: v for k, v in goals.items() if k not in broken}
        reached, ours, teacher = by_hantc(bench, copies(jobs), goals)
    ratio = report(jobs, reached, sum(times) / len(times), ours, teacher)
    missed = sum(not math.isfinite(t) for t in reached.values())
    return 0 if ratio <= 0.2 and missed <= len(jobs) / 20 else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
