"""An invented run folder that follows the schema: an EfficientNet-like teacher, half of it replaced."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hantc.core.types import Choice, CostRow, CostTable, Plan, Region, Rejection, ScoreRow

MakeRun = Callable[..., Path]
FAMILIES = ("cb_stack", "cb_bottle", "efn", "efnv2", "repvgg", "cb_res", "conv_cs", "vit", "identity", "lambda")


def region_names(n: int) -> list[str]:
    """`stem`, then blocks."""
    return ["stem", *(f"blocks.{i // 4}.{i % 4}" for i in range(n - 1))]


def _candidates(rng: random.Random, region: str, teacher_ms: float, n: int) -> tuple[list[CostRow], list[ScoreRow]]:
    costs, scores = [], []
    for precision, factor in (("fp32", 1.0), ("int8", 1.1)):
        costs.append(_cost(region, "teacher", precision, teacher_ms * factor))
    for i in range(n):
        name = f"{FAMILIES[i % len(FAMILIES)]}_k{1 + 2 * (i % 4)}_w{0.25 * (1 + i // 8):g}"
        base = rng.uniform(0.15, 1.1)
        for precision, factor in (("fp32", 1.0), ("int8", 0.35)):
            share = base * factor * rng.uniform(0.9, 1.1)
            costs.append(_cost(region, name, precision, teacher_ms * share))
            if share < 1:
                score = 0.05 / share**1.6 * rng.lognormvariate(0, 0.8) - 0.03
                dropped = "loses 9.1 points alone" if score > 1.5 else ""
                row = ScoreRow(
                    region, name, precision, score, 0.01, 4 * score, 1 - min(0.9, score / 4), score / 3, dropped
                )
                scores.append(row)
    return costs, scores


def _cost(region: str, candidate: str, precision: str, ms: float) -> CostRow:
    return CostRow(region, candidate, precision, ms, ms * 0.02, 15, "onnxruntime", "d0", 1, 1, macs=1000, params=100)


def write_run(folder: Path, n_regions: int = 6, n_candidates: int = 8, seed: int = 0, **changes: Any) -> Path:
    """Write every file of a run folder; `changes` replace keys of the summary."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    regions, costs, scores, choices = [], [], [], []
    for i, name in enumerate(region_names(n_regions)):
        kind = "stem" if i == 0 else "inverted_residual"
        teacher_ms = rng.uniform(0.08, 0.3)
        regions.append(
            Region(name, kind, f"in{i}", f"out{i}", (f"n{i}a", f"n{i}b"), (24, 16, 16), (40, 8, 8), 10**6, 10**4, (i,))
        )
        own_costs, own_scores = _candidates(rng, name, teacher_ms, n_candidates)
        costs += own_costs
        scores += own_scores
        cost_of = {(r.candidate, r.precision): r.latency_ms for r in own_costs}
        ranked = sorted(
            (s for s in own_scores if not s.dropped), key=lambda s: s.score + 3 * cost_of[s.candidate, s.precision]
        )
        if i % 3 and len(ranked) > 1:
            best, other = ranked[0], ranked[1]
            ms = cost_of[best.candidate, best.precision]
            choices.append(
                Choice(name, kind, best.candidate, best.precision, best.score, ms, teacher_ms, other.candidate)
            )
        else:
            choices.append(Choice(name, kind, "teacher", "fp32", 0.0, teacher_ms, teacher_ms))
    skipped = (("stem", "vit_depth1_dim32", "fp32", "needs a stride of 1"),)
    table = CostTable(tuple(costs), 3.11, 0.1, (((24, 16, 16), 0.01),), 1.02, skipped)
    rejections = [Rejection("classifier.1", "output is the network's own output", ("Gemm_239",))]
    plan = Plan(tuple(choices), 0.91, 1.2, 0.31, {"name": "lagrangian+highs"})
    front = [
        {"predicted_ms": 0.8 + 0.05 * i, "measured_ms": 0.84 + 0.05 * i if i < 9 else None, "score": 0.9 - 0.06 * i,
         "accuracy": 76.0 + 0.25 * i - 0.2 * (i % 3), "chosen": i == 4} for i in range(12)
    ]  # fmt: skip
    _dump(folder / "lut.json", asdict(table))
    _dump(folder / "scores.json", {"rows": [asdict(s) for s in scores]})
    _dump(
        folder / "regions.json",
        {"regions": [asdict(r) for r in regions], "rejections": [asdict(r) for r in rejections]},
    )
    _dump(folder / "plan.json", asdict(plan))
    _dump(folder / "front.json", {"solutions": front})
    events = [
        {"t": 0.1, "event": "stage", "name": "match"},
        {"t": 9.0, "event": "warning", "text": "one image could not be read"},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events) + '{"t": 9.1, "ev')
    _dump(folder / "summary.json", {**_summary([asdict(c) for c in choices]), **changes})
    return folder


