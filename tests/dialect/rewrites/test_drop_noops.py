from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from onnx import NodeProto, TensorProto, helper

from hantc.dialect.activation import Clip
from hantc.dialect.rewrites.drop_noops import DropNoops

if TYPE_CHECKING:
    from tests.dialect.rewrites.conftest import Rewriting

LARGE = 2**62
CONSTANTS: dict[str, Any] = {
    "one": np.array(1, np.float32),
    "ones": np.ones((4, 1, 1), np.float32),
    "zero": np.array([0], np.float32),
    "zeros": np.zeros((1, 4, 8, 8), np.float32),
    "same": np.array([-1, 4, 8, 8]),
    "pair": np.array([2, -1, 8, 8]),
    "keep": np.array([0, 4, 64]),
    "back": np.array([0, 4, 8, 8]),
    "nopads": np.zeros(8, np.int64),
    "low": np.array([0, 0]),
    "high": np.array([8, LARGE]),
    "axes": np.array([2, -1]),
    "first": np.array([0]),
    "million": np.array([10**6]),
    "two": np.array([2]),
    "wide": np.ones((1, 1, 1, 1, 1), np.float32),
}


def node(op: str, inputs: list[str], outputs: tuple[str, ...] = ("a",), **attrs: Any) -> NodeProto:
    return helper.make_node(op, inputs, list(outputs), **attrs)


@pytest.mark.parametrize(
    "noop",
    [
        [node("Reshape", ["x", "same"])],
        [node("Reshape", ["x", "back"])],
        [node("Transpose", ["x"], perm=[0, 1, 2, 3])],
        [node("Transpose", ["x"], ("t",), perm=[0, 2, 3, 1]), node("Transpose", ["t"], perm=[0, 3, 1, 2])],
        [node("Pad", ["x", "nopads"])],
        [node("Mul", ["x", "one"])],
        [node("Mul", ["ones", "x"])],
        [node("Div", ["x", "ones"])],
        [node("Pow", ["x", "one"])],
        [node("Add", ["x", "zero"])],
        [node("Sub", ["x", "zeros"])],
        [node("Concat", ["x"], axis=1)],
        [node("Slice", ["x", "low", "high", "axes"])],
        [node("MaxPool", ["x"], kernel_shape=[1, 1])],
        [node("Mul", ["x", "one"], ("t",)), node("Pad", ["t", "nopads"])],
    ],
    ids=lambda nodes: "+".join(n.op_type for n in nodes),
)
def test_dropped(rewriting: Rewriting, noop: list[NodeProto]) -> None:
    nodes = [node("Exp", ["x"], ("e",)), *noop, node("Tanh", ["a"], ("y",))]
    nodes[1].input[list(nodes[1].input).index("x")] = "e"
    r = rewriting.run(DropNoops(), nodes, CONSTANTS)
    assert r.after == ["Exp", "Tanh"] and r.applied


@pytest.mark.parametrize(
    "noop",
    [
        node("ReduceMean", ["x"], axes=[-1, 2]),
        node("GlobalAveragePool", ["x"]),
        node("AveragePool", ["x"], kernel_shape=[1, 1]),
    ],
    ids=lambda n: n.op_type,
)
def test_dropped_on_single_pixels(rewriting: Rewriting, noop: NodeProto) -> None:
    r = rewriting.run(DropNoops(), [noop, node("Tanh", ["a"], ("y",))], x=("N", 4, 1, 1))
    assert r.after == ["Tanh"]


def test_flatten_of_two_dims(rewriting: Rewriting) -> None:
    r = rewriting.run(DropNoops(), [node("Flatten", ["x"]), node("Tanh", ["a"], ("y",))], x=("N", 4))
    assert r.after == ["Tanh"]


def test_input_straight_to_output(rewriting: Rewriting) -> None:
    assert rewriting.run(DropNoops(), [node("Mul", ["x", "one"], ("y",))], CONSTANTS).after == ["Identity"]


