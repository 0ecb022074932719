from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from onnx import NodeProto, helper

from hantc.dialect.activation import HardSigmoid, HardSwish, Silu, Unary
from hantc.dialect.graph import leaf_of
from hantc.dialect.rewrites.fuse_act import ClipToRelu, FuseHardSwish, FuseSilu

if TYPE_CHECKING:
    from tests.dialect.rewrites.conftest import Result, Rewriting


def node(op: str, inputs: list[str], outputs: list[str], **attrs: Any) -> NodeProto:
    return helper.make_node(op, inputs, outputs, **attrs)


def leaves(result: Result) -> list[type]:
    found = [leaf_of(result.module, n) for n in result.module.graph.nodes]
    return [type(leaf) for leaf in found if leaf is not None]


def scalar(value: float) -> Any:
    return np.array(value, np.float32)


HARD = {"three": scalar(3), "zero": scalar(0), "six": scalar(6), "sixth": scalar(1 / 6)}


def clipped(x: str, y: str, swapped: bool = False) -> list[NodeProto]:
    """clip(x + 3, 0, 6)."""
    add = ["three", x] if swapped else [x, "three"]
    return [node("Add", add, [y + "3"]), node("Clip", [y + "3", "zero", "six"], [y])]


@pytest.mark.parametrize("order", [["x", "s"], ["s", "x"]])
def test_silu(rewriting: Rewriting, order: list[str]) -> None:
    r = rewriting.run(FuseSilu(), [node("Sigmoid", ["x"], ["s"]), node("Mul", order, ["y"])])
    assert leaves(r) == [Silu] and r.missed == []
    assert r.after == ["Sigmoid", "Mul"], "emitted in the form that engines fuse"


def test_two_silus_in_a_row(rewriting: Rewriting) -> None:
    nodes = [
        node("Sigmoid", ["x"], ["s"]),
        node("Mul", ["x", "s"], ["a"]),
        node("Sigmoid", ["a"], ["t"]),
        node("Mul", ["t", "a"], ["y"]),
    ]
    assert leaves(rewriting.run(FuseSilu(), nodes)) == [Silu, Silu]


def test_sigmoid_used_elsewhere(rewriting: Rewriting) -> None:
    nodes = [node("Sigmoid", ["x"], ["s"]), node("Mul", ["x", "s"], ["a"]), node("Add", ["a", "s"], ["y"])]
    r = rewriting.run(FuseSilu(), nodes)
    assert r.applied == [] and r.reasons == ["sigmoid_0 is used elsewhere too"]


def test_gate_of_another_value_is_no_silu(rewriting: Rewriting) -> None:
    nodes = [node("Relu", ["x"], ["a"]), node("Sigmoid", ["a"], ["s"]), node("Mul", ["x", "s"], ["y"])]
    r = rewriting.run(FuseSilu(), nodes)
    assert r.applied == [] and r.missed == []


@pytest.mark.parametrize("order", [["x", "s"], ["s", "x"]])
def test_hard_swish_of_hard_sigmoid(rewriting: Rewriting, order: list[str]) -> None:
    nodes = [node("HardSigmoid", ["x"], ["s"], alpha=1 / 6, beta=0.5), node("Mul", order, ["y"])]
    module = rewriting.graph(nodes)
    # the file holds 1/6 in float32; in float64 that would be seen in the comparison
    leaf = module.get_submodule("hardsigmoid_0")
    assert isinstance(leaf, HardSigmoid)
    leaf.alpha = 1 / 6
    r = rewriting.apply(FuseHardSwish(), module)
    assert leaves(r) == [HardSwish] and r.after == ["HardSwish"]


def test_hard_swish_of_an_imported_slope(rewriting: Rewriting) -> None:
    nodes = [node("HardSigmoid", ["x"], ["s"], alpha=1 / 6, beta=0.5), node("Mul", ["x", "s"], ["y"])]
    module = rewriting.graph(nodes)
    applied, _ = FuseHardSwish().apply(module)
    assert len(applied) == 1 and torch.allclose(module(torch.full((1, 4, 8, 8), 1.0)), torch.tensor(4 / 6))


