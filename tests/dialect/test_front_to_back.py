"""Walking through a model: the means are the whole model's, and nothing is held that nobody needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hantc.dialect.front_to_back import FrontToBack
from tests.dialect.test_qdq import Array, Net, cnn, feeds, run

CNN = ["conv1", "conv2", "conv3", "conv4"]


def whole(model: onnx.ModelProto, node: str, data: Sequence[dict[str, Array]]) -> Array:
    """Each image's channel means of a node's output, by running the whole model."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.append(onnx.ValueInfoProto(name=node))
    values = np.concatenate([run(copy, f)[0] for f in data])
    return np.asarray(values.reshape(*values.shape[:2], -1).mean(axis=2))


def branches() -> onnx.ModelProto:
    """Two branches of which one ends in an output of its own, joined with x behind; dense connections."""
    n = Net()
    n.conv("x", "a")
    n.conv("x", "b")
    n.conv("b", "side", 8, 4)
    n.node("Concat", ["a", "b", "x"], "cat", axis=1)
    n.conv("cat", "c", 24, 8)
    n.node("Add", ["c", "a"], "y")
    return n.model(("y", ["N", 8, 12, 12]), ("side", ["N", 4, 12, 12]))


@pytest.mark.parametrize("opset", [14, 17, 18, 21])
def test_the_means_are_those_of_the_whole_model(opset: int) -> None:
    model = cnn(opset)
    walk = FrontToBack(model, feeds(), [*CNN, "y"])
    for name in CNN:
        assert np.allclose(walk.next_means(4), whole(model, name, feeds()), atol=1e-6)
    assert np.allclose(walk.next_means(2), whole(model, "y", feeds()), atol=1e-6)


@pytest.mark.parametrize("nodes", [["a", "b", "side", "c"], ["b", "c"], ["side", "a"], ["c"]])
def test_branches_are_walked_too(nodes: list[str]) -> None:
    walk = FrontToBack(branches(), feeds(), nodes)
    for name in nodes:
        assert np.allclose(walk.next_means(4), whole(branches(), name, feeds()), atol=1e-6)


def test_batches_may_differ_in_size() -> None:
    data = [feeds(1, 5)[0], feeds(1, 2)[0]]
    means = FrontToBack(cnn(), data, ["conv2"]).next_means(4)
    assert means.shape == (7, 8) and np.allclose(means, whole(cnn(), "conv2", data), atol=1e-6)


def held(kind: str) -> onnx.ModelProto:
    """A convolution, a tensor of some kind that is read before the next one and behind it, and a third."""
    n = Net()
    n.conv("x", "a")
    if kind == "sequence":
        n.node("SplitToSequence", ["a"], "held", axis=1, keepdims=1)
        n.node("ConcatFromSequence", ["held"], "early", axis=1)
        n.node("SequenceAt", ["held", n.const("zero", 0, np.int64)], "late")
    elif kind == "shape":
        n.node("Shape", ["a"], "held")
        n.node("Reshape", ["a", "held"], "early")
        n.node("Expand", ["one", "held"], "late")
        n.const("one", 1.0)
    elif kind == "scalar":
        n.node("ReduceMean", ["a"], "held", keepdims=0)
        n.node("Mul", ["a", "held"], "early")
        n.node("Neg", ["held"], "late")
    elif kind == "int4":
        n.node("QuantizeLinear", ["a", n.const("scale", 0.1)], "held", output_dtype=TensorProto.INT4)
        n.node("DequantizeLinear", ["held", "scale"], "early")
        n.node("DequantizeLinear", ["held", "scale"], "late")
    else:
        n.node("Cast", ["a"], "held", to=TensorProto.DataType.Value(kind))
        n.node("Cast", ["held"], "early", to=TensorProto.FLOAT)
        n.node("Cast", ["held"], "late", to=TensorProto.FLOAT)
    n.conv("early", "b")
    n.node("Add", ["b", "late"], "sum")
    n.conv("sum", "c")
    model = n.model(("c", ["N", 8, 12, 12]), opset=21)
    model.ir_version = 10
    return model


