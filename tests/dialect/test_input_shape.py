"""Open sizes of inputs: told, and fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from hantc.core.config import parse_shapes
from hantc.core.errors import UsageError
from hantc.dialect.importer import import_model
from hantc.dialect.input_shape import fix_inputs
from hantc.inputs import make_config


def model(*inputs: tuple[str, list[Any]]) -> onnx.ModelProto:
    """The sum over each input, added up; (N, 1)."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, dims) for n, dims in inputs]
    nodes = []
    for n, dims in inputs:
        nodes.append(helper.make_node("Relu", [n], [f"{n}_r"]))
        axes = list(range(1, len(dims)))
        nodes.append(helper.make_node("ReduceMean", [f"{n}_r"], [f"{n}_s"], axes=axes, keepdims=0))
    nodes.append(helper.make_node("Sum", [f"{n}_s" for n, _ in inputs], ["y"]))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])
    made = helper.make_model(
        helper.make_graph(nodes, "g", values, [y]), opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    )
    made.graph.value_info.append(helper.make_tensor_value_info("x_r", TensorProto.FLOAT, ["N", 3, "h", "w"]))
    return made


def dims(made: onnx.ModelProto, i: int = 0) -> list[Any]:
    return [d.dim_value or d.dim_param for d in made.graph.input[i].type.tensor_type.shape.dim]


@pytest.mark.parametrize("open_", [["N", 3, "h", "w"], ["N", 3, None, None], [None, None, "s", "s"]])
def test_sizes_are_fixed_and_the_batch_stays_open(open_: list[Any]) -> None:
    before = model(("x", open_))
    kept = before.SerializeToString()
    made = fix_inputs(before, {"": (3, 20, 24)})
    assert dims(made)[1:] == [3, 20, 24] and not made.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")
    assert not made.graph.value_info and before.SerializeToString() == kept
    assert import_model(made).meta["info"].inputs[0].shape[1:] == (3, 20, 24)


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_of_nothing_are_open(size: int) -> None:
    made = model(("x", ["N", 3, size, size]))
    with pytest.raises(UsageError, match=r"is open: N x 3 x \? x \?"):
        fix_inputs(made, {})
    assert dims(fix_inputs(made, {"": (3, 8, 8)})) == ["N", 3, 8, 8]


def test_one_input_has_one_shape() -> None:
    with pytest.raises(UsageError, match="two shapes"):
        fix_inputs(model(("x", ["N", 3, "h", "w"])), {"": (3, 8, 8), "x": (3, 8, 8)})
    with pytest.raises(UsageError, match="two shapes"):
        parse_shapes(["3x8x8", "3x4x4"])


def test_the_api_takes_numbers(tmp_path: Path) -> None:
    given = {"out": tmp_path / "out", "store": tmp_path / "store"}
    for shape in ((3, 24, 24), "3x24x24", ["3x24x24"], {"": (3, 24, 24)}):
        assert make_config("m.onnx", input_shape=shape, **given).input_shape == {"": (3, 24, 24)}


def test_fixed_models_need_nothing() -> None:
    fixed = model(("x", ["N", 3, 8, 8]))
    assert fix_inputs(fixed, {}) is fixed
    assert dims(fix_inputs(fixed, {"x": (3, 8, 8)})) == ["N", 3, 8, 8]


def test_several_inputs_go_by_name() -> None:
    made = fix_inputs(model(("x", ["N", 3, "h", "w"]), ("z", ["N", "k"])), {"z": (7,), "x": (3, 8, 8)})
    assert (dims(made), dims(made, 1)) == (["N", 3, 8, 8], ["N", 7])


@pytest.mark.parametrize(
    ("shapes", "message", "hint"),
    [
        ({}, "'x' is open: N x 3 x h x w", "--input-shape x=3x224x224"),
        ({"x": (3, 8, 8)}, "'z' is open: N x k", "z=224"),
        ({"": (3, 8, 8)}, "2 inputs: x, z", "NAME="),
        ({"y": (3, 8, 8)}, "no input 'y'", "NAME="),
        ({"x": (1, 3, 8, 8)}, "1x3x8x8 does not fit", "leave the batch out"),
        ({"x": (1, 8, 8)}, "1x8x8 does not fit", "stay as they are"),
    ],
)
def test_what_does_not_fit_is_told(shapes: dict[str, tuple[int, ...]], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        fix_inputs(model(("x", ["N", 3, "h", "w"]), ("z", ["N", "k"])), shapes)
    assert hint in str(error.value.hint) or hint in str(error.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3x224x224", {"": (3, 224, 224)}),
        (["a=1X28x28", "b=10"], {"a": (1, 28, 28), "b": (10,)}),
        ((), {}),
    ],
)
def test_shapes_are_read(text: Any, found: dict[str, tuple[int, ...]]) -> None:
    assert parse_shapes(text) == found


@pytest.mark.parametrize("text", ["", "3x", "x3", "3x-1", "3x0x2", "a=", "3,224,224", "3x1e9", "9" * 12])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a shape"):
        parse_shapes(text)
