from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from onnx import NodeProto, helper

from hantc.dialect.rewrites.normalize import normalize
from hantc.dialect.rewrites.sum_to_mean import SumToMean
from tests.dialect.rewrites.conftest import ops

if TYPE_CHECKING:
    from tests.dialect.rewrites.conftest import Rewriting

AXES = {"axes": np.array([2, 3])}


def node(op: str, inputs: list[str], outputs: list[str], **attrs: Any) -> NodeProto:
    return helper.make_node(op, inputs, outputs, **attrs)


def scalar(value: float) -> np.ndarray:
    return np.array(value, np.float32)


@pytest.mark.parametrize(("op", "value"), [("Div", 56.0), ("Mul", 1 / 56)])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_sum_over_its_count(rewriting: Rewriting, op: str, value: float, keepdims: int) -> None:
    nodes = [node("ReduceSum", ["x", "axes"], ["s"], keepdims=keepdims), node(op, ["s", "k"], ["y"])]
    graph = rewriting.graph(nodes, AXES | {"k": scalar(value)}, x=("N", 4, 7, 8))
    made, applied, missed = normalize(graph, [SumToMean()])
    assert [a.note for a in applied] == ["a mean of 56 values"] and not missed
    assert ops(made) == ["ReduceMean"]
    x = torch.rand(3, 4, 7, 8, dtype=torch.float64)
    assert torch.allclose(graph(x), made(x), rtol=1e-6)  # 1/56 as float32 has it


@pytest.mark.parametrize(
    ("axes", "op", "inputs", "value"),
    [
        ([2, 3], "Div", ["s", "k"], 50.0),
        ([2, 3], "Div", ["k", "s"], 56.0),
        ([2, 3], "Add", ["s", "k"], 56.0),
        ([2, 3], "Mul", ["s", "k"], 0.0),
        ([1], "Div", ["s", "k"], 56.0),
    ],
)
def test_other_arithmetic_stays(
    rewriting: Rewriting, axes: list[int], op: str, inputs: list[str], value: float
) -> None:
    nodes = [node("ReduceSum", ["x", "axes"], ["s"]), node(op, inputs, ["y"])]
    r = rewriting.run(SumToMean(), nodes, {"axes": np.array(axes), "k": scalar(value)}, x=("N", 4, 7, 8))
    assert r.after == r.before and r.applied == []


def test_a_sum_that_others_read_stays(rewriting: Rewriting) -> None:
    nodes = [node("ReduceSum", ["x", "axes"], ["s"]), node("Div", ["s", "k"], ["y"]), node("Relu", ["s"], ["z"])]
    r = rewriting.run(SumToMean(), nodes, AXES | {"k": scalar(64)}, outputs=("y", "z"))
    assert r.after == r.before and "used elsewhere" in r.reasons[0]


@pytest.mark.parametrize("value", [3.0, np.nan])
def test_sums_of_nothing_and_by_no_number(rewriting: Rewriting, value: float) -> None:
    nodes = [node("ReduceSum", ["x", "axes"], ["s"], keepdims=0), node("Div", ["s", "k"], ["y"])]
    for size in (0, 3):
        graph = rewriting.graph(nodes, {"axes": np.array([1]), "k": scalar(value)}, x=("N", size, 4))
        applied, _ = SumToMean().apply(graph)
        assert bool(applied) == (size == 3 and value == 3.0)


def test_a_batch_within_another_dim_is_not_counted(rewriting: Rewriting) -> None:
    """Six values are summed for two images, nine for three."""
    reshape = node("Reshape", ["x", "to"], ["t"])
    nodes = [reshape, node("ReduceSum", ["t", "axes"], ["s"]), node("Div", ["s", "k"], ["y"])]
    constants = {"to": np.array([1, -1, 4]), "axes": np.array([1]), "k": scalar(6)}
    r = rewriting.run(SumToMean(), nodes, constants, x=("N", 3, 4))
    assert r.after == r.before and "not the same in every run" in r.reasons[0]
