"""Shape computations that exporters write as nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper

from hantc.dialect.graph import leaf_of, node_named
from hantc.dialect.shape import Reshape

if TYPE_CHECKING:
    from tests.dialect.conftest import Dims, Models

IMAGE: Dims = ("N", 4, 8, 8)


def node(op: str, inputs: list[str], outputs: list[str], **attrs: Any) -> NodeProto:
    return helper.make_node(op, inputs, outputs, **attrs)


def _view(x: str, y: str, prefix: str = "") -> list[NodeProto]:
    """`x.view(x.size(0), -1)` as torch writes it."""
    p = prefix
    return [
        node("Shape", [x], [p + "shape"]),
        node("Gather", [p + "shape", "zero"], [p + "n"], axis=0),
        node("Unsqueeze", [p + "n", "axis0"], [p + "n1"]),
        node("Concat", [p + "n1", "minus"], [p + "target"], axis=0),
        node("Reshape", [x, p + "target"], [y]),
    ]


CONSTANTS = {"zero": np.array(0), "axis0": np.array([0]), "minus": np.array([-1])}


def test_view_becomes_one_reshape(models: Models) -> None:
    model = models.make([node("Relu", ["x"], ["a"]), *_view("a", "y")], {"x": IMAGE}, {"y": ["N", 256]}, CONSTANTS)
    trip = models.trip(model)
    assert trip.ops == ["Relu", "Reshape"] and trip.opaque == []
    leaf = leaf_of(trip.module, node_named(trip.module, "reshape_0"))
    assert isinstance(leaf, Reshape) and leaf.keep_batch and leaf.shape == (256,)


def test_view_after_a_foreign_node(models: Models) -> None:
    """ONNX's shape inference stops at com.microsoft's op."""
    nodes = [node("Trilu", ["x"], ["a"], domain="com.microsoft"), *_view("a", "y")]
    trip = models.trip(models.make(nodes, {"x": IMAGE}, {"y": ["N", 256]}, CONSTANTS, domains={"com.microsoft": 1}))
    assert trip.ops == ["Trilu", "Reshape"]


def test_sizes_that_the_batch_does_not_change_are_folded(models: Models) -> None:
    """Division by H·W computed from the shape: the mean of the map, as some exporters write it."""
    nodes = [
        node("Trilu", ["x"], ["a"], domain="com.microsoft"),
        node("Shape", ["a"], ["s"]),
        node("Slice", ["s", "two", "four"], ["hw"]),
        node("ReduceProd", ["hw"], ["count"], keepdims=0),
        node("Cast", ["count"], ["f"], to=TensorProto.FLOAT),
        node("Div", ["a", "f"], ["y"]),
    ]
    constants = {"two": np.array([2]), "four": np.array([4])}
    trip = models.trip(models.make(nodes, {"x": IMAGE}, {"y": IMAGE}, constants, domains={"com.microsoft": 1}))
    assert trip.ops == ["Trilu", "Div"]
    assert len(list(trip.module.buffers())) == 1, "buffers of folded nodes are gone"


def test_what_depends_on_the_batch_stays(models: Models) -> None:
    """Division by N cannot be a constant."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Cast", ["n"], ["f"], to=TensorProto.FLOAT),
        node("Div", ["x", "f"], ["y"]),
    ]
    model = models.make(nodes, {"x": IMAGE}, {"y": IMAGE}, CONSTANTS)
    for batch in (1, 2, 5):
        trip = models.trip(model, batch=batch)
    assert "Shape" in trip.ops


def test_second_input_of_fixed_size_does_not_freeze_the_batch(models: Models) -> None:
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Cast", ["n"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["x", "f"], ["a"]),
        node("Mul", ["a", "z"], ["y"]),
    ]
    model = models.make(nodes, {"x": IMAGE, "z": [1]}, {"y": IMAGE}, CONSTANTS)
    for batch in (1, 4):
        models.trip(model, batch=batch)


