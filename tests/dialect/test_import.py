"""What surrounds the operators: names, foreign nodes, constants, several inputs and outputs, other dtypes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper

from hantc.core.errors import HantcError, ModelError, UnsupportedError
from hantc.dialect.activation import Softmax
from hantc.dialect.conv import Conv
from hantc.dialect.emitter import emit
from hantc.dialect.graph import cut, leaf_of, node_named, shapes_of, trace
from hantc.dialect.importer import import_model, only_tensors
from hantc.dialect.norm import BatchNorm

if TYPE_CHECKING:
    from tests.dialect.conftest import Dims, Models

IMAGE: Dims = ("N", 4, 8, 8)


def node(op: str, inputs: list[str], outputs: list[str], **attrs: Any) -> NodeProto:
    return helper.make_node(op, inputs, outputs, **attrs)


def conv_weight() -> dict[str, Any]:
    return {"w": (np.random.default_rng(1).standard_normal((4, 4, 1, 1)) * 0.5).astype(np.float32)}


# --- inputs, outputs, constants, names


def test_constant_as_output(models: Models) -> None:
    nodes = [node("Conv", ["x", "w"], ["y"]), node("Identity", ["w"], ["anchors"])]
    models.trip(models.make(nodes, {"x": IMAGE}, {"y": IMAGE, "anchors": [4, 4, 1, 1]}, conv_weight()))


def test_input_passed_to_output(models: Models) -> None:
    nodes = [node("Identity", ["x"], ["same"]), node("Relu", ["x"], ["y"])]
    models.trip(models.make(nodes, {"x": IMAGE}, {"y": IMAGE, "same": IMAGE}))


def test_one_value_under_two_output_names(models: Models) -> None:
    nodes = [node("Relu", ["x"], ["y"]), node("Identity", ["y"], ["again"])]
    models.trip(models.make(nodes, {"x": IMAGE}, {"y": IMAGE, "again": IMAGE}))


def test_output_used_inside_too(models: Models) -> None:
    nodes = [node("Relu", ["x"], ["y"]), node("Exp", ["y"], ["z"])]
    models.trip(models.make(nodes, {"x": IMAGE}, {"z": IMAGE, "y": IMAGE}))


def test_two_inputs_two_outputs_keep_their_order(models: Models) -> None:
    nodes = [node("Sub", ["b", "a"], ["second"]), node("Mul", ["a", "b"], ["first"])]
    trip = models.trip(models.make(nodes, {"b": IMAGE, "a": IMAGE}, {"second": IMAGE, "first": IMAGE}))
    assert [i.name for i in trip.emitted.graph.input] == ["b", "a"]


def test_unused_input_stays(models: Models) -> None:
    trip = models.trip(models.make([node("Relu", ["x"], ["y"])], {"x": IMAGE, "mask": [1]}, {"y": IMAGE}))
    assert [i.name for i in trip.emitted.graph.input] == ["x", "mask"]


@pytest.mark.parametrize(
    "names", [("input.1", "input_1"), ("0", "1"), ("class", "a:b"), ("é", "-"), ("self", "conv_0")]
)
def test_odd_input_names(models: Models, names: tuple[str, str]) -> None:
    a, b = names
    nodes = [node("Conv", [a, "w"], ["c"]), node("Sub", ["c", b], ["out/y:0"])]
    models.trip(models.make(nodes, {a: IMAGE, b: IMAGE}, {"out/y:0": IMAGE}, conv_weight()))


def test_inner_names_never_collide_with_outputs(models: Models) -> None:
    """Emitted names look like `relu_0:Relu`; a model that was emitted before has such names already."""
    nodes = [node("Relu", ["x"], ["relu_0:Relu"]), node("Exp", ["relu_0:Relu"], ["relu_0:Exp"])]
    trip = models.trip(models.make(nodes, {"x": IMAGE}, {"relu_0:Exp": IMAGE}))
    models.trip(trip.emitted)


def test_weights_listed_as_inputs(models: Models) -> None:
    """Before IR 4 every initialiser had to be an input too."""
    model = models.make(
        [node("Conv", ["x", "w"], ["y"])], {"x": IMAGE, "w": [4, 4, 1, 1]}, {"y": IMAGE}, conv_weight(), opset=7
    )
    model.ir_version = 3
    trip = models.trip(model)
    assert trip.opaque == [] and [i.name for i in trip.emitted.graph.input] == ["x"]


@pytest.mark.parametrize("dims", [["N", 4, 8, 8], [None, 4, 8, 8], ["b", 4, "h", "w"], [3, 4, 8, 8]])
def test_declared_sizes_survive(models: Models, dims: list[Any]) -> None:
    models.trip(models.make([node("Relu", ["x"], ["y"])], {"x": dims}, {"y": dims}))


def test_output_without_a_shape_gets_the_inferred_one(models: Models) -> None:
    model = models.make([node("GlobalAveragePool", ["x"], ["y"])], {"x": IMAGE}, ["y"])
    assert import_model(model).meta["info"].outputs[0].shape == ("N", 4, 1, 1)


def test_output_of_unknown_rank_stays_undeclared(models: Models) -> None:
    nodes = [node("Inverse", ["x"], ["y"], domain="com.microsoft")]
    model = models.make(nodes, {"x": ["N", 3, 3]}, ["y"], domains={"com.microsoft": 1})
    trip = models.trip(model)
    assert not trip.emitted.graph.output[0].type.tensor_type.HasField("shape")


def test_fp16(models: Models) -> None:
    half = {k: v.astype(np.float16) for k, v in conv_weight().items()}
    bound = {"low": np.float16(-1), "high": np.float16(1), "p": np.array([0, 0, 1, 1, 0, 0, 0, 0])}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Clip", ["a", "low", "high"], ["b"]),
        node("Pad", ["b", "p"], ["c"]),
        node("GlobalAveragePool", ["c"], ["y"]),
    ]
    trip = models.trip(models.make(nodes, {"x": IMAGE}, ["y"], half | bound, dtype=TensorProto.FLOAT16), tolerance=5e-3)
    assert trip.opaque == [] and {p.dtype for p in trip.module.parameters()} == {torch.float16}


def test_integers_stay_integers(models: Models) -> None:
    nodes = [
        node("Clip", ["x", "low", "high"], ["a"]),
        node("Div", ["a", "two"], ["b"]),
        node("Pad", ["b", "p", "one"], ["y"]),
    ]
    constants = {
        "low": np.int64(-3),
        "high": np.int64(3),
        "two": np.int64(2),
        "p": np.array([0, 1, 0, 1]),
        "one": np.int64(1),
    }
    trip = models.trip(models.make(nodes, {"x": ["N", 6]}, ["y"], constants, dtype=TensorProto.INT64))
    assert trip.opaque == []


def test_double(models: Models) -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Clip", ["a", "low"], ["y"])]
    constants: dict[str, Any] = {"w": models.weight(8, 8, dtype=np.float64), "low": np.float64(0)}
    model = models.make(nodes, {"x": IMAGE}, {"y": IMAGE}, constants, dtype=TensorProto.DOUBLE)
    models.trip(model, tolerance=1e-10)


# --- graph structure


def test_dead_nodes_go(models: Models) -> None:
    nodes = [node("Relu", ["x"], ["y"]), node("Einsum", ["x"], ["dead"], equation="nchw->n")]
    assert models.trip(models.make(nodes, {"x": IMAGE}, {"y": IMAGE})).ops == ["Relu"]


def test_unused_side_outputs_do_not_matter(models: Models) -> None:
    nodes = [
        node("MaxPool", ["x"], ["a", "indices"], kernel_shape=[2, 2]),
        node("Dropout", ["a"], ["y", "mask"]),
    ]
    assert models.trip(models.make(nodes, {"x": IMAGE}, ["y"], opset=11)).ops == ["MaxPool"]


def test_used_indices_of_max_pool(models: Models) -> None:
    nodes = [
        node("MaxPool", ["x"], ["a", "i"], kernel_shape=[2, 2]),
        node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        node("Add", ["a", "f"], ["y"]),
    ]
    assert models.trip(models.make(nodes, {"x": IMAGE}, ["y"])).opaque == []


def test_unsorted_nodes(models: Models) -> None:
    model = models.make([node("Relu", ["x"], ["a"]), node("Exp", ["a"], ["y"])], {"x": IMAGE}, {"y": IMAGE})
    swapped = onnx.ModelProto()
    swapped.CopyFrom(model)
    swapped.graph.node[0].CopyFrom(model.graph.node[1])
    swapped.graph.node[1].CopyFrom(model.graph.node[0])
    assert [n.op_type for n in emit(import_model(swapped)).model.graph.node] == ["Relu", "Exp"]


def test_constants_are_folded(models: Models) -> None:
    nodes = [
        node("Neg", ["c"], ["d"]),
        node("Sqrt", ["s"], ["e"]),
        node("Mul", ["d", "e"], ["f"]),
        node("Mul", ["x", "f"], ["y"]),
    ]
    constants = {"c": np.array([2], np.float32), "s": np.array([4], np.float32)}
    assert models.trip(models.make(nodes, {"x": IMAGE}, {"y": IMAGE}, constants)).ops == ["Mul"]


def test_local_functions_are_inlined(models: Models) -> None:
    body = [node("Sigmoid", ["v"], ["s"]), node("Mul", ["v", "s"], ["r"])]
    swish = helper.make_function("local", "Swish", ["v"], ["r"], body, [helper.make_opsetid("", 17)])
    nodes = [node("Swish", ["x"], ["a"], domain="local"), node("Swish", ["a"], ["y"], domain="local")]
    model = models.make(nodes, {"x": IMAGE}, {"y": IMAGE}, domains={"local": 1}, functions=[swish])
    trip = models.trip(model)
    assert trip.opaque == [] and trip.ops == ["Sigmoid", "Mul"] * 2


def test_every_node_is_accounted_for(models: Models) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Relu", ["a"], ["y"])]
    emitted = emit(import_model(models.make(nodes, {"x": IMAGE}, {"y": IMAGE}, conv_weight())))
    assert sorted(n for names in emitted.nodes.values() for n in names) == sorted(
        n.name for n in emitted.model.graph.node
    )
    assert emitted.nodes["conv_0"] == ("conv_0/Conv",)


def test_emitting_what_is_no_leaf(models: Models) -> None:
    module = import_model(models.make([node("Relu", ["x"], ["y"])], {"x": IMAGE}, {"y": IMAGE}))
    module.relu_0 = torch.nn.ReLU()
    with pytest.raises(HantcError, match=r"relu_0: module relu_0 \(ReLU\) is no leaf"):
        emit(module)


# --- softmax before opset 13, static batches, graphs cut out


def test_old_softmax_over_several_dims(models: Models) -> None:
    trip = models.trip(models.make([node("Softmax", ["x"], ["y"], axis=2)], {"x": IMAGE}, {"y": IMAGE}, opset=11))
    assert trip.opaque == []


def test_softmax_over_channels_cannot_be_written_before_opset_13() -> None:
    module = trace(torch.nn.Sequential(Softmax(1)), (4, 8, 8), (4, 8, 8))
    assert emit(module).model.graph.node[0].attribute[0].i == 1
    module.meta["info"] = replace(module.meta["info"], opset=11)
    with pytest.raises(UnsupportedError, match="needs opset 13"):
        emit(module)


def test_old_softmax_becomes_native_once_shapes_are_known(models: Models) -> None:
    """ONNX's inference knows nothing of com.microsoft's op; running the graph does."""
    nodes = [
        node("Trilu", ["x"], ["a"], domain="com.microsoft"),
        node("Softmax", ["a"], ["b"], axis=3),
        node("Conv", ["b", "w"], ["c"], auto_pad="SAME_UPPER"),
        node("Trilu", ["c"], ["y"], domain="com.microsoft"),
    ]
    model = models.make(nodes, {"x": IMAGE}, ["y"], conv_weight(), opset=11, domains={"com.microsoft": 1})
    trip = models.trip(model)
    assert trip.opaque == ["Trilu", "Trilu"]
    assert isinstance(leaf_of(trip.module, node_named(trip.module, "softmax_0")), Softmax)


def test_static_batch_of_one_runs_at_four(models: Models) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("GlobalAveragePool", ["a"], ["b"]),
        node("Reshape", ["b", "s"], ["c"]),
        node("Gemm", ["c", "g", "k"], ["y"]),
    ]
    constants = conv_weight() | {"s": np.array([1, 4]), "g": models.weight(4, 3), "k": models.weight(3)}
    trip = models.trip(models.make(nodes, {"x": [1, 4, 8, 8]}, {"y": [1, 3]}, constants))
    x = torch.randn(4, 4, 8, 8)
    each = torch.cat([trip.module(x[i : i + 1]) for i in range(4)])
    assert torch.allclose(trip.module(x), each, rtol=1e-4, atol=1e-6)


def test_a_region_cut_out_can_be_emitted(models: Models) -> None:
    nodes = [node("Relu", ["x"], ["a"]), node("Conv", ["a", "w"], ["b"]), node("Exp", ["b"], ["y"])]
    module = import_model(models.make(nodes, {"x": IMAGE}, {"y": IMAGE}, conv_weight(), opset=9))
    region = cut(module, "relu_0", "conv_0", (4, 8, 8), (4, 8, 8))
    emitted = emit(region).model
    assert [n.op_type for n in emitted.graph.node] == ["Conv"] and emitted.opset_import[0].version == 13
    assert shapes_of(region, [torch.zeros(3, 4, 8, 8)])["conv_0"] == (3, 4, 8, 8)


def test_candidates_are_traced_and_emitted() -> None:
    module = torch.nn.Sequential(Conv(3, 8, 3, 2), BatchNorm(8)).eval()
    emitted = emit(trace(module, (3, 8, 8), (8, 4, 4))).model
    assert [n.op_type for n in emitted.graph.node] == ["Conv", "BatchNormalization"]
    with pytest.raises(HantcError, match="dialect leaves"):
        trace(torch.nn.Sequential(Conv(3, 8), torch.nn.ReLU()))


# --- broken graphs


def test_missing_initialiser(models: Models) -> None:
    model = models.make([node("Conv", ["x", "w"], ["y"])], {"x": IMAGE}, {"y": IMAGE})
    with pytest.raises(ModelError, match=r"net\.onnx: tensor 'w' is used but never made") as caught:
        import_model(model, where="net.onnx")
    assert caught.value.hint


def test_output_that_nothing_makes(models: Models) -> None:
    with pytest.raises(ModelError, match="'z' is used but never made"):
        import_model(models.make([node("Relu", ["x"], ["y"])], {"x": IMAGE}, {"z": IMAGE}))


def test_weight_of_the_wrong_length(models: Models) -> None:
    model = models.make([node("Conv", ["x", "w"], ["y"])], {"x": IMAGE}, {"y": IMAGE}, conv_weight())
    model.graph.initializer[0].raw_data = b"123"
    with pytest.raises(ModelError, match=r"net\.onnx: weight 'w' cannot be read"):
        import_model(model, where="net.onnx")


def test_negative_size(models: Models) -> None:
    with pytest.raises(ModelError, match="negative size"):
        import_model(models.make([node("Relu", ["x"], ["y"])], {"x": [-2, 3]}, ["y"]))


def test_sequence_output(models: Models) -> None:
    model = models.make([node("SplitToSequence", ["x"], ["q"], axis=1)], {"x": IMAGE}, ["q"])
    model.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("q", TensorProto.FLOAT, None))
    module = import_model(model)
    assert [p.shape for p in module(torch.randn(2, 4, 8, 8))] == [(2, 1, 8, 8)] * 4
    assert emit(module).model.graph.output[0].type == model.graph.output[0].type
    with pytest.raises(ModelError, match="'q' is a sequence_type, not a tensor"):
        only_tensors(module.meta["info"])


def test_cycle(models: Models) -> None:
    nodes = [node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"])]
    with pytest.raises(ModelError, match="never made"):
        import_model(models.make(nodes, {"x": IMAGE}, {"b": IMAGE}))


@pytest.mark.parametrize("opset", [13, 17])
def test_constants_without_a_type_are_float32(models: Models, opset: int) -> None:
    """graphsurgeon takes them for doubles, which no Resize takes, and which would make a sum one."""
    node = helper.make_node
    nodes = [
        node("Constant", [], ["scales"], value_floats=[1.0, 1.0, 2.0, 2.0]),
        node("Constant", [], ["half"], value_float=0.5),
        node("Resize", ["x", "", "scales"], ["a"], mode="nearest"),
        node("Add", ["a", "half"], ["y"]),
    ]
    trip = models.trip(models.make(nodes, {"x": ["N", 2, 3, 3]}, ["y"], opset=opset))
    assert all(b.dtype == torch.float32 for b in trip.module.buffers() if b.is_floating_point())
