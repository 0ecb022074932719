"""Nodes that the dialect does not know: run by ONNX Runtime, emitted as they were."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper

from hantc.core.errors import HantcError, UnsupportedError
from hantc.dialect.emitter import emit, opaque_leaves
from hantc.dialect.importer import import_model
from hantc.dialect.opaque import Opaque
from tests.dialect.conftest import run_ort

if TYPE_CHECKING:
    from tests.dialect.conftest import Dims, Models

IMAGE: Dims = ("N", 4, 8, 8)


def node(op: str, inputs: list[str], outputs: list[str], **attrs: Any) -> NodeProto:
    return helper.make_node(op, inputs, outputs, **attrs)


def conv_weight() -> dict[str, Any]:
    return {"w": (np.random.default_rng(1).standard_normal((4, 4, 1, 1)) * 0.5).astype(np.float32)}


def test_foreign_node_survives(models: Models) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("DFT", ["a", "l"], ["b"], axis=2),
        node("Relu", ["b"], ["y"]),
    ]
    image: list[int | str | None] = ["N", 4, 8, 1]
    model = models.make(nodes, {"x": image}, {"y": ["N", 4, 8, 2]}, conv_weight() | {"l": np.array(8)}, opset=17)
    trip = models.trip(model)
    assert trip.opaque == ["DFT"]
    assert trip.ops == ["Conv", "DFT", "Relu"]
    leaf = opaque_leaves(trip.module)[0][1]
    assert leaf.reason == "no leaf for DFT" and list(leaf.constants) == ["l"]


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("opset", [13, 19])
def test_upsample_of_opset_9_is_a_resize_later(models: Models, mode: str, opset: int) -> None:
    nodes = [node("Upsample", ["x", "s"], ["y"], mode=mode)]
    model = models.make(nodes, {"x": IMAGE}, ["y"], {"s": np.array([1, 1, 2, 2.5], np.float32)}, opset=9)
    trip = models.trip(model)
    assert trip.opaque == [] and trip.ops == ["Upsample"]
    newer = emit(trip.module, opset=opset).model
    assert [n.op_type for n in newer.graph.node] == ["Resize"]
    feeds = models.feeds(model)
    for old, new in zip(run_ort(model, feeds), run_ort(newer, feeds), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-6)


def test_what_takes_several_nodes_in_a_newer_opset_is_refused(models: Models) -> None:
    """Softmax counted all dims from its axis on as one."""
    model = models.make([node("Softmax", ["x"], ["y"], axis=1)], {"x": IMAGE}, ["y"], {}, opset=11)
    trip = models.trip(model)
    with pytest.raises(UnsupportedError, match="Softmax of opset 11 cannot be written in opset 13"):
        emit(trip.module, opset=13)


def test_foreign_node_in_a_newer_opset(models: Models) -> None:
    nodes = [node("Resize", ["x", "roi", "s"], ["y"], mode="nearest")]
    constants: dict[str, Any] = {"roi": np.zeros(8, np.float32), "s": np.array([1, 1, 2, 2], np.float32)}
    model = models.make(nodes, {"x": IMAGE}, ["y"], constants, opset=11)
    module = import_model(model)
    emitted = emit(module, opset=17).model
    assert emitted.opset_import[0].version == 17 and emitted.ir_version >= 8
    assert [n.op_type for n in emitted.graph.node] == ["Resize"]
    again = import_model(emitted)
    feeds = models.feeds(model)
    assert np.array_equal(models.forward(module, feeds)[0], models.forward(again, feeds)[0])


def _two(name: str, first: str, second: str) -> onnx.GraphProto:
    outs = [helper.make_tensor_value_info(f"{name}_{k}", TensorProto.FLOAT, None) for k in (1, 2)]
    nodes = [helper.make_node(op, ["x"], [o.name]) for op, o in zip((first, second), outs, strict=True)]
    return helper.make_graph(nodes, name, [], outs)


@pytest.mark.parametrize("choice", [True, False])
def test_fork_with_two_outputs_and_a_constant_condition(models: Models, choice: bool) -> None:
    """graphsurgeon, asked to put the branch in its stead, mixes the outputs up."""
    branches = {"then_branch": _two("then", "Exp", "Neg"), "else_branch": _two("else", "Abs", "Tanh")}
    nodes = [node("If", ["c"], ["a", "b"], **branches), node("Sub", ["a", "b"], ["y"])]
    trip = models.trip(models.make(nodes, {"x": IMAGE}, {"y": IMAGE}, {"c": np.array(choice)}))
    assert trip.opaque == ["If"]


def test_custom_domain(models: Models) -> None:
    nodes = [node("Trilu", ["x"], ["a"], upper=0, domain="com.microsoft"), node("Exp", ["a"], ["y"])]
    model = models.make(nodes, {"x": IMAGE}, {"y": IMAGE}, domains={"com.microsoft": 1})
    trip = models.trip(model)
    assert trip.opaque == ["Trilu"]
    assert ("com.microsoft", 1) in [(o.domain, o.version) for o in trip.emitted.opset_import]


def _branch(name: str, outer: str, op: str) -> onnx.GraphProto:
    out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node(op, [outer], [f"{name}_out"])], name, [], [out])


def _if_model(models: Models, nodes: list[NodeProto], outputs: list[str]) -> onnx.ModelProto:
    """If(max x > 3) Relu(conv) else Neg(conv); the value of the convolution is captured."""
    choice = node("If", ["c"], ["y"], then_branch=_branch("then", "a", "Relu"), else_branch=_branch("else", "a", "Neg"))
    total = [
        node("Conv", ["x", "w"], ["a"]),
        node("ReduceMax", ["x"], ["m"], keepdims=0),
        node("Greater", ["m", "t"], ["c"]),
        choice,
        *nodes,
    ]
    return models.make(total, {"x": IMAGE}, dict.fromkeys(outputs, IMAGE), conv_weight() | {"t": np.float32(3)})


@pytest.mark.parametrize("level", [0.1, 10.0])
def test_if_captures_outer_values(models: Models, level: float) -> None:
    trip = models.trip(_if_model(models, [], ["y"]), x=np.full((2, 4, 8, 8), level, np.float32))
    assert trip.opaque == ["If"]


def test_captured_value_that_is_also_an_output(models: Models) -> None:
    """The captured tensor gets the output's name after the If was emitted."""
    trip = models.trip(_if_model(models, [], ["a", "y"]))
    assert trip.opaque == ["If"]


