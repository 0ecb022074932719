"""TensorRT engines built here, ahead of time, for GPUs that need not be here.

    python tools/bench/engines.py MODEL.onnx [MODEL.onnx …] [--gpu SM75,SM80,SM86,SM89,SM120] [--batch 128] [--int8]

Each model is converted to FP16 and built for each compute capability: a row each, with seconds, size, the products
(convolutions and matrix products) in INT8 of a student that has some, the layers left in FP32, by name, and the
milliseconds of a whole batch where such a GPU is here. `--int8`: each model's norms are folded, and all its products
quantised; for build and time alone, for the ranges are invented. Exit code 1 if an engine cannot be built, has a layer
left in FP32, or with `--int8` no product in INT8.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import onnx

from hantc.backends.targets import Target, targets
from hantc.backends.tensorrt import engine, sdk
from hantc.core.backend_api import BuildSpec
from hantc.core.errors import HantcError
from hantc.core.types import Protocol
from hantc.dialect.emitter import emit
from hantc.dialect.half import to_fp16
from hantc.dialect.importer import import_file
from hantc.dialect.qdq import MIN_OPSET, QuantSpec, quantize_for_timing
from hantc.dialect.rewrites.normalize import normalize


def quantised(path: str) -> onnx.ModelProto:
    """All products in INT8, as TensorRT asks for."""
    network = normalize(import_file(path))[0]
    spec = QuantSpec(reduce_range=False, symmetric=True)
    return quantize_for_timing(emit(network, opset=MIN_OPSET).model, spec)


def timed(gpu: str, model: onnx.ModelProto, batch: int) -> str:
    """Milliseconds of a batch on a GPU of that compute capability, or a dash where there is none."""
    found = [t for t in targets().values() if isinstance(t, Target) and t.compute_capability == gpu]
    backend = found[0].make_backend() if found else None
    if backend is None or not backend.capabilities().measures:
        return "–"
    try:
        artefact = backend.build(model, BuildSpec(threads=1, batch=batch))
        return f"{backend.measure([artefact], Protocol(threads=1, batch=batch))[0].median_ms:.3f}"
    except HantcError as error:
        return error.message


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("models", nargs="+", metavar="MODEL")
    p.add_argument("--gpu", default="SM75,SM80,SM86,SM89,SM120")
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--int8", action="store_true")
    args = p.parse_args(argv)
    rtx = sdk.load(sdk.RTX)
    if rtx is None:
        print(f"engines.py: {sdk.RTX} is not installed: pip install {sdk.RTX}", file=sys.stderr)
        return 2
    print(f"{rtx.package} {rtx.version}, batch 1 to {args.batch}\n")
    print("| model | GPU | to FP16 s | build s | MB | layers in FP16 | products in INT8 | in FP32 | ms a batch |")
    print("|---|---|---|---|---|---|---|---|---|")
    bad = 0
    for path in args.models:
        started = time.monotonic()
        half = to_fp16(quantised(path) if args.int8 else onnx.load(path))
        converted = time.monotonic() - started
        for gpu in args.gpu.split(","):
            name = Path(path).stem
            try:
                made = engine.build(rtx, half, gpu, args.batch)
            except HantcError as error:
                print(f"| {name} | {gpu} | {converted:.1f} | {error.message} | | | | | |", flush=True)
                bad += 1
                continue
            wide = ", ".join(made.float32[:4]) or "none"
            bad += bool(made.float32) or (args.int8 and not made.products.get("int8"))
            size = f"{len(made.data) / 1e6:.1f}"
            types = f"{made.layers.get('fp16', 0)} | {made.products.get('int8', 0)} of {sum(made.products.values())}"
            facts = [name, gpu, f"{converted:.1f}", f"{made.seconds:.1f}", size, types, wide]
            print("| " + " | ".join([*facts, timed(gpu, half, args.batch)]) + " |", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
