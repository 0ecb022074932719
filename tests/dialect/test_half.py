"""FP16 files: near the float32 ones, float32 at the ends, and float32 inside where FP16 would overflow."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hantc.core.errors import ModelError
from hantc.dialect.half import LARGEST, overflowing, to_fp16

RNG = np.random.default_rng(0)


def net(scale: float = 1.0) -> onnx.ModelProto:
    """Conv (times `scale`), Relu, a second Conv that divides by it again, pool, Softmax."""
    first = (RNG.standard_normal((8, 3, 3, 3)) * 0.3 * scale).astype(np.float32)
    second = (RNG.standard_normal((5, 8, 1, 1)) / scale).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="second"),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Softmax", ["f"], ["y"], axis=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])
    weights = [numpy_helper.from_array(first, "w1"), numpy_helper.from_array(second, "w2")]
    graph = helper.make_graph(nodes, "net", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def types(model: onnx.ModelProto) -> Counter[int]:
    """Data types of the weights."""
    return Counter(i.data_type for i in model.graph.initializer)


def test_all_weights_are_halved_and_the_ends_are_not() -> None:
    model = net()
    before = model.SerializeToString()
    half = to_fp16(model)
    assert model.SerializeToString() == before
    assert types(half) == {TensorProto.FLOAT16: 2}
    ends = [*half.graph.input, *half.graph.output]
    assert [e.type.tensor_type.elem_type for e in ends] == [TensorProto.FLOAT] * 2
    assert [e.name for e in ends] == ["x", "y"]
    x = RNG.standard_normal((4, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(run(half, x), run(model, x), atol=2e-3)


def test_what_overflows_is_found_and_kept() -> None:
    model = net(scale=1e5)
    x = RNG.standard_normal((4, 3, 8, 8)).astype(np.float32)
    # onnxruntime has no FP16 convolution on x86 and takes its own in FP32: the reference really computes in FP16
    with np.errstate(all="ignore"):
        (wrong,) = ReferenceEvaluator(to_fp16(model)).run(None, {"x": x})
    assert np.abs(np.nan_to_num(wrong) - run(model, x)).max() > 0.1, "or this test shows nothing"
    found = overflowing(model, [{"x": x}])
    assert set(found) == {"Conv_0", "Relu_1", "second"}
    kept = to_fp16(model, keep=found)
    assert types(kept) == {TensorProto.FLOAT: 2}
    np.testing.assert_allclose(run(kept, x), run(model, x), atol=2e-3)


def test_several_kept_nodes_may_read_one_value() -> None:
    model = net()
    model.graph.node.insert(3, helper.make_node("Add", ["c", "c"], ["d"], name="twice"))
    model.graph.node.insert(4, helper.make_node("Mul", ["c", "d"], ["e"], name="squared"))
    model.graph.node[5].input[0] = "e"
    x = RNG.standard_normal((4, 3, 8, 8)).astype(np.float32)
    for keep in (("twice", "squared"), ("second", "twice", "squared"), ("squared",), ("second",)):
        np.testing.assert_allclose(run(to_fp16(model, keep=keep), x), run(model, x), atol=5e-3)


def small(nodes: list[onnx.NodeProto], *, opset: int = 17, constants: dict[str, Any] | None = None) -> onnx.ModelProto:
    """Nodes from "x", (N, 4), to "y", of the same shape."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])
    inits = [numpy_helper.from_array(np.asarray(v), name) for name, v in (constants or {}).items()]
    graph = helper.make_graph(nodes, "small", [x], [y], inits)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


ROWS = RNG.standard_normal((3, 4)).astype(np.float32)


def test_a_large_output_stays_float32_to_the_end() -> None:
    model = small([helper.make_node("Mul", ["x", "c"], ["y"], name="large")], constants={"c": np.float32(1e5)})
    assert overflowing(model, [{"x": ROWS}]) == ("large",)
    np.testing.assert_allclose(run(to_fp16(model, keep=["large"]), ROWS), 1e5 * ROWS, rtol=1e-6)


def test_infinities_are_no_overflow() -> None:
    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["mask"]),
        helper.make_node("Where", ["mask", "x", "least"], ["m"]),
        helper.make_node("Softmax", ["m"], ["y"], axis=1),
    ]
    model = small(nodes, constants={"zero": np.float32(-1e3), "least": np.float32(-np.inf)})
    assert overflowing(model, [{"x": ROWS}]) == ()
    np.testing.assert_allclose(run(to_fp16(model), ROWS), run(model, ROWS), atol=2e-3)


@pytest.mark.parametrize("form", ["value", "value_float"])
def test_constants_in_nodes(form: str) -> None:
    value: Any = {"value": numpy_helper.from_array(np.array(2.0, np.float32)), "value_float": 2.0}[form]
    nodes = [helper.make_node("Constant", [], ["c"], **{form: value}), helper.make_node("Mul", ["x", "c"], ["y"])]
    np.testing.assert_allclose(run(to_fp16(small(nodes)), ROWS), 2 * ROWS, atol=5e-3)


def test_operators_without_an_fp16_form_stay() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    model = small(nodes, constants={"s": np.float32(0.05), "z": np.uint8(128)})
    np.testing.assert_allclose(run(to_fp16(model), ROWS), run(model, ROWS), atol=2e-3)


def test_an_input_that_is_an_output_is_an_error() -> None:
    model = small([helper.make_node("Relu", ["x"], ["y"])])
    model.graph.output.append(model.graph.input[0])
    with pytest.raises(ModelError, match="FP16"):
        to_fp16(model)


def test_without_feeds_the_weights_are_looked_at() -> None:
    model = small([helper.make_node("Mul", ["x", "c"], ["y"], name="large")], constants={"c": np.float32(3e5)})
    assert overflowing(model, []) == ("large",)


def test_a_weight_alone_can_overflow() -> None:
    model = net()
    weight = numpy_helper.to_array(model.graph.initializer[1]).copy()
    weight[0, 0] = 2 * LARGEST
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight, "w2"))
    assert "second" in overflowing(model, [{"x": np.zeros((1, 3, 8, 8), np.float32)}])


def test_nothing_overflows_in_an_ordinary_network() -> None:
    assert overflowing(net(), [{"x": RNG.standard_normal((4, 3, 8, 8)).astype(np.float32)}]) == ()


def test_what_cannot_be_converted_is_an_error() -> None:
    broken = net()
    del broken.graph.node[0].input[:]
    with pytest.raises(ModelError, match="FP16"):
        to_fp16(broken)
