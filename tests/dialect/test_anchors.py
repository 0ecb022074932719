"""Tensors put into the engine's layout where a sum or a concatenation waits for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, NodeProto, helper

from hantc.dialect.anchors import anchored

if TYPE_CHECKING:
    from tests.dialect.conftest import Models

Array = np.ndarray[Any, Any]
C, BLOCK = 16, 8


def conv(source: str, target: str, weight: str = "w") -> NodeProto:
    return helper.make_node("Conv", [source, weight], [target], name=f"make_{target}", pads=[1] * 4)


def rounded(source: str, target: str) -> list[NodeProto]:
    """Into INT8 and back."""
    ends = [source, "scale", "zero"], [f"{target}_q", "scale", "zero"]
    return [
        helper.make_node("QuantizeLinear", ends[0], [f"{target}_q"], name=f"q_{target}"),
        helper.make_node("DequantizeLinear", ends[1], [target], name=f"dq_{target}"),
    ]


def join(kind: str, *sources: str, target: str = "sum") -> NodeProto:
    axis: dict[str, Any] = {"axis": 1} if kind == "Concat" else {}
    return helper.make_node(kind, sources, [target], name=kind, **axis)


def build(models: Models, *nodes: NodeProto, channels: int = C, out: int | None = None) -> ModelProto:
    constants = {
        "w": models.weight(channels, channels, 3, 3) * 0.1,
        "wide": models.weight(channels, 2 * channels, 3, 3) * 0.1,
        "scale": np.array(0.05, np.float32),
        "zero": np.array(128, np.uint8),
        "pads": np.array([0, channels, 0, 0, 0, 0, 0, 0], np.int64),
    }
    used = {i for n in nodes for i in n.input}
    kept = {k: v for k, v in constants.items() if k in used}
    return models.make(list(nodes), {"x": ("N", channels, 6, 6)}, {"y": ("N", out or channels, None, None)}, kept)


def run(model: ModelProto, x: Array) -> Array:
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def check(models: Models, model: ModelProto, *expected: str, channels: int = C) -> ModelProto:
    """The tensors that get an anchor are those, and the network computes the same."""
    before = model.SerializeToString(deterministic=True)
    made, behind = anchored(model, BLOCK)
    assert behind == expected
    assert model.SerializeToString(deterministic=True) == before
    assert len(made.graph.node) == len(model.graph.node) + len(expected)
    x = np.asarray(models.rng.standard_normal((2, channels, 6, 6)), np.float32)
    assert np.allclose(run(made, x), run(model, x), atol=1e-5)
    return made


def test_a_sum_with_what_comes_out_of_int8(models: Models) -> None:
    nodes = [*rounded("x", "skip"), conv("skip", "a"), join("Add", "a", "skip"), conv("sum", "y")]
    made = check(models, build(models, *nodes), "skip")
    assert next(n for n in made.graph.node if n.name == "make_a").input[0] == "anchor_0.out"


def test_a_concatenation(models: Models) -> None:
    nodes = [conv("x", "a"), *rounded("x", "r"), join("Concat", "r", "a"), conv("sum", "y", "wide")]
    check(models, build(models, *nodes), "r")


def test_a_stream_through_activations(models: Models) -> None:
    """The second sum's operand is the first sum, which is in blocks by then."""
    relu = helper.make_node("Relu", ["sum"], ["act"], name="relu")
    first = [*rounded("x", "skip"), conv("skip", "a"), join("Add", "a", "skip"), relu]
    second = [conv("act", "b"), join("Add", "b", "act", target="last"), conv("last", "y")]
    second[1].name = "second"
    check(models, build(models, *first, *second), "skip")


def test_a_sum_that_leaves_blocks_anyway(models: Models) -> None:
    check(models, build(models, *rounded("x", "skip"), conv("skip", "a"), join("Add", "a", "skip", target="y")))


def test_a_sum_that_goes_into_int8(models: Models) -> None:
    nodes = [*rounded("x", "skip"), conv("skip", "a"), join("Add", "a", "skip"), *rounded("sum", "y")]
    check(models, build(models, *nodes))