def test_sequences_between_foreign_nodes(models: Models) -> None:
    nodes = [
        node("SplitToSequence", ["x", "s"], ["q"], axis=1),
        node("ConcatFromSequence", ["q"], ["y"], axis=2),
    ]
    trip = models.trip(models.make(nodes, {"x": IMAGE}, ["y"], {"s": np.array(2)}))
    assert trip.opaque == ["SplitToSequence", "ConcatFromSequence"]


def test_opaque_leaf_survives_deepcopy(models: Models) -> None:
    module = import_model(models.make([node("DFT", ["x"], ["y"], axis=2)], {"x": ["N", 4, 8, 1]}, ["y"]))
    x = torch.randn(2, 4, 8, 1)
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_opaque_leaf_names_its_node_when_it_fails(models: Models) -> None:
    model = models.make([node("DFT", ["x"], ["y"], axis=2)], {"x": ["N", 4, 8, 1]}, ["y"])
    model.graph.node[0].name = "pooling"
    module = import_model(model)
    with pytest.raises(HantcError, match=r"pooling: .*DFT"):
        module(torch.randn(2))


def test_opaque_leaf_describes_itself() -> None:
    leaf = Opaque(node("Mish", ["x"], ["y"]), ("x",), {}, {"": 18}, "no leaf for Mish")
    assert "Mish: no leaf for Mish" in repr(leaf)


def test_strings_as_inputs(models: Models) -> None:
    model = models.make(
        [node("StringConcat", ["x", "z"], ["y"])], {"x": ["N"], "z": ["N"]}, ["y"], opset=20, dtype=TensorProto.STRING
    )
    module = import_model(model)
    words = np.array(["a", "b"], object)
    assert list(module(words, words)) == ["aa", "bb"]
    assert emit(module).model.graph.node[0].op_type == "StringConcat"
