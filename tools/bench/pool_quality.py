"""What candidates made from the teacher are worth: the paper's pool against the mixed one, with equal compute.

    python tools/bench/pool_quality.py [MODEL DATA] [--seconds 120] [--plot FILE.png]

By default with the demo's teacher. Both pools are distilled for so many seconds on the same activations, from
the same latency table, and scored alike. Each region then has two fronts: the least score within each latency.
The mixed pool dominates a region if its front lies nowhere above the other's by more than the standard error of both
scores (they come from some hundred images); regions where only one pool has a candidate are not counted. Prints one
row a region, the share, and the share without that allowance.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hantc.core.progress import Reporter
from hantc.core.store import Store
from hantc.inputs import make_config, prepare
from hantc.ops.registry import DERIVED
from hantc.passes.distill import Distill
from hantc.passes.score import Score
from hantc.passes.state import Clock, Context, State
from hantc.pipeline import PROFILE, run_passes
from hantc.report.live import RichReporter

ROOT = Path(__file__).resolve().parents[2]
DEMO = (ROOT / "tools" / "demo" / "digits_efficientnet.onnx", ROOT / "build" / "demo" / "digits.npz")
Front = list[tuple[float, float, float]]  # (latency ms, score, its standard error), the first two falling in turn
NOTHING = (math.inf, math.inf, 0.0)


def front(points: Sequence[tuple[float, float, float]]) -> Front:
    """The points that no other beats in both."""
    best: Front = []
    for cost, score, error in sorted(points):
        if not best or score < best[-1][1]:
            best.append((cost, score, error))
    return best


def at(line: Front, cost: float) -> tuple[float, float, float]:
    """The point of the least score within `cost`."""
    return min((p for p in line if p[0] <= cost * 1.02), key=lambda p: p[1], default=NOTHING)


def dominates(mixed: Front, paper: Front, errors: float) -> bool:
    """Whether `mixed` is nowhere above `paper` by more than so many standard errors of their difference."""
    pairs = [(at(mixed, cost), score, error) for cost, score, error in paper]
    return all(p[1] <= score + errors * math.hypot(p[2], error) for p, score, error in pairs)


def fronts(state: State, ctx: Context, seconds: float, *, derived: bool, store: Path) -> dict[str, Front]:
    """Every region's front with one pool: distilled anew and scored."""
    assert state.proposals is not None and state.match is not None
    kept = tuple(p for p in state.proposals if derived or p.spec.family not in DERIVED)
    effort = replace(ctx.effort, time_limit_s=seconds, distill_share=1.0)
    own = replace(ctx, store=Store(store), effort=effort, clock=Clock(seconds / 0.6))
    done = Score().call(Distill().call(replace(state, proposals=kept), own), own)
    assert done.costs is not None and done.scores is not None
    costs = done.costs.by_key()
    found: dict[str, Front] = {}
    for region in state.match.regions:
        rows = [r for r in done.scores if r.region == region.name and r.candidate != "teacher" and not r.dropped]
        points = [(costs[r.region, r.candidate, r.precision].latency_ms, max(0.0, r.score), r.stderr) for r in rows]
        found[region.name] = front(points)
    return found


def plot(path: str, names: Sequence[str], paper: dict[str, Front], mixed: dict[str, Front]) -> None:
    """Both fronts of every region, as steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = 6
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.2 * rows), squeeze=False)
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    for ax, name in zip(axes.flat, names, strict=False):
        for line, label in ((paper[name], "paper"), (mixed[name], "mixed")):
            x, y = [c for c, _, _ in line], [max(s, 1e-5) for _, s, _ in line]
            ax.step(x, y, where="post", label=label, marker=".")
        ax.set_yscale("log")
        ax.set_title(name, fontsize=8)
    axes[0, 0].legend()
    figure.supxlabel("latency, ms")
    figure.supylabel("rise of the loss, alone")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> int:
    """Print the table; exit code 1 if the mixed pool dominates in less than four regions of five."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("model", nargs="?")
    p.add_argument("data", nargs="?")
    p.add_argument("--seconds", type=float, default=120.0)
    p.add_argument("--plot")
    args = p.parse_args(argv)
    if args.data is None:
        args.model, args.data = map(str, DEMO)
        if not DEMO[1].exists():
            subprocess.run([sys.executable, str(ROOT / "tools" / "demo" / "data.py"), args.data], check=True)
    reporter: Reporter = RichReporter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        config = make_config(args.model, target="xeon", data=args.data, out=place / "out", store=place / "shared")
        state, ctx = prepare(config, reporter)
        state, _ = run_passes(PROFILE, state, ctx)
        paper = fronts(state, ctx, args.seconds, derived=False, store=place / "paper")
        mixed = fronts(state, ctx, args.seconds, derived=True, store=place / "mixed")
    assert state.match is not None
    names = [r.name for r in state.match.regions if paper[r.name] and mixed[r.name]]
    won = strictly = 0
    print("| region | paper: best score at half the cost, at any | mixed: the same | mixed dominates |")
    print("|---|---|---|---|")
    for name in names:
        ends = max((c for line in (paper[name], mixed[name]) for c, _, _ in line), default=0.0)
        wins = dominates(mixed[name], paper[name], 1.0)
        won += wins
        strictly += dominates(mixed[name], paper[name], 0.0)
        cells = [f"{at(line[name], ends / 2)[1]:.4f}, {at(line[name], ends)[1]:.4f}" for line in (paper, mixed)]
        print(f"| {name} | {cells[0]} | {cells[1]} | {'yes' if wins else 'no'} |")
    share, strict = (100 * n / max(1, len(names)) for n in (won, strictly))
    print(
        f"\nthe mixed pool dominates in {won} of {len(names)} regions ({share:.0f} %; {strict:.0f} % to the last digit)"
    )
    if args.plot:
        plot(args.plot, names, paper, mixed)
    return 0 if won >= 0.8 * len(names) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
