"""Bounds in a row become one Clip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import NodeProto, helper

from hantc.dialect.activation import Clip, HardSwish, Unary
from hantc.dialect.graph import leaf_of
from hantc.dialect.rewrites.merge_clips import MergeClips
from hantc.dialect.rewrites.normalize import normalize

if TYPE_CHECKING:
    from tests.dialect.rewrites.conftest import Result, Rewriting

VALUES: dict[str, Any] = {f"c{v}": np.array(v, np.float32) for v in (-1, 0, 1, 3, 6)}
VALUES |= {"sixth": np.array(1 / 6, np.float32), "many": np.arange(8, dtype=np.float32)}


def node(op: str, *inputs: str, to: str) -> NodeProto:
    return helper.make_node(op, list(inputs), [to])


def bounds(result: Result) -> list[tuple[float, float]]:
    found = [leaf_of(result.module, n) for n in result.module.graph.nodes]
    return [(leaf.low, leaf.high) for leaf in found if isinstance(leaf, Clip)]


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        ([node("Relu", "x", to="r"), node("Min", "r", "c6", to="y")], [(0, 6)]),
        ([node("Max", "x", "c0", to="r"), node("Min", "r", "c6", to="y")], [(0, 6)]),
        ([node("Min", "x", "c6", to="m"), node("Relu", "m", to="y")], [(0, 6)]),
        ([node("Relu", "x", to="r"), node("Clip", "r", "c0", "c6", to="y")], [(0, 6)]),
        ([node("Clip", "x", "c-1", "c6", to="r"), node("Clip", "r", "c1", "c3", to="y")], [(1, 3)]),
        ([node("Min", "x", "c-1", to="m"), node("Max", "m", "c1", to="y")], [(1, 1)]),
        ([node("Max", "x", "c0", to="y")], [(0, float("inf"))]),
    ],
)
def test_bounds_become_one(rewriting: Rewriting, nodes: list[NodeProto], wanted: list[tuple[float, float]]) -> None:
    """Values stay as they were: `rewriting` compares them."""
    r = rewriting.run(MergeClips(), nodes, VALUES)
    assert bounds(r) == wanted and r.after == ["Clip"]


def test_two_relus_are_one(rewriting: Rewriting) -> None:
    r = rewriting.run(MergeClips(), [node("Relu", "x", to="r"), node("Relu", "r", to="y")])
    assert r.after == ["Relu"]


@pytest.mark.parametrize("nodes", [[node("Max", "x", "many", to="y")], [node("Max", "x", "c0", "c1", to="y")]])
def test_other_maxima_stay(rewriting: Rewriting, nodes: list[NodeProto]) -> None:
    r = rewriting.run(MergeClips(), nodes, VALUES)
    assert r.applied == [] and r.after == ["Max"]


def test_a_value_used_elsewhere_stays(rewriting: Rewriting) -> None:
    nodes = [node("Relu", "x", to="r"), node("Min", "r", "c6", to="m"), node("Add", "r", "m", to="y")]
    r = rewriting.run(MergeClips(), nodes, VALUES)
    assert r.reasons == ["relu_0 is used elsewhere too"]


def test_hard_swish_as_tensorflow_writes_it(rewriting: Rewriting) -> None:
    nodes = [
        node("Add", "x", "c3", to="a"),
        node("Relu", "a", to="r"),
        node("Min", "r", "c6", to="m"),
        node("Mul", "x", "m", to="p"),
        node("Mul", "p", "sixth", to="y"),
    ]
    found = normalize(rewriting.graph(nodes, VALUES))[0]
    leaves = [leaf_of(found, n) for n in found.graph.nodes if n.op == "call_module"]
    assert [type(leaf) for leaf in leaves] == [HardSwish]
    assert not any(isinstance(leaf, Unary) for leaf in leaves)
