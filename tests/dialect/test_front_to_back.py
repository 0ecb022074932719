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
    """Channel means of a node's output, by running the whole model."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.append(onnx.ValueInfoProto(name=node))
    values = np.concatenate([run(copy, f)[0] for f in data]).astype(np.float64)
    return np.asarray(values.mean(axis=tuple(d for d in range(values.ndim) if d != 1)))


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


def test_batches_of_different_sizes_count_by_their_images() -> None:
    data = [feeds(1, 5)[0], feeds(1, 2)[0]]
    assert np.allclose(FrontToBack(cnn(), data, ["conv2"]).next_means(4), whole(cnn(), "conv2", data), atol=1e-6)


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


def test_subgraphs_read_what_is_around_them() -> None:
    n = Net()
    n.conv("x", "a")
    n.node("ReduceMax", [n.node("Abs", ["a"], "abs")], "top", keepdims=0)
    n.node("Greater", ["top", n.const("zero", 0.0)], "positive")
    branch = [
        helper.make_graph(
            [helper.make_node(op, ["a"], [f"{op}_out"])],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}_out", TensorProto.FLOAT, None)],
        )
        for op in ("Relu", "Neg")
    ]
    n.node("If", ["positive"], "chosen", then_branch=branch[0], else_branch=branch[1])
    n.conv("chosen", "c")
    model = n.model(("c", ["N", 8, 12, 12]))
    walk = FrontToBack(model, feeds(), ["a", "c"])
    for name in ("a", "c"):
        assert np.allclose(walk.next_means(4), whole(model, name, feeds()), atol=1e-6)
