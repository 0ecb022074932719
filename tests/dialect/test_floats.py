"""The mark that says what floats are computed in."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from hantc.dialect.floats import KEY, floats_of, in_bf16, unmarked


def small() -> onnx.ModelProto:
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 2]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_a_mark_is_read_back_and_changes_nothing_else() -> None:
    model = small()
    model.metadata_props.append(onnx.StringStringEntryProto(key="author", value="somebody"))
    before = model.SerializeToString()
    made = in_bf16(model)
    assert (floats_of(model), floats_of(made)) == ("fp32", "bf16")
    assert model.SerializeToString() == before
    assert {p.key: p.value for p in made.metadata_props} == {"author": "somebody", KEY: "bf16"}
    onnx.checker.check_model(made)
    del made.metadata_props[:], model.metadata_props[:]
    assert made == model


def test_a_student_as_the_next_teacher_is_not_marked() -> None:
    model = small()
    assert unmarked(model) is model
    marked = in_bf16(model)
    assert unmarked(marked) == model
    assert floats_of(marked) == "bf16"


def test_a_mark_is_set_once_and_other_values_are_no_mark() -> None:
    model = small()
    model.metadata_props.append(onnx.StringStringEntryProto(key=KEY, value="fp8"))
    assert floats_of(model) == "fp32"
    twice = in_bf16(in_bf16(model))
    assert [p.value for p in twice.metadata_props if p.key == KEY] == ["bf16"]
    assert floats_of(onnx.load_from_string(twice.SerializeToString())) == "bf16"
