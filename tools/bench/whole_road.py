"""The headline table: whole compilations, figures from their `summary.json`, printed as Markdown.

    python tools/bench/whole_road.py                                  the demo's teacher
    python tools/bench/whole_road.py MODEL DATA BUDGET [OPTION …]     another one; options go to hantc

Teacher, INT8 teacher and student of a row were timed interleaved in one process, so their ratios hold.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def demo() -> list[str]:
    """Arguments of the demo's compilation; makes its data first."""
    data = ROOT / "build" / "demo" / "digits.npz"
    if not data.exists():
        subprocess.run([sys.executable, str(ROOT / "tools" / "demo" / "data.py"), str(data)], check=True)
    model = ROOT / "tools" / "demo" / "digits_efficientnet.onnx"
    return [str(model), "--data", str(data), "--budget", "0.33", "--effort", "quick"]


def main(argv: list[str]) -> int:
    """Compile, then print one row; the exit code is hantc's."""
    args = [argv[0], "--data", argv[1], "--budget", argv[2], *argv[3:]] if argv else demo()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hantc.cli", *args, "--target", "xeon", "--out", folder, "--json"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if not done.stdout.strip():
            return done.returncode
        s = json.loads(done.stdout)
    int8 = s["baseline_int8"]
    print("| model | teacher ms | INT8 teacher | student | accuracy | prediction error | minutes |")
    print("|---|---|---|---|---|---|---|")
    whole = f"{s['teacher']['latency_ms'] / int8['latency_ms']:.2f}×" if int8 else "–"
    if int8 and int8["accuracy"] is not None:
        whole += f" at {int8['accuracy']:.1f} %"
    known = s["accuracy_drop"] is not None
    accuracy = f"{s['teacher']['accuracy']:.1f} → {s['student']['accuracy']:.1f} %" if known else "–"
    minutes = sum(s["timings_s"].values()) / 60
    print(
        f"| {Path(s['model']).stem} | {s['teacher']['latency_ms']:.2f} | {whole} | {s['speedup']:.2f}× | {accuracy} "
        f"| {100 * s['prediction_error']:.0f} % | {minutes:.0f} |"
    )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
