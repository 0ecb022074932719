"""Activation ranges of ONNX models by image: those of onnxruntime's own calibration, but for outliers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from hantc.core.errors import HantcError
from hantc.dialect.qdq import QuantSpec, quantize
from hantc.dialect.qdq_graph import infer_types
from hantc.dialect.qdq_ort import calibrated_ranges
from hantc.dialect.qdq_ranges import image_ranges
from tests.dialect.test_qdq import Array, cnn, feeds, relative_error, run

NODES = ["conv1", "relu1", "conv2", "add", "relu2", "conv3", "y"]
ROBUST = QuantSpec(True, calibration="robust")


def typed(opset: int = 17) -> onnx.ModelProto:
    model = cnn(opset)
    infer_types(model)
    return model


def outlying(count: int = 8, batch: int = 8) -> list[dict[str, Array]]:
    """As `feeds`, one image of all a thousand times as large."""
    found = feeds(count, batch)
    found[1]["x"][3] *= 1000.0
    return found


@pytest.mark.parametrize("opset", [17, 18, 21])
def test_without_outliers_they_are_those_of_onnxruntime(opset: int) -> None:
    ours = image_ranges(typed(opset), NODES, feeds())
    theirs = calibrated_ranges(typed(17), NODES, feeds(), "minmax")
    assert {"x", "conv1", "relu1", "add", "hs", "flat", "y"} <= set(ours)
    assert not any(name.endswith((".w", ".b")) for name in ours), "constants have no range"
    for name, (low, high) in ours.items():
        assert low == pytest.approx(min(0.0, float(theirs[name][0])), abs=1e-4)
        assert high == pytest.approx(max(0.0, float(theirs[name][1])), abs=1e-4)


def test_an_outlier_does_not_blur_the_others() -> None:
    usual, found = image_ranges(typed(), NODES, feeds(8, 8)), image_ranges(typed(), NODES, outlying())
    assert all(float(found[n][1]) <= 1.5 * float(usual[n][1]) + 1e-3 for n in usual)
    want = run(cnn(), feeds(1, 8)[0])[0]
    robust, whole = (quantize(cnn(), None, outlying(), s) for s in (ROBUST, QuantSpec(True)))
    errors = [relative_error(run(m, feeds(1, 8)[0])[0], want) for m in (robust, whole)]
    assert errors[0] < 0.1 < 0.5 < errors[1]


def test_a_tensor_without_the_images_in_front_is_taken_as_one() -> None:
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Transpose", ["x"], ["t"], name="t", perm=[1, 0]),
                helper.make_node("MatMul", ["t", "x"], ["y"], name="y"),
            ],
            "g",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4, 3])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 3])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    infer_types(model)
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    ranges = image_ranges(model, ["y"], [{"x": x}])
    assert [float(v) for v in ranges["t"]] == [0.0, 11.0]
    assert [float(v) for v in ranges["y"]] == [0.0, float((x.T @ x).max())]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    bad = feeds()
    bad[0]["x"][0, 0, 0, 0] = value
    with pytest.raises(HantcError, match="'x' reaches"):
        quantize(cnn(), None, bad, ROBUST)


def test_feeds_that_do_not_fit_are_named() -> None:
    with pytest.raises(HantcError, match="calibration fails"):
        image_ranges(typed(), NODES, [{"x": np.zeros((1, 3, 5, 5), np.float32)}])
