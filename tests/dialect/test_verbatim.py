"""Nodes computed by torch functions: gradients, weights, copies, and what happens where torch gives up."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from hantc.core.errors import HantcError
from hantc.dialect.emitter import emit, opaque_leaves
from hantc.dialect.importer import import_model
from hantc.dialect.verbatim import Verbatim

if TYPE_CHECKING:
    from tests.dialect.conftest import Models

IMAGE: list[int | str | None] = ["N", 4, 8, 8]
node = helper.make_node


def _norm(models: Models) -> torch.fx.GraphModule:
    constants = {"s": models.weight(4), "b": models.weight(4)}
    return import_model(
        models.make([node("InstanceNormalization", ["x", "s", "b"], ["y"])], {"x": IMAGE}, ["y"], constants)
    )


def test_weights_are_trained_and_emitted_as_they_have_become(models: Models) -> None:
    module = _norm(models)
    assert [tuple(p.shape) for p in module.parameters()] == [(4,), (4,)]
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad is not None and all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    again = import_model(emit(module).model)
    assert torch.allclose(again(x), module(x), atol=1e-6)


def test_a_copy_has_weights_of_its_own(models: Models) -> None:
    module = _norm(models)
    copied = copy.deepcopy(module)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(copied(x), module(x))
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert not torch.equal(copied(x), module(x))


def test_state_dict_carries_the_weights(models: Models) -> None:
    module, other = _norm(models), _norm(models)
    assert len(module.state_dict()) == 2
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize(
    ("op", "attrs", "rest"),
    [
        ("Conv", {"pads": [1, 1, 1, 1], "strides": [2, 2]}, {"w": [5, 4, 3, 3], "b": [5]}),
        ("ConvTranspose", {"strides": [2, 2], "output_padding": [1, 1]}, {"w": [4, 3, 3, 3]}),
        ("PRelu", {}, {"w": [4, 1, 1]}),
        ("LayerNormalization", {"axis": -1}, {"w": [8], "b": [8]}),
    ],
)
def test_computed_weights_get_gradients(
    models: Models, op: str, attrs: dict[str, Any], rest: dict[str, list[int | str | None]]
) -> None:
    model = models.make([node(op, ["x", *rest], ["y"], **attrs)], {"x": [2, 4, 8, 8], **rest}, ["y"])
    trip = models.trip(model)
    assert trip.opaque == []
    shapes = cast("list[list[int]]", [[2, 4, 8, 8], *rest.values()])
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    trip.module(*given).square().sum().backward()
    assert all(g.grad is not None and g.grad.abs().sum() > 0 for g in given)


def test_where_torch_lacks_the_type_onnxruntime_steps_in(models: Models) -> None:
    """Comparing strings."""
    nodes = [node("Cast", ["x"], ["a"], to=TensorProto.STRING), node("Equal", ["a", "a"], ["y"])]
    model = models.make(nodes, {"x": ["N", 4]}, ["y"], out_dtype=TensorProto.BOOL, opset=19)
    module = import_model(model)
    assert bool(module(torch.ones(2, 4)).all())
    assert [leaf.proto.op_type for _, leaf in opaque_leaves(module)] == ["Cast", "Equal"]
    assert "torch cannot compute it" in opaque_leaves(module)[1][1].reason


def test_an_input_at_fault_changes_nothing(models: Models) -> None:
    model = models.make([node("Reshape", ["x", "s"], ["y"])], {"x": ["N", 4, 8, 8]}, ["y"])
    model.graph.input.append(helper.make_tensor_value_info("s", TensorProto.INT64, [2]))
    module = import_model(model)
    x = torch.randn(2, 4, 8, 8)
    with pytest.raises(HantcError, match="Reshape"):
        module(x, torch.tensor([5, 5]))
    assert module(x, torch.tensor([2, -1])).shape == (2, 256)
    assert opaque_leaves(module) == []


def test_part_of_a_shape_is_not_taken_for_the_whole(models: Models) -> None:
    """Shape(start, end), which torch's exporter writes; graphsurgeon folds it as if it were whole."""
    nodes = [
        node("Shape", ["x"], ["n"], start=0, end=1),
        node("Concat", ["n", "rest"], ["s"], axis=0),
        node("Reshape", ["x", "s"], ["y"]),
    ]
    model = models.make(nodes, {"x": [2, 4, 8, 8]}, ["y"], {"rest": np.array([-1])}, opset=15)
    assert models.trip(model).ops == ["Reshape"]


def test_a_size_that_values_decide_is_no_constant(models: Models) -> None:
    nodes = [
        node("Slice", ["x", "zero", "k"], ["a"]),
        node("Shape", ["a"], ["n"]),
        node("Cast", ["n"], ["y"], to=TensorProto.FLOAT),
    ]
    model = models.make(nodes, {"x": [6]}, ["y"], {"zero": np.array([0])})
    model.graph.input.append(helper.make_tensor_value_info("k", TensorProto.INT64, [1]))
    module = import_model(model)
    assert [float(module(torch.zeros(6), torch.tensor([k]))) for k in (2, 5)] == [2.0, 5.0]


