"""The latency table of a network's whole pool: how long it takes to measure, and how long to take up again.

    python tools/bench/lut.py MODEL.onnx [--pool whole|sample] [--effort standard] [--target xeon] [--out table.json]

Measures, in an empty store, all candidates of all regions (`--pool whole`: every one that may be faster) as a
compilation would, then asks for the same table twice more: from the store, and from the file. Prints what each took,
pass by pass; exit code 1 if the cost pass takes more than a second either time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from hantc.core.lut import write_lut
from hantc.inputs import make_config, prepare
from hantc.passes.state import Context, State
from hantc.pipeline import PROFILE, run_passes
from hantc.report.live import RichReporter

AGAIN_S = 1.0


def build(args: argparse.Namespace, folder: Path, lut: Path | None = None) -> tuple[State, Context, dict[str, float]]:
    """The profile's passes, timed; with `lut`, latencies come from that file."""
    options = {"target": args.target, "effort": args.effort, "pool": args.pool, "backend": args.backend, "lut": lut}
    config = make_config(args.model, out=folder / "out", store=folder / "store", **options)
    start = time.monotonic()
    state, ctx = prepare(config, RichReporter(), measure_only=True)
    read = time.monotonic() - start
    state, timings = run_passes(PROFILE, state, ctx)
    return state, ctx, {"read": read, **timings}


def main(argv: Sequence[str]) -> int:
    """Print a row for each time."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("model")
    p.add_argument("--pool", default="whole", choices=("whole", "sample"))
    p.add_argument("--effort", default="standard")
    p.add_argument("--target", default="xeon")
    p.add_argument("--backend")
    p.add_argument("--out", type=Path, help="keep the table there")
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state, ctx, first = build(args, folder)
        assert state.costs is not None
        path = args.out or folder / "table.json"
        write_lut(path, state.costs, ctx.capabilities.device)
        _, _, stored = build(args, folder)
        _, _, read = build(args, folder, path)
        rows, regions = state.costs.rows, {r.region for r in state.costs.rows}
        print(f"{len(rows)} rows, {len(regions)} regions, {path.stat().st_size / 1e6:.1f} MB")
        for label, timings in (("measured", first), ("from the store", stored), ("from the file", read)):
            parts = ", ".join(f"{k} {v:.2f} s" for k, v in timings.items())
            print(f"{label}: {sum(timings.values()):.1f} s ({parts})")
        return 0 if max(stored["cost"], read["cost"]) < AGAIN_S else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
