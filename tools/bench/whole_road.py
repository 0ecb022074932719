"""The headline table: whole compilations, figures from their `summary.json`, printed as Markdown.

    python tools/bench/whole_road.py                                  the demo's teacher
    python tools/bench/whole_road.py MODEL DATA BUDGET [OPTION …]     another one; options go to hantc
    python tools/bench/whole_road.py MODEL DATA 0.7,0.5,0.28          a row for each budget: the front

Teacher, INT8 teacher and student of a row were timed interleaved in one process, so their ratios hold. The
budgets of a front share the store: what one measured and trained serves the others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HEAD = "| model | budget | teacher ms | INT8 teacher | student | accuracy | prediction error | minutes |"


def demo() -> list[str]:
    """Arguments of the demo's compilation: model, data, budget, options; makes its data first."""
    data = ROOT / "build" / "demo" / "digits.npz"
    if not data.exists():
        subprocess.run([sys.executable, str(ROOT / "tools" / "demo" / "data.py"), str(data)], check=True)
    return [str(ROOT / "tools" / "demo" / "digits_efficientnet.onnx"), str(data), "0.33", "--effort", "quick"]


def row(s: dict[str, Any], budget: str) -> str:
    """One line of the table from a summary."""
    int8 = s["baseline_int8"]
    whole = f"{s['teacher']['latency_ms'] / int8['latency_ms']:.2f}×" if int8 else "–"
    if int8 and int8["accuracy"] is not None:
        whole += f" at {int8['accuracy']:.1f} %"
    known = s["accuracy_drop"] is not None
    accuracy = f"{s['teacher']['accuracy']:.1f} → {s['student']['accuracy']:.1f} %" if known else "–"
    minutes = sum(s["timings_s"].values()) / 60
    error = "–" if s["prediction_error"] is None else f"{100 * s['prediction_error']:.0f} %"
    return (
        f"| {Path(s['model']).stem} | {budget} | {s['teacher']['latency_ms']:.2f} | {whole} | {s['speedup']:.2f}× "
        f"| {accuracy} | {error} | {minutes:.0f} |"
    )


def main(argv: Sequence[str]) -> int:
    """Compile for each budget and print its row; the exit code is the worst of hantc's."""
    model, data, budgets, *options = argv or demo()
    print(HEAD)
    print("|---" * (HEAD.count("|") - 1) + "|")
    worst = 0
    for budget in budgets.split(","):
        with tempfile.TemporaryDirectory() as folder:
            given = [model, "--data", data, "--budget", budget, "--target", "xeon", *options, "--out", folder, "--json"]
            command = [sys.executable, "-m", "hantc.cli", *given]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        worst = max(worst, done.returncode)
        if done.stdout.strip():
            print(row(json.loads(done.stdout), budget), flush=True)
        else:
            print(f"| {Path(model).stem} | {budget} | hantc ended with {done.returncode} | | | | | |", flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