def _summary(choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "hantc_version": "0.1.0",
        "model": "/models/efficientnet_b0_cifar10_64.onnx",
        "target": "xeon",
        "device": {"cpu": "Intel(R) Xeon(R) Platinum 8481C", "flags": ["avx512f", "avx512_vnni"], "cores": 2,
                   "versions": [["onnxruntime", "1.31.0"]], "threads": 1, "notes": ["INT8 weights keep to 7 bits"]},
        "data": {"source": "/data/cifar10", "labelled": True, "notes": [],
                 "counts": {"train": 50000, "search": 1000, "validation": 4000}, "synthetic": False},
        "seed": 0,
        "status": "done",
        "teacher": {"latency_ms": 3.11, "latency_iqr_ms": 0.06, "accuracy": 78.2, "size_bytes": 16_100_000,
                    "params": 4_020_000, "macs": 33_000_000},
        "student": {"latency_ms": 0.87, "latency_iqr_ms": 0.03, "accuracy": 77.1, "size_bytes": 5_400_000,
                    "params": 5_100_000, "macs": 41_000_000},
        "baseline_int8": {"latency_ms": 2.53, "latency_iqr_ms": 0.05, "accuracy": 74.9, "size_bytes": 4_300_000,
                          "params": 4_020_000, "macs": 33_000_000},
        "speedup": 3.5747, "accuracy_drop": 1.1, "predicted_latency_ms": 0.91, "prediction_error": 0.046,
        "agreement": 0.931, "regions": len(choices), "choices": choices,
        "solver": {"name": "lagrangian+highs", "solutions": 12, "gap": 0.0001, "status": "optimal", "variables": 612},
        "timings_s": {"match": 0.8, "cost": 42.5, "distill": 612.0, "score": 95.1, "select": 3.2, "finetune": 410.0},
        "notes": ["Fine-tuned for 3 epochs."],
        "ops": {"teacher": {"Conv": 81, "Sigmoid": 49, "Mul": 65, "Add": 9, "Gemm": 1},
                "student": {"Conv": 44, "Relu": 20, "Add": 11, "Gemm": 1, "QuantizeLinear": 18, "Clip": 52}},
    }  # fmt: skip


def no_data_changes() -> dict[str, Any]:
    """Summary keys of a run without data: no accuracy, no scores, no INT8 teacher."""
    empty = {
        "latency_ms": 3.1,
        "latency_iqr_ms": 0.1,
        "accuracy": None,
        "size_bytes": 100,
        "params": None,
        "macs": None,
    }
    choice = {"region": "stem", "kind": "stem", "candidate": "teacher_fold_pad", "precision": "fp32", "score": None,
              "cost_ms": 0.1, "teacher_cost_ms": 0.2, "runner_up": ""}  # fmt: skip
    return {
        "data": None, "teacher": empty, "student": {**empty, "latency_ms": 2.8},
        "baseline_int8": {"reason": "needs --data"},
        "speedup": 1.107, "accuracy_drop": None, "predicted_latency_ms": None, "prediction_error": None,
        "agreement": 1.0, "choices": [choice], "solver": {}, "ops": {},
    }  # fmt: skip


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture
def make_run() -> MakeRun:
    """`make_run(folder, **changes)` writes an invented run folder."""
    return write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """An ordinary finished run."""
    return write_run(tmp_path / "model.hantc")


@pytest.fixture
def bare_run(tmp_path: Path) -> Path:
    """A run without data that left nothing but its summary."""
    folder = write_run(tmp_path / "bare.hantc", **no_data_changes())
    for name in ("lut.json", "scores.json", "regions.json", "plan.json", "front.json", "log.jsonl"):
        (folder / name).unlink()
    return folder