def test_channels_that_fill_no_block(models: Models) -> None:
    nodes = [*rounded("x", "skip"), conv("skip", "a"), join("Add", "a", "skip"), conv("sum", "y")]
    check(models, build(models, *nodes, channels=6), channels=6)


def test_a_sum_of_tensors_that_are_all_in_blocks(models: Models) -> None:
    model = build(models, conv("x", "a"), conv("a", "b"), join("Add", "a", "b"), conv("sum", "y"))
    assert anchored(model, BLOCK)[0] is model


def test_a_convolution_in_int8_is_not_in_blocks(models: Models) -> None:
    nodes = [*rounded("x", "i"), conv("i", "c"), *rounded("c", "skip"), conv("x", "a"), join("Add", "a", "skip")]
    check(models, build(models, *nodes, conv("sum", "y")), "skip")


def test_operands_of_other_shapes_and_constants(models: Models) -> None:
    mean = helper.make_node("GlobalAveragePool", ["r"], ["m"], name="mean")
    nodes = [conv("x", "a"), *rounded("x", "r"), mean, join("Add", "a", "m"), conv("sum", "y")]
    check(models, build(models, *nodes))


def test_a_pool_is_held_apart_from_rounding(models: Models) -> None:
    """Only what rounds it reads the anchor."""
    pool = helper.make_node("MaxPool", ["a"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2])
    other = helper.make_node("Relu", ["p"], ["o"], name="relu")
    nodes = [conv("x", "a"), pool, other, *rounded("p", "r"), conv("r", "c"), join("Add", "c", "o", target="y")]
    made = check(models, build(models, *nodes), "p")
    readers = {n.name: list(n.input) for n in made.graph.node}
    assert readers["q_r"][0] == "anchor_0.out" and readers["relu"] == ["p"]


def test_a_pool_in_int8_stays(models: Models) -> None:
    pool = helper.make_node("MaxPool", ["a"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2])
    nodes = [*rounded("x", "a"), pool, *rounded("p", "r"), conv("r", "y")]
    check(models, build(models, *nodes))


@pytest.mark.parametrize("taken", ["anchor_0", "anchor_0.out", "anchor_0.weight"])
@pytest.mark.parametrize("what", ["node", "value", "weight"])
def test_names_stay_unique(models: Models, taken: str, what: str) -> None:
    nodes = [*rounded("x", "skip"), conv("skip", "a"), join("Add", "a", "skip"), conv("sum", "y")]
    model = build(models, *nodes)
    if what == "node":
        model.graph.node[-1].name = taken
    old = {"value": "sum", "weight": "w"}.get(what, "")
    for node in model.graph.node if old else ():
        for side in (node.input, node.output):
            side[:] = [taken if v == old else v for v in side]
    for weight in model.graph.initializer:
        weight.name = taken if weight.name == old else weight.name
    check(models, model, "skip")


def test_an_anchored_model_whose_nodes_lost_their_names(models: Models) -> None:
    first = [*rounded("x", "skip"), conv("skip", "a"), join("Add", "a", "skip"), conv("sum", "b")]
    model = build(models, *first, *rounded("b", "r"), conv("r", "c"), join("Add", "c", "r", target="d"), conv("d", "y"))
    for node in model.graph.node:
        node.name = ""
    made, behind = anchored(model, BLOCK)
    assert behind == ("skip", "r")
    onnx.checker.check_model(made, full_check=True)


@pytest.mark.parametrize("kind", ["Add", "Concat"])
def test_operators_of_others_are_none_of_ours(models: Models, kind: str) -> None:
    model = build(models, *rounded("x", "skip"), conv("skip", "a"), join(kind, "a", "skip"), conv("sum", "y"))
    theirs = next(n for n in model.graph.node if n.op_type == kind)
    theirs.domain = "my"
    del theirs.attribute[:]
    model.opset_import.append(helper.make_opsetid("my", 1))
    shape = helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, ["N", C, 6, 6])
    model.graph.value_info.append(shape)
    assert anchored(model, BLOCK) == (model, ())