def test_other_slope_is_no_hard_swish(rewriting: Rewriting) -> None:
    r = rewriting.run(FuseHardSwish(), [node("HardSigmoid", ["x"], ["s"]), node("Mul", ["x", "s"], ["y"])])
    assert r.applied == [] and "clip(0.2·x + 0.5)" in r.reasons[0]


def test_hard_sigmoid_used_elsewhere(rewriting: Rewriting) -> None:
    nodes = [
        node("HardSigmoid", ["x"], ["s"], alpha=1 / 6, beta=0.5),
        node("Mul", ["x", "s"], ["a"]),
        node("Add", ["a", "s"], ["y"]),
    ]
    assert rewriting.run(FuseHardSwish(), nodes).reasons == ["hardsigmoid_0 is used elsewhere too"]


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("order", [["x", "c"], ["c", "x"]])
def test_hard_swish_as_torch_writes_it(rewriting: Rewriting, order: list[str], swapped: bool) -> None:
    nodes = [*clipped("x", "c", swapped), node("Mul", order, ["p"]), node("Div", ["p", "six"], ["y"])]
    r = rewriting.run(FuseHardSwish(), nodes, HARD)
    assert r.before == ["Add", "Clip", "Mul", "Div"] and r.after == ["HardSwish"] and r.missed == []


def test_hard_swish_by_way_of_hard_sigmoid(rewriting: Rewriting) -> None:
    nodes = [*clipped("x", "c"), node("Div", ["c", "six"], ["s"]), node("Mul", ["x", "s"], ["y"])]
    r = rewriting.run(FuseHardSwish(), nodes, HARD)
    assert r.after == ["HardSwish"] and len(r.applied) == 2


def test_multiplied_by_a_sixth(rewriting: Rewriting) -> None:
    nodes = [*clipped("x", "c"), node("Mul", ["sixth", "c"], ["y"])]
    module = rewriting.graph(nodes, HARD)
    for name, _ in module.named_buffers():
        buffer = module.get_buffer(name)
        buffer.copy_(torch.where(torch.isclose(buffer, torch.tensor(1 / 6).double(), atol=1e-6), 1 / 6, buffer))
    assert leaves(rewriting.apply(FuseHardSwish(), module)) == [HardSigmoid]


@pytest.mark.parametrize("changed", [{"three": scalar(2)}, {"six": scalar(5)}, {"zero": scalar(-1)}])
def test_other_constants_stay(rewriting: Rewriting, changed: dict[str, Any]) -> None:
    nodes = [*clipped("x", "c"), node("Mul", ["x", "c"], ["p"]), node("Div", ["p", "six"], ["y"])]
    r = rewriting.run(FuseHardSwish(), nodes, HARD | changed)
    assert r.after == r.before


def test_inner_value_used_elsewhere(rewriting: Rewriting) -> None:
    nodes = [
        *clipped("x", "c"),
        node("Mul", ["x", "c"], ["p"]),
        node("Div", ["p", "six"], ["h"]),
        node("Add", ["h", "c"], ["y"]),
    ]
    assert rewriting.run(FuseHardSwish(), nodes, HARD).reasons == ["a value inside it is used elsewhere too"]
    nodes = [*clipped("x", "c"), node("Div", ["c", "six"], ["s"]), node("Add", ["s", "c"], ["y"])]
    assert "used elsewhere too" in rewriting.run(FuseHardSwish(), nodes, HARD).reasons[0]


def test_clip_to_relu(rewriting: Rewriting) -> None:
    r = rewriting.run(ClipToRelu(), [node("Clip", ["x", "zero"], ["y"])], HARD)
    assert leaves(r) == [Unary] and r.after == ["Relu"]


def test_relu6_stays(rewriting: Rewriting) -> None:
    r = rewriting.run(ClipToRelu(), [node("Clip", ["x", "zero", "six"], ["y"])], HARD)
    assert r.after == ["Clip"] and r.applied == []