def test_bfloat16_in_and_out(models: Models) -> None:
    model = models.make([node("Relu", ["x"], ["y"])], {"x": [4]}, ["y"], dtype=TensorProto.BFLOAT16)
    x = torch.tensor([-1.0, 0.5, 2.0, -3.0], dtype=torch.bfloat16)
    assert torch.equal(import_model(model)(x), x.relu())


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("ReduceL2", {"keepdims": 1}),
        ("LpPool", {"kernel_shape": [2, 2]}),
        ("GlobalLpPool", {}),
        ("MeanVarianceNormalization", {}),
        ("LpNormalization", {"axis": 1}),
        ("LRN", {"size": 3}),
    ],
)
def test_gradients_at_zero_are_numbers(models: Models, op: str, attrs: dict[str, Any]) -> None:
    """A dead channel must not end a training."""
    module = import_model(models.make([node(op, ["x"], ["y"], **attrs)], {"x": IMAGE}, ["y"]))
    x = torch.zeros(2, 4, 8, 8, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_attention_that_sees_nothing_has_gradients(models: Models) -> None:
    inputs: dict[str, list[int | str | None]] = {k: [1, 2, 3, 4] for k in "qkv"}
    mask = np.array([[False] * 3, [True] * 3, [True] * 3])
    model = models.make([node("Attention", [*"qkv", "m"], ["y"])], inputs, ["y"], {"m": mask}, opset=23)
    given = [torch.randn(1, 2, 3, 4, requires_grad=True) for _ in inputs]
    out = import_model(model)(*given)
    assert float(out[:, :, 0].detach().abs().sum()) == 0
    out.square().sum().backward()
    assert all(g.grad is not None and bool(torch.isfinite(g.grad).all()) for g in given)


def test_onnxruntime_takes_the_weights_as_they_are_now(models: Models) -> None:
    """stash_type 10 is not computed in torch."""
    constants = {"s": models.weight(4), "b": models.weight(4)}
    nodes = [node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=2, stash_type=10)]
    module = import_model(models.make(nodes, {"x": IMAGE}, ["y"], constants, opset=21))
    x = torch.randn(2, 4, 8, 8)
    before = module(x)
    assert opaque_leaves(module)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(3.0)
    assert torch.allclose(module(x), 3 * before, atol=1e-4)
    assert torch.allclose(import_model(emit(module).model)(x), module(x), atol=1e-4)


def test_a_convolution_of_unknown_size_keeps_its_weights(models: Models) -> None:
    nodes = [node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])]
    model = models.make(nodes, {"x": ["N", 3, "H", "W"]}, ["y"], {"w": models.weight(4, 3, 3, 3)})
    module = import_model(model)
    assert [tuple(p.shape) for p in module.parameters()] == [(4, 3, 3, 3)]
    module(torch.randn(1, 3, 7, 8)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("scale", [0.7, 1.3])
@pytest.mark.parametrize("mode", ["linear", "cubic", "nearest"])
@pytest.mark.parametrize("how", ["align_corners", "half_pixel", "pytorch_half_pixel", "asymmetric"])
def test_resize_by_uneven_scales(models: Models, how: str, mode: str, scale: float) -> None:
    """The output's size is rounded, and coordinates follow the rounded one, as torch's exporter means it."""
    nodes = [node("Resize", ["x", "", "s"], ["y"], mode=mode, coordinate_transformation_mode=how)]
    constants = {"s": np.array([1, 1, scale, scale], np.float32)}
    assert models.trip(models.make(nodes, {"x": ["N", 2, 7, 5]}, ["y"], constants, opset=18)).opaque == []


def test_padding_of_old_opsets(models: Models) -> None:
    nodes = [node("Pad", ["x"], ["y"], mode="reflect", pads=[0, 1, 1, 1, 0, 1, 1, 1])]
    assert models.trip(models.make(nodes, {"x": IMAGE}, ["y"], opset=9)).opaque == []


def test_strings_survive(models: Models) -> None:
    nodes = [node("Cast", ["x"], ["a"], to=TensorProto.STRING), node("Equal", ["a", "word"], ["y"])]
    constants = {"word": np.array(["1"], object)}
    model = models.make(nodes, {"x": ["N", 4]}, ["y"], constants, out_dtype=TensorProto.BOOL, opset=19)
    emitted = emit(import_model(model)).model
    assert bool(import_model(emitted)(torch.ones(2, 4)).all())


@pytest.mark.parametrize(("start", "end"), [(-100, -200), (5, -200), (-1, -9), (100, 0)])
def test_slices_backwards(models: Models, start: int, end: int) -> None:
    constants = {"s": np.array([start]), "e": np.array([end]), "a": np.array([2]), "t": np.array([-1])}
    assert models.trip(models.make([node("Slice", ["x", *"seat"], ["y"])], {"x": IMAGE}, ["y"], constants)).ops


def test_verbatim_describes_itself(models: Models) -> None:
    leaf = next(m for m in _norm(models).modules() if isinstance(m, Verbatim))
    assert "InstanceNormalization" in repr(leaf)
