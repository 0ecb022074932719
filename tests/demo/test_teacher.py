"""The committed demo teacher is what the demo says: small, dynamic in its batch, and accurate on its data."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo"
MODEL = DEMO / "digits_efficientnet.onnx"


@pytest.fixture(scope="module")
def digits() -> dict[str, np.ndarray[Any, Any]]:
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("demo_data", DEMO / "data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: dict[str, np.ndarray[Any, Any]] = module.make_digits()
    return made


def test_data_has_the_shapes_hantc_takes(digits: dict[str, np.ndarray[Any, Any]]) -> None:
    assert {k: v.shape for k, v in digits.items()} == {
        "x": (1297, 64, 64, 1),
        "y": (1297,),
        "x_val": (500, 64, 64, 1),
        "y_val": (500,),
    }
    assert digits["x"].dtype == np.uint8 and digits["y"].dtype == np.int64
    assert np.bincount(digits["y_val"]).min() >= 48  # stratified
    train = {image.tobytes() for image in digits["x"]}
    assert not any(image.tobytes() in train for image in digits["x_val"])


def test_teacher_scores_as_documented(digits: dict[str, np.ndarray[Any, Any]]) -> None:
    pre = json.loads(MODEL.with_suffix(".preprocess.json").read_text())
    x = (digits["x_val"].transpose(0, 3, 1, 2) * pre["scale"] - pre["mean"][0]) / pre["std"][0]
    session = ort.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"image": x.astype(np.float32)})[0]
    assert logits.shape == (500, 10)
    assert (logits.argmax(1) == digits["y_val"]).mean() >= 0.988


def test_teacher_file_is_small_and_carries_no_paths() -> None:
    assert MODEL.stat().st_size < 5_000_000
    model = onnx.load(MODEL)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    ops = Counter(node.op_type for node in model.graph.node)
    assert ops["Sigmoid"] == ops["Mul"] and ops["ReduceMean"] == 12  # SiLU; eleven gates and the head's mean
    assert b"/work/" not in MODEL.read_bytes() and not any(node.metadata_props for node in model.graph.node)
