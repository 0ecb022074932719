"""Real files as ONNX Runtime saves them once it has optimised them: do they come apart again?

    python tools/bench/saved_models.py [MODEL.onnx …]

Without files: those of ../shared/models. Each is saved at ORT_ENABLE_EXTENDED, in floats, and quantised (QOperator and
QDQ) at ORT_ENABLE_ALL, which puts the channels of some operators last. Regions are compared with those of the file
itself, outputs on random input with the float model's: of the saved file, and of what hantc compiles. Exit code 1 where
something stays opaque (operators on channels in blocks excepted), where regions differ by more than one, or where what
is compiled is further away than the saved file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

from hantc.dialect.dequantize import dequantized
from hantc.dialect.emitter import opaque_leaves
from hantc.dialect.importer import import_model, load_onnx
from hantc.dialect.rewrites.normalize import normalize
from hantc.dialect.unfuse import unfused
from hantc.passes.match import match_regions

_SHARED = Path(__file__).resolve().parents[3] / "shared" / "models"
_ROUNDING = 1e-4  # of the mean output, in floats
_LEVEL = ort.GraphOptimizationLevel


class Random(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
    """Four random inputs."""

    def __init__(self, feeds: dict[str, np.ndarray]) -> None:
        self.left = iter([draw(feeds, seed) for seed in range(4)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)


def draw(like: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Random inputs of these shapes."""
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal(v.shape).astype(v.dtype) for k, v in like.items()}


def session(model: bytes, level: Any, save: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level, options.graph_optimization_level = 4, level
    if save is not None:
        options.optimized_model_filepath = str(save)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def saved(model: ModelProto, feeds: dict[str, np.ndarray], folder: Path) -> Iterator[tuple[str, ModelProto]]:
    """What ONNX Runtime makes of it."""
    source, made, file = (str(folder / n) for n in ("m.onnx", "q.onnx", "saved.onnx"))
    onnx.save(model, source)
    session(model.SerializeToString(), _LEVEL.ORT_ENABLE_EXTENDED, Path(file))
    yield "floats", onnx.load(file)
    for form in (QuantFormat.QOperator, QuantFormat.QDQ):
        quantize_static(source, made, Random(feeds), quant_format=form)
        session(Path(made).read_bytes(), _LEVEL.ORT_ENABLE_ALL, Path(file))
        yield form.name, onnx.load(file)


def regions(model: ModelProto) -> tuple[int, int]:
    """How many there are, and how many opaque leaves."""
    network = import_model(model)
    return len(match_regions(normalize(network)[0]).regions), len(opaque_leaves(network))


def distance(wanted: np.ndarray, model: ModelProto, feeds: dict[str, np.ndarray]) -> float:
    """The mean difference of the first output over its mean size."""
    found = session(model.SerializeToString(), _LEVEL.ORT_DISABLE_ALL).run(None, feeds)[0]
    return float(np.abs(wanted - found).mean() / np.abs(wanted).mean())


def rows(path: Path, folder: Path) -> Iterator[tuple[str, bool]]:
    """Lines of the table, and whether all is well."""
    model = load_onnx(path)
    weights = {i.name for i in model.graph.initializer}
    shapes = {i.name: i.type.tensor_type.shape.dim for i in model.graph.input if i.name not in weights}
    like = {n: np.zeros([d.dim_value or 1 for d in dims], np.float32) for n, dims in shapes.items()}
    feeds = draw(like, 9)
    wanted = session(model.SerializeToString(), _LEVEL.ORT_DISABLE_ALL).run(None, feeds)[0]
    before, _ = regions(model)
    for kind, given in saved(model, like, folder):
        foreign = sum(n.domain != "" for n in given.graph.node)
        made = dequantized(unfused(given))
        after, opaque = regions(made.model)
        errors = [distance(wanted, m, feeds) for m in (given, made.model)]
        blocked = sum(n.domain == "com.microsoft.nchwc" for n in given.graph.node)
        fine = not made.reason and opaque <= blocked and abs(after - before) <= 1
        fine = fine and errors[1] <= max(_ROUNDING, 1.1 * errors[0])
        facts = [kind, foreign, opaque, f"{before} → {after}", *(f"{e:.1e}" for e in errors)]
        yield f"| {path.stem} | " + " | ".join(map(str, facts)) + " |", fine


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("models", nargs="*", type=Path)
    args = p.parse_args(argv)
    print("| model | saved | its own operators | opaque | regions | saved off by | compiled off by |\n|" + "---|" * 7)
    good = True
    for path in args.models or sorted(_SHARED.glob("*.onnx")):
        with tempfile.TemporaryDirectory() as folder:
            for line, fine in rows(path, Path(folder)):
                print(line + ("" if fine else " ←"), flush=True)
                good = good and fine
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
