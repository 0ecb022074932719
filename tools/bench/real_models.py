"""Real files through the importer: how long they take to read, whether they come out equal, what could be replaced.

    python tools/bench/real_models.py [MODEL.onnx …]

Without files: those of ../shared/models, where they are, and the light models of the onnx package. Each is imported,
its regions are listed, it is emitted again, and file, graph and emitted file compute the same random input. Exit code
1 if one differs by more than 1e-4 of its largest output or takes over ten seconds until its regions are listed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import ModelProto

from hantc.dialect.dequantize import dequantized
from hantc.dialect.emitter import emit, opaque_leaves
from hantc.dialect.examples import example_inputs
from hantc.dialect.importer import import_model, load_onnx
from hantc.dialect.leaf import array
from hantc.dialect.rewrites.normalize import normalize
from hantc.passes.match import match_regions

_LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
_SHARED = Path(__file__).resolve().parents[3] / "shared" / "models"
_MOST_S, _MOST_ERROR = 10.0, 1e-4


def outputs(model: ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime computes, without rewrites of its own."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def error(wanted: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """The largest difference over the largest value, of all outputs."""
    shares = [
        float(np.abs(w.astype(np.float64) - f).max() / max(np.abs(w).max(), 1e-6)) if w.shape == f.shape else np.inf
        for w, f in zip(wanted, found, strict=True)
    ]
    return max(shares, default=0.0)


def row(path: Path) -> tuple[str, bool]:
    """One line of the table, and whether all is well."""
    begun = time.monotonic()
    model = dequantized(load_onnx(path)).model
    network = import_model(model, where=str(path))
    read = time.monotonic() - begun
    found = match_regions(normalize(network)[0])
    listed = time.monotonic() - begun
    inputs = example_inputs(network.meta["info"], 1)
    feeds = {s.name: array(x) for s, x in zip(network.meta["info"].inputs, inputs, strict=True)}
    wanted = outputs(model, feeds)
    with torch.no_grad():
        result = network(*inputs)
    own = [array(r) for r in (result if isinstance(result, tuple) else (result,))]
    worst = max(error(wanted, own), error(wanted, outputs(emit(network).model, feeds)))
    kinds = ", ".join(f"{n} {k}" for k, n in Counter(r.kind for r in found.regions).most_common())
    foreign = len(opaque_leaves(network))
    line = f"| {path.stem} | {read:.2f} s | {listed:.2f} s | {worst:.1e} | {foreign} | {len(found.regions)}: {kinds} |"
    return line, worst <= _MOST_ERROR and listed <= _MOST_S


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("models", nargs="*", type=Path)
    args = p.parse_args(argv)
    paths = args.models or [*sorted(_SHARED.glob("*.onnx")), *sorted(_LIGHT.glob("*.onnx"))]
    print("| model | read after | regions listed after | largest difference | opaque | regions |\n|" + "---|" * 6)
    good = True
    for path in paths:
        line, fine = row(path)
        print(line + ("" if fine else " ←"), flush=True)
        good = good and fine
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
