"""Files that declare wrong shapes compute what ONNX Runtime makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from hantc.dialect.importer import import_model
from hantc.dialect.infer import without_claims

if TYPE_CHECKING:
    from tests.dialect.conftest import Models

node = helper.make_node


def claim(model: ModelProto, **shapes: list[int | str]) -> ModelProto:
    for name, shape in shapes.items():
        model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return model


def declared(model: ModelProto, name: str) -> list[int | str]:
    values = {v.name: v for v in (*model.graph.value_info, *model.graph.output)}
    return [d.dim_value or d.dim_param for d in values[name].type.tensor_type.shape.dim]


def test_padding_by_a_wrong_size(models: Models) -> None:
    """SAME padding follows from the input's size: 9 wants other pads than 8 at stride 2."""
    nodes = [node("Relu", ["x"], ["a"]), node("Conv", ["a", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])]
    weight = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    model = claim(models.make(nodes, {"x": [1, 1, 9, 9]}, ["y"], {"w": weight}), a=[1, 1, 8, 8])
    models.trip(model)


def test_arithmetic_on_a_wrong_shape(models: Models) -> None:
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Shape", ["a"], ["s"]),
        node("Gather", ["s", "one"], ["c"]),
        node("Cast", ["c"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["a", "f"], ["y"]),
    ]
    model = claim(models.make(nodes, {"x": [2, 3]}, ["y"], {"one": np.array(1)}), a=[2, 30])
    models.trip(model)


def test_output_of_a_wrong_shape(models: Models) -> None:
    model = models.make([node("Gemm", ["x", "w"], ["y"])], {"x": [2, 3]}, [], {"w": np.ones((3, 5), np.float32)})
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 7]))
    assert import_model(model).meta["info"].outputs[0].shape == (2, 5)


def test_what_only_the_file_knows_stays(models: Models) -> None:
    """Behind an operator that inference does not know."""
    nodes = [node("Strange", ["x"], ["a"], domain="my"), node("Relu", ["a"], ["b"]), node("Exp", ["b"], ["y"])]
    model = claim(models.make(nodes, {"x": ["N", 3]}, ["y"], domains={"my": 1}), a=["N", 7])
    made = without_claims(model)
    assert declared(made, "a") == declared(made, "b") == ["N", 7]


def test_computed_sizes_are_the_files(models: Models) -> None:
    nodes = [node("Reshape", ["x", "to"], ["a"]), node("Relu", ["a"], ["y"])]
    model = models.make(nodes, {"x": ["N", 3, 4], "to": [2]}, ["y"])
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.INT64
    assert declared(without_claims(claim(model, a=["N", 12])), "a") == ["N", 12]


@pytest.mark.parametrize("elements", [4, 4000])
def test_resize_by_weights_of_any_size(models: Models, elements: int) -> None:
    """Weights go into inference as their shapes alone, but not those that say what shape something has."""
    nodes = [node("Resize", ["x", "", "scales"], ["a"]), node("Add", ["a", "w"], ["y"])]
    constants = {"scales": np.array([1, 1, 2, 2], np.float32), "w": np.ones((1, 1, 1, elements), np.float32)}
    made = without_claims(models.make(nodes, {"x": ["N", 1, 2, elements // 2]}, ["y"], constants))
    assert declared(made, "a")[1:] == [1, 4, elements]


def test_a_batch_that_was_opened_later(models: Models) -> None:
    """Exported at batch 1, its input opened by hand: inside it still says 1."""
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Shape", ["a"], ["s"]),
        node("ConstantOfShape", ["s"], ["z"]),
        node("Concat", ["a", "z"], ["y"], axis=1),
    ]
    model = models.make(nodes, {"x": ["N", 3, 8, 8]}, ["y"], {"w": models.weight(4, 3, 1, 1)})
    models.trip(claim(model, a=[1, 4, 8, 8]), batch=3)


def test_claims_within_branches(models: Models) -> None:
    """Both branches say 8×8, and give 5×5, which is padded otherwise."""

    def branch(name: str, op: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4, 8, 8])
        return helper.make_graph([node(op, ["x"], [name])], name, [], [out])

    fork = node("If", ["c"], ["a"], then_branch=branch("t", "Exp"), else_branch=branch("e", "Neg"))
    nodes = [
        node("ReduceMax", ["x"], ["m"], keepdims=0),
        node("Greater", ["m", "zero"], ["c"]),
        fork,
        node("MaxPool", ["a"], ["y"], kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_LOWER"),
    ]
    models.trip(models.make(nodes, {"x": ["N", 4, 5, 5]}, ["y"], {"zero": np.array(0, np.float32)}))
