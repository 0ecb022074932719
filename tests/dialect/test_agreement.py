"""An import that went wrong is seen."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto, helper

from hantc.dialect.agreement import disagreement
from hantc.dialect.importer import import_model

if TYPE_CHECKING:
    from tests.dialect.conftest import Models

node = helper.make_node


def test_equal_and_not(models: Models) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]), node("Relu", ["a"], ["y"])]
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    model = models.make(nodes, {"x": ["N", 3, 8, 8]}, ["y"], {"w": weight})
    assert disagreement(model, import_model(model)) < 1e-5
    other = models.make(nodes, {"x": ["N", 3, 8, 8]}, ["y"], {"w": 1.1 * weight})
    assert 0.05 < disagreement(other, import_model(model)) < 0.15


def test_another_shape(models: Models) -> None:
    small, large = (
        models.make([node("MaxPool", ["x"], ["y"], kernel_shape=[k, k])], {"x": ["N", 1, 8, 8]}, ["y"]) for k in (2, 3)
    )
    assert disagreement(small, import_model(large)) == math.inf


def test_what_cannot_be_told(models: Models) -> None:
    foreign = models.make([node("Strange", ["x"], ["y"], domain="my")], {"x": ["N", 3]}, ["y"], domains={"my": 1})
    assert math.isnan(disagreement(foreign, import_model(foreign)))
    largest = models.make([node("ArgMax", ["x"], ["y"], axis=1)], {"x": ["N", 3]}, ["y"], out_dtype=TensorProto.INT64)
    assert math.isnan(disagreement(largest, import_model(largest)))
    noisy = models.make(
        [node("RandomNormalLike", ["x"], ["n"]), node("Add", ["x", "n"], ["y"])], {"x": ["N", 3]}, ["y"]
    )
    assert math.isnan(disagreement(noisy, import_model(noisy)))


def test_what_torch_does_not_run_is_told(models: Models) -> None:
    model = models.make([node("Sqrt", ["x"], ["y"])], {"x": ["N", 3]}, ["y"])
    other = models.make([node("Abs", ["x"], ["y"])], {"x": ["N", 3]}, ["y"])
    assert disagreement(model, import_model(other)) == math.inf, "numbers where there are none"
    wide = models.make([node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 5]}, ["y"], {"w": models.weight(5, 2)})
    narrow = import_model(wide)
    narrow.meta["info"] = import_model(model).meta["info"]
    assert disagreement(model, narrow) == math.inf