@pytest.mark.parametrize(
    "kind", ["BFLOAT16", "FLOAT8E4M3FN", "FLOAT16", "STRING", "INT32", "int4", "sequence", "shape", "scalar"]
)
def test_tensors_of_all_types_lie_between_steps(kind: str) -> None:
    data = [feeds(1, 4)[0]] * 2
    walk = FrontToBack(held(kind), data, ["a", "b", "c"])
    for name in ("a", "b", "c"):
        assert np.allclose(walk.next_means(4), whole(held(kind), name, data), atol=1e-5)


def test_integers_are_held_instead_of_their_floats() -> None:
    n = Net()
    n.node("QuantizeLinear", [n.conv("x", "a"), n.const("scale", 0.05), n.const("zero", 128, np.uint8)], "q")
    n.node("DequantizeLinear", ["q", "scale", "zero"], "dq")
    n.node("Add", [n.conv("dq", "b"), "dq"], "sum")
    n.conv("sum", "c")
    walk = FrontToBack(n.model(("c", ["N", 8, 12, 12])), feeds(), ["a", "b", "c"])
    walk.next_means(4)
    walk.next_means(4)
    assert {k: v.dtype for k, v in walk._values[0].items()} == {"q": np.uint8}


def test_local_functions_come_along() -> None:
    model = cnn()
    body = [helper.make_node("Relu", ["u"], ["v"])]
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("local", "Mine", ["u"], ["v"], body, opsets))
    model.opset_import.append(helper.make_opsetid("local", 1))
    relu = next(n for n in model.graph.node if n.name == "relu1")
    relu.op_type, relu.domain = "Mine", "local"
    walk = FrontToBack(model, feeds(), CNN)
    for name in CNN:
        assert np.allclose(walk.next_means(4), whole(cnn(), name, feeds()), atol=1e-6)


def test_what_changes_behind_the_walk_is_seen_ahead() -> None:
    model = cnn()
    walk = FrontToBack(model, feeds(), CNN)
    before = [whole(model, name, feeds()) for name in CNN]
    walk.next_means(4)
    bias = next(i for i in model.graph.initializer if i.name == "conv1.b")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.5), bias.name))
    for name, old in zip(CNN[1:], before[1:], strict=True):
        means = walk.next_means(4)
        assert np.allclose(means, whole(model, name, feeds()), atol=1e-6) and not np.allclose(means, old, atol=1e-3)


def test_only_what_is_still_needed_is_held() -> None:
    walk = FrontToBack(branches(), feeds(), ["a", "side", "c"])
    held = []
    for _ in range(3):
        walk.next_means(4)
        held.append({frozenset(v) for v in walk._values})
    # a's input until c has been made of it, b since side asked for it, and nothing at the end
    assert held == [{frozenset("x")}, {frozenset("xb")}, {frozenset()}]


def test_what_is_needed_much_later_is_held_until_then() -> None:
    n = Net()
    n.node("Relu", [n.conv("x", "a")], "early")
    n.conv(n.conv(n.conv("early", "b"), "c"), "d")
    n.node("Add", ["d", "early"], "sum")
    n.conv("sum", "e")
    model = n.model(("e", ["N", 8, 12, 12]))
    walk = FrontToBack(model, feeds(), ["a", "b", "c", "d", "e"])
    for name in ("a", "b", "c", "d", "e"):
        assert np.allclose(walk.next_means(4), whole(model, name, feeds()), atol=1e-6)
        assert ("early" in walk._values[0]) == (name in ("b", "c", "d"))


def chosen(op: str) -> onnx.GraphProto:
    """A branch that reads a tensor and a constant from around it."""
    out = helper.make_tensor_value_info(f"{op}_out", TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node(op, ["around", "half"], [f"{op}_out"])], op, [], [out])


def test_subgraphs_read_what_is_around_them() -> None:
    n = Net()
    n.const("half", 0.5)
    n.node("Relu", [n.conv("x", "a")], "around")
    n.conv("x", "b")
    n.node("ReduceMax", ["x"], "top", keepdims=0)
    n.node("Greater", ["top", n.const("zero", 0.0)], "positive")
    n.node("If", ["positive"], "either", then_branch=chosen("Add"), else_branch=chosen("Mul"))
    n.conv("either", "c")
    model = n.model(("c", ["N", 8, 12, 12]), ("b", ["N", 8, 12, 12]))
    for nodes in (["a", "b", "c"], ["c"]):
        walk = FrontToBack(model, feeds(), nodes)
        for name in nodes:
            assert np.allclose(walk.next_means(4), whole(model, name, feeds()), atol=1e-6)
