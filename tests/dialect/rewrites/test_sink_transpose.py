"""Transposes of channels-last graphs move down until they cancel, and stay where nothing waits for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import NodeProto, helper

from hantc.dialect.emitter import emit
from hantc.dialect.rewrites.normalize import normalize
from hantc.dialect.rewrites.sink_transpose import SinkTranspose

if TYPE_CHECKING:
    from tests.dialect.rewrites.conftest import Rewriting

RNG = np.random.default_rng(9)
SLICE = {"one": [1, 0], "five": [5, 3], "axes": [2, -1], "two": [2, 1]}
LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def node(op: str, inputs: str, output: str, **attrs: Any) -> NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attrs)


def test_two_convolutions_channels_last(rewriting: Rewriting) -> None:
    weights = RNG.standard_normal((4, 4, 1, 1)).astype(np.float32)
    nodes = [
        node("Conv", "x w", "c"),
        node("Transpose", "c", "l", perm=LAST),
        node("Add", "l shift", "s"),
        node("Relu", "s", "r"),
        node("Transpose", "r", "f", perm=FIRST),
        node("Conv", "f w", "d"),
        node("Transpose", "d", "dl", perm=LAST),
        node("Add", "dl r", "sum"),
        node("Clip", "sum low high", "k"),
        node("Transpose", "k", "y", perm=FIRST),
    ]
    constants = {
        "w": weights,
        "shift": RNG.standard_normal(4).astype(np.float32),
        "low": np.float32(-0.5),
        "high": np.float32(0.5),
    }
    before = rewriting.graph(nodes, constants)
    made, applied, missed = normalize(before)
    kinds = [n.op_type for n in emit(made).model.graph.node]
    assert "Transpose" not in kinds and kinds.count("Conv") == 2
    assert any(a.rewrite == "sink_transpose" for a in applied)
    assert not any(m.rewrite == "sink_transpose" for m in missed)
    rewriting.equal(before, made)


@pytest.mark.parametrize(
    ("middle", "constants"),
    [
        ([node("LeakyRelu", "l", "m", alpha=0.1)], {}),
        ([node("Mul", "l c", "m")], {"c": RNG.standard_normal((8, 8, 4)).astype(np.float32)}),
        ([node("Sub", "c l", "m")], {"c": RNG.standard_normal((1, 8, 1, 1)).astype(np.float32)}),
        ([node("Mul", "l c", "m")], {"c": np.float32(3)}),
        ([node("Mul", "l l", "m")], {}),
        ([node("Pad", "l p v", "m")], {"p": np.array([0, 1, 0, 2, 0, 3, 1, 0]), "v": np.float32(0.5)}),
        ([node("Sigmoid", "l", "s"), node("Mul", "l s", "m")], {}),
        ([node("ReduceMax", "l", "m", axes=[1, -1], keepdims=1)], {}),
        ([node("ReduceMean", "l", "r", axes=[1, 2], keepdims=1), node("Mul", "l r", "m")], {}),
        ([node("Softmax", "l", "m", axis=-1)], {}),
        ([node("Slice", "l one five axes two", "m")], {n: np.array(v) for n, v in SLICE.items()}),
    ],
)
def test_moves_past(rewriting: Rewriting, middle: list[NodeProto], constants: dict[str, Any]) -> None:
    nodes = [node("Transpose", "x", "l", perm=LAST), *middle, node("Transpose", "m", "y", perm=FIRST)]
    before = rewriting.graph(nodes, constants)
    made, _, _ = normalize(before)
    assert "Transpose" not in [n.op_type for n in emit(made).model.graph.node]
    rewriting.equal(before, made)


def test_squeeze_and_excite_channels_last(rewriting: Rewriting) -> None:
    """A value with two readers, both of which the Transpose moves past."""
    weights = RNG.standard_normal((4, 4, 1, 1)).astype(np.float32)
    nodes = [
        node("Conv", "x w", "c"),
        node("Transpose", "c", "l", perm=LAST),
        node("Sigmoid", "l", "s"),
        node("Mul", "l s", "act"),
        node("ReduceMean", "act", "mean", axes=[1, 2], keepdims=1),
        node("Transpose", "mean", "f", perm=FIRST),
        node("Conv", "f w", "d"),
        node("Transpose", "d", "dl", perm=LAST),
        node("Sigmoid", "dl", "gate"),
        node("Mul", "act gate", "gated"),
        node("Transpose", "gated", "y", perm=FIRST),
    ]
    before = rewriting.graph(nodes, {"w": weights})
    made, _, missed = normalize(before)
    kinds = [n.op_type for n in emit(made).model.graph.node]
    assert "Transpose" not in kinds and "GlobalAveragePool" in kinds
    assert not any(m.rewrite == "sink_transpose" for m in missed)
    rewriting.equal(before, made)


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax"])
def test_a_reduction_that_drops_the_dims_ends_it(rewriting: Rewriting, op: str) -> None:
    nodes = [
        node("Transpose", "x", "l", perm=LAST),
        node("Relu", "l", "r"),
        node(op, "r", "y", axes=[1, 2], keepdims=0),
    ]
    before = rewriting.graph(nodes, {})
    made, _, _ = normalize(before)
    assert "Transpose" not in [n.op_type for n in emit(made).model.graph.node]
    rewriting.equal(before, made)


def test_a_reduction_that_leaves_another_order_does_not(rewriting: Rewriting) -> None:
    nodes = [node("Transpose", "x", "l", perm=LAST), node("ReduceMax", "l", "y", axes=[0], keepdims=0)]
    r = rewriting.run(SinkTranspose(), nodes)
    assert r.applied == [] and r.missed == []


def test_an_old_softmax_over_the_channels_stays(rewriting: Rewriting) -> None:
    """Before opset 13 it is over all dims from its axis on."""
    nodes = [
        node("Transpose", "x", "l", perm=LAST),
        node("Softmax", "l", "m", axis=3),
        node("Transpose", "m", "y", perm=FIRST),
    ]
    made, _, missed = normalize(rewriting.graph(nodes, {}, opset=12))
    assert [n.op_type for n in emit(made).model.graph.node] == ["Transpose", "Softmax", "Transpose"]
    assert any("opset 13" in m.reason for m in missed)


@pytest.mark.parametrize("axis", [3, -1, 1])
def test_moves_past_concatenations(rewriting: Rewriting, axis: int) -> None:
    nodes = [
        node("Transpose", "x", "a", perm=LAST),
        node("Transpose", "z", "b", perm=LAST),
        node("Concat", "a b", "m", axis=axis),
        node("Transpose", "m", "y", perm=FIRST),
    ]
    r = rewriting.run(SinkTranspose(), nodes, z=("N", 4, 8, 8))
    assert r.before == ["Transpose", "Transpose", "Concat", "Transpose"]
    assert r.after == ["Concat", "Transpose", "Transpose"]


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (
            [
                node("Transpose", "x", "a", perm=LAST),
                node("Transpose", "z", "b", perm=(0, 3, 2, 1)),
                node("Add", "a b", "m"),
                node("Transpose", "m", "y", perm=FIRST),
            ],
            "different ways",
        ),
        (
            [
                node("Transpose", "x", "a", perm=LAST),
                node("Add", "a z", "m"),
                node("Transpose", "m", "y", perm=FIRST),
            ],
            "is not transposed",
        ),
    ],
)
def test_stays(rewriting: Rewriting, nodes: list[NodeProto], reason: str) -> None:
    r = rewriting.run(SinkTranspose(), nodes, z=("N", 8, 8, 8), x=("N", 8, 8, 8))
    assert r.applied == [] and reason in r.reasons[0]


def test_a_value_that_others_read_stays(rewriting: Rewriting) -> None:
    nodes = [
        node("Transpose", "x", "a", perm=LAST),
        node("Relu", "a", "m"),
        node("Transpose", "m", "y", perm=FIRST),
    ]
    r = rewriting.run(SinkTranspose(), nodes, outputs=("a", "y"))
    assert r.applied == [] and "used elsewhere" in r.reasons[0]


def test_where_nothing_waits_nothing_moves(rewriting: Rewriting) -> None:
    nodes = [node("Transpose", "x", "a", perm=LAST), node("Relu", "a", "m"), node("Softmax", "m", "y", axis=-1)]
    r = rewriting.run(SinkTranspose(), nodes)
    assert r.applied == [] and r.missed == []


def test_a_deep_network_settles(rewriting: Rewriting) -> None:
    nodes, last = [node("Transpose", "x", "v0", perm=LAST)], "v0"
    for i in range(60):
        nodes += [
            node("Transpose", last, f"f{i}", perm=FIRST),
            node("Conv", f"f{i} w", f"c{i}"),
            node("Transpose", f"c{i}", f"l{i}", perm=LAST),
            node("Add", f"l{i} {last}", f"s{i}"),
            node("Relu", f"s{i}", f"v{i + 1}"),
        ]
        last = f"v{i + 1}"
    nodes.append(node("Transpose", last, "y", perm=FIRST))
    weights = {"w": (0.05 * RNG.standard_normal((4, 4, 1, 1))).astype(np.float32)}
    before = rewriting.graph(nodes, weights)
    made, _, _ = normalize(before)
    assert "Transpose" not in [n.op_type for n in emit(made).model.graph.node]
    rewriting.equal(before, made)


def test_where_the_way_to_the_inverse_is_blocked_nothing_moves(rewriting: Rewriting) -> None:
    nodes = [
        node("Transpose", "x", "a", perm=LAST),
        node("Relu", "a", "r"),
        node("Add", "r z", "m"),
        node("Transpose", "m", "y", perm=FIRST),
    ]
    r = rewriting.run(SinkTranspose(), nodes, x=("N", 8, 8, 8), z=("N", 8, 8, 8))
    assert r.applied == []