def test_relu_twice(rewriting: Rewriting) -> None:
    assert rewriting.run(DropNoops(), [node("Relu", ["x"]), node("Relu", ["a"], ("y",))]).after == ["Relu"]


def test_cast_to_what_it_is(rewriting: Rewriting) -> None:
    nodes = [node("Cast", ["x"], to=TensorProto.DOUBLE), node("Tanh", ["a"], ("y",))]
    r = rewriting.run(DropNoops(), nodes)  # the test graphs are in float64
    assert r.after == ["Tanh"] and "torch.float64" in r.applied[0].note


def test_clip_without_bounds(rewriting: Rewriting) -> None:
    module = rewriting.graph([node("Relu", ["x"]), node("Tanh", ["a"], ("y",))])
    module.relu_0 = Clip()
    assert rewriting.apply(DropNoops(), module).after == ["Tanh"]


def test_transposes_merge(rewriting: Rewriting) -> None:
    nodes = [node("Transpose", ["x"], perm=[0, 2, 3, 1]), node("Transpose", ["a"], ("y",), perm=[0, 2, 1, 3])]
    r = rewriting.run(DropNoops(), nodes, x=("N", 2, 3, 4))
    assert r.after == ["Transpose"] and "merged" in r.applied[0].note


def test_cancelled_transpose_whose_first_half_is_needed(rewriting: Rewriting) -> None:
    nodes = [
        node("Transpose", ["x"], perm=[0, 2, 3, 1]),
        node("Transpose", ["a"], ("b",), perm=[0, 3, 1, 2]),
        node("Tanh", ["b"], ("y",)),
    ]
    r = rewriting.run(DropNoops(), nodes, outputs=("y", "a"))
    assert sorted(r.after) == ["Tanh", "Transpose"]


@pytest.mark.parametrize(
    "kept",
    [
        node("Reshape", ["x", "keep"], ("y",)),
        node("Reshape", ["x", "pair"], ("y",)),
        node("Transpose", ["x"], ("y",), perm=[0, 1, 3, 2]),
        node("Sub", ["zero", "x"], ("y",)),
        node("Div", ["one", "x"], ("y",)),
        node("Mul", ["x", "wide"], ("y",)),
        node("Slice", ["x", "first", "million", "first"], ("y",)),
        node("MaxPool", ["x"], ("y",), kernel_shape=[1, 1], strides=[2, 2]),
        node("ReduceMean", ["x"], ("y",), axes=[2]),
    ],
    ids=lambda n: n.op_type,
)
def test_kept(rewriting: Rewriting, kept: NodeProto) -> None:
    r = rewriting.run(DropNoops(), [kept], CONSTANTS)
    assert r.after == r.before and r.applied == []


def test_constant_that_broadcasts(rewriting: Rewriting) -> None:
    r = rewriting.run(DropNoops(), [node("Mul", ["x", "ones"], ("y",))], CONSTANTS, x=("N", 1, 8, 8))
    assert r.after == ["Mul"] and r.applied == []


def test_constant_that_fixes_the_batch(rewriting: Rewriting) -> None:
    nodes = [node("Mul", ["x", "pairs"], ("y",))]
    module = rewriting.graph(nodes, {"pairs": np.ones((2, 1, 1, 1), np.float32)})
    applied, missed = DropNoops().apply(module)
    assert applied == [] and "fixes the batch" in missed[0].reason
    assert len(module(torch.ones(1, 4, 8, 8).double())) == 2, "dropping it would have changed this"


def test_open_sizes_are_a_reason(rewriting: Rewriting) -> None:
    module = rewriting.graph([node("Mul", ["x", "ones"], ("y",))], CONSTANTS, x=("N", 4, "H", "W"))
    applied, missed = DropNoops().apply(module)
    assert applied == [] and "sizes are unknown" in missed[0].reason


# --- global pooling
