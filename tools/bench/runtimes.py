"""The same files on two engines: ONNX Runtime and OpenVINO, batch 1, timed interleaved in one process.

    python tools/bench/runtimes.py TEACHER.onnx [RUN/model.onnx ...] [--threads N]

Prints a row for each file and engine, with the ratio to the first file in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import onnx

from hantc.backends.onnxruntime import backend as onnxruntime
from hantc.backends.openvino import backend as openvino
from hantc.core.backend_api import BuildSpec
from hantc.core.timing import measure_interleaved
from hantc.core.types import Protocol


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("models", nargs="+", metavar="MODEL")
    ort, vino = onnxruntime.OnnxRuntimeBackend(), openvino.OpenVinoBackend()
    p.add_argument("--threads", type=int, default=ort.capabilities().device.cores)
    args = p.parse_args(argv)
    here = vino.capabilities()
    if not here.available:
        print(f"runtimes.py: {here.reason}: OpenVINO's rows are left out", file=sys.stderr)
    names, runs = [], []
    for path in args.models:
        model, spec = onnx.load(path), BuildSpec(args.threads)
        names.append((path, ort.name))
        runs.append(onnxruntime.bound_run(ort.build(model, spec)))
        if here.available:
            names.append((path, vino.name))
            runs.append(openvino.bound_run(vino.build(model, spec)))
    timings = measure_interleaved(runs, Protocol(args.threads, warmup=5, samples=41, min_sample_ms=15.0))
    print("| file | engine | ms | ratio |\n|---|---|---|---|")
    for (path, engine), t in zip(names, timings, strict=True):
        ratio = timings[0].median_ms / t.median_ms
        print(f"| {Path(path).name} | {engine} | {t.median_ms:.3f} (IQR {t.iqr_ms:.3f}) | {ratio:.2f}× |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
