"""The same files on two engines: ONNX Runtime and OpenVINO, batch 1, timed interleaved in one process.

    pip install openvino
    python tools/bench/engines.py TEACHER.onnx [RUN/model.onnx ...] [--threads N]

Prints a row for each file and engine, with the ratio to the first file in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from hantc.backends.feeds import random_feeds
from hantc.backends.onnxruntime.backend import OnnxRuntimeBackend, bound_run
from hantc.backends.onnxruntime.timing import measure_interleaved
from hantc.core.backend_api import BuildSpec
from hantc.core.types import Protocol


def openvino_run(path: str, model: onnx.ModelProto, threads: int) -> Callable[[], object]:
    """The same in OpenVINO: latency hint, FP32, as many threads."""
    import openvino as ov

    feeds = random_feeds(model, 1)
    network = ov.Core().read_model(path)
    network.reshape({name: list(array.shape) for name, array in feeds.items()})
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = ov.compile_model(network, "CPU", options).create_infer_request()
    tensors = {name: ov.Tensor(np.ascontiguousarray(array)) for name, array in feeds.items()}
    for name, tensor in tensors.items():
        request.set_tensor(name, tensor)
    return lambda: request.infer()


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("models", nargs="+", metavar="MODEL")
    p.add_argument("--threads", type=int, default=OnnxRuntimeBackend().capabilities().device.cores)
    args = p.parse_args(argv)
    names, runs = [], []
    for path in args.models:
        model = onnx.load(path)
        names.append((path, "onnxruntime"))
        runs.append(bound_run(OnnxRuntimeBackend().build(model, BuildSpec(args.threads))))
        try:
            run = openvino_run(path, model, args.threads)
        except ImportError:
            print("engines.py: no OpenVINO here (pip install openvino): its rows are left out", file=sys.stderr)
            continue
        names.append((path, "openvino"))
        runs.append(run)
    timings = measure_interleaved(runs, Protocol(args.threads, warmup=5, samples=41, min_sample_ms=15.0))
    print("| file | engine | ms | ratio |\n|---|---|---|---|")
    for (path, engine), t in zip(names, timings, strict=True):
        ratio = timings[0].median_ms / t.median_ms
        print(f"| {Path(path).name} | {engine} | {t.median_ms:.3f} (IQR {t.iqr_ms:.3f}) | {ratio:.2f}× |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