def test_open_height_is_left_alone(models: Models) -> None:
    model = models.make(_view("x", "y"), {"x": ["N", 4, "H", 8]}, {"y": ["N", None]}, CONSTANTS)
    for height in (3, 6):
        models.trip(model, x=np.ones((2, 4, height, 8), np.float32))


def test_graph_that_fails_on_random_input_is_imported_all_the_same(models: Models) -> None:
    """Gather with the input as index: random indices are out of range."""
    nodes = [node("Gather", ["table", "x"], ["a"]), node("Reshape", ["a", "s"], ["y"])]
    constants = {"table": models.weight(2, 4), "s": np.array([0, -1])}
    model = models.make(nodes, {"x": ["N", 3]}, ["y"], constants, dtype=TensorProto.INT64, out_dtype=TensorProto.FLOAT)
    models.trip(model, x=np.array([[0, 1, 1], [1, 0, 0]]))


def test_static_batch_view_runs_at_another_batch(models: Models) -> None:
    model = models.make([node("Relu", ["x"], ["a"]), *_view("a", "y")], {"x": [1, 4, 8, 8]}, {"y": [1, 256]}, CONSTANTS)
    trip = models.trip(model)
    assert trip.module(torch.zeros(4, 4, 8, 8)).shape == (4, 256)


def _as_strided(models: Models, order: str) -> ModelProto:
    """The mean of each map, flattened and gathered again by indices computed from the batch."""
    nodes = [
        node("ReduceMean", ["x", "spatial"], ["m"], keepdims=1),
        node("Reshape", ["m", "minus"], ["flat"]),
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Range", ["zero", "n", "one"], ["up"]),
        node("Sub", ["n", "one"], ["top"]),
        node("Sub", ["top", "up"], ["down"]),
        node("Mul", [order, "four"], ["begin"]),
        node("Unsqueeze", ["begin", "axes"], ["begin4"]),
        node("Add", ["begin4", "channel"], ["at"]),
        node("Gather", ["flat", "at"], ["g"], axis=0),
        node("Relu", ["g"], ["y"]),
    ]
    constants = CONSTANTS | {
        "one": np.array(1),
        "four": np.array(4),
        "axes": np.array([1, 2, 3]),
        "spatial": np.array([2, 3]),
        "channel": np.arange(4).reshape(1, 4, 1, 1),
    }
    return models.make(nodes, {"x": IMAGE}, {"y": ["N", 4, 1, 1]}, constants, opset=18)


def test_a_detour_over_the_flat_value_is_taken_out(models: Models) -> None:
    assert models.trip(_as_strided(models, "up"), batch=3).ops == ["ReduceMean", "Relu"]


def test_a_move_that_turns_the_batch_around_stays(models: Models) -> None:
    assert "Gather" in models.trip(_as_strided(models, "down"), batch=3).ops


def test_an_expand_that_broadcasting_does_is_taken_out(models: Models) -> None:
    """`gate.expand_as(x) * x`: the gate's shape is computed from x's."""
    nodes = [
        node("GlobalAveragePool", ["x"], ["m"]),
        node("Sigmoid", ["m"], ["gate"]),
        node("Shape", ["x"], ["s"]),
        node("Expand", ["gate", "s"], ["wide"]),
        node("Mul", ["wide", "x"], ["y"]),
    ]
    assert models.trip(models.make(nodes, {"x": IMAGE}, {"y": IMAGE})).ops == ["GlobalAveragePool", "Sigmoid", "Mul"]


def test_an_expand_that_is_needed_stays(models: Models) -> None:
    nodes = [
        node("GlobalAveragePool", ["x"], ["m"]),
        node("Shape", ["x"], ["s"]),
        node("Expand", ["m", "s"], ["wide"]),
        node("Mul", ["wide", "m"], ["y"]),
    ]
    assert "Expand" in models.trip(models.make(nodes, {"x": IMAGE}, {"y": IMAGE})).ops
