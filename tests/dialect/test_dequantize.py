"""Quantised models back in floats: the same function but for rounding, and what cannot be taken apart left alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from hantc.dialect.dequantize import dequantized, is_quantized

Array = np.ndarray[Any, Any]
SHAPE = (3, 8, 8)


def images(n: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((n, *SHAPE)).astype(np.float32)


def network(act: str = "Relu") -> ModelProto:
    """Convolutions, a depthwise one, a sum, a gate, a concatenation, poolings and a matrix product."""
    rng = np.random.default_rng(3)

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) * 0.3).astype(np.float32), name)

    def activate(x: str, y: str) -> list[onnx.NodeProto]:
        inputs = [x, "zero", "six"] if act == "Clip" else [x]
        return [helper.make_node(act, inputs, [y], name=y)]

    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1] * 4, name="c1"),
        *activate("c1", "r1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1] * 4, group=8, name="c2"),
        helper.make_node("Add", ["c2", "r1"], ["s"], name="s"),
        *activate("s", "r2"),
        helper.make_node("Sigmoid", ["r2"], ["g"], name="g"),
        helper.make_node("Mul", ["r2", "g"], ["m"], name="m"),
        helper.make_node("MaxPool", ["m"], ["p"], kernel_shape=[2, 2], strides=[2, 2], name="p"),
        helper.make_node("Concat", ["p", "p"], ["cat"], axis=1, name="cat"),
        helper.make_node("GlobalAveragePool", ["cat"], ["a"], name="a"),
        helper.make_node("Flatten", ["a"], ["f"], name="f"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], transB=1, name="y"),
    ]
    weights = [weight("w1", 8, 3, 3, 3), weight("b1", 8), weight("w2", 8, 1, 3, 3), weight("b2", 8)]
    weights += [weight("w3", 5, 16), weight("b3", 5)]
    weights += [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("zero", 0), ("six", 6))]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
    def __init__(self) -> None:
        self.left = iter([{"x": images(16, s)} for s in range(4)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.left, None)


def run(model: ModelProto, x: Array) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    out: Array = session.run(None, {"x": x})[0]
    return out


def error(wanted: Array, got: Array) -> float:
    return float(np.abs(wanted - got).max() / np.abs(wanted).max())


@pytest.mark.parametrize("act", ["Relu", "Clip", "LeakyRelu"])
@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
@pytest.mark.parametrize("kind", [QuantType.QUInt8, QuantType.QInt8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_static_quantisation(tmp_path: Path, act: str, form: Any, kind: Any, per_channel: bool) -> None:
    model = network(act)
    onnx.save(model, str(tmp_path / "m.onnx"))
    quantize_static(
        str(tmp_path / "m.onnx"),
        str(tmp_path / "q.onnx"),
        _Reader(),
        quant_format=form,
        activation_type=kind,
        per_channel=per_channel,
        weight_type=QuantType.QInt8,
    )
    given = onnx.load(str(tmp_path / "q.onnx"))
    assert is_quantized(given) and not is_quantized(model)
    before = given.SerializeToString()
    made = dequantized(given)
    assert made.reason == "" and given.SerializeToString() == before
    onnx.checker.check_model(made.model, full_check=True)
    found = Counter(n.op_type for n in made.model.graph.node)
    assert not any("Linear" in op or op.startswith("Q") for op in found)
    assert found["Conv"] == 2 and found["Gemm"] == 1
    if act == "Relu":  # the quantiser had left them to the ranges
        assert found["Relu"] == 2
    x = images(32, 77)
    wanted = run(model, x)
    assert error(wanted, run(made.model, x)) < 0.03
    assert error(wanted, run(made.model, x)) < 1.2 * error(wanted, run(given, x))
    assert len(made.ranges) >= 8 and all(scale > 0 for scale, _ in made.ranges.values())


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
@pytest.mark.parametrize("act", ["Relu", "LeakyRelu"])
def test_what_onnxruntime_made_of_it(tmp_path: Path, form: Any, act: str) -> None:
    """Saved after all its optimisations: QLinear operators, some of them with the channels last."""
    model = network(act)
    onnx.save(model, str(tmp_path / "m.onnx"))
    paths = [str(tmp_path / name) for name in ("m.onnx", "q.onnx", "o.onnx")]
    quantize_static(*paths[:2], _Reader(), quant_format=form, activation_type=QuantType.QUInt8)
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, paths[2]
    ort.InferenceSession(paths[1], options, providers=["CPUExecutionProvider"])
    given = onnx.load(paths[2])
    found = {n.op_type for n in given.graph.node}
    assert {"QLinearConv", "QLinearAdd"} <= found
    assert any(a.name == "channels_last" and a.i for n in given.graph.node for a in n.attribute)
    made = dequantized(given)
    assert made.reason == ""
    onnx.checker.check_model(made.model, full_check=True)
    found = {n.op_type for n in made.model.graph.node}
    assert not any("Linear" in op or op.startswith(("Q", "Nhwc")) for op in found)
    x = images(32, 77)
    wanted = run(model, x)
    assert error(wanted, run(made.model, x)) < 0.03
    assert error(wanted, run(made.model, x)) < 1.2 * error(wanted, run(given, x))


@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize("tail", ["", "ArgMax"])
def test_padding_and_places_of_quantised_values(tmp_path: Path, mode: str, tail: str) -> None:
    """What a segmenter has between and behind its convolutions, in ONNX Runtime's QOperator form."""
    rng = np.random.default_rng(0)
    weights = {"w1": rng.standard_normal((8, 3, 3, 3)) * 0.3, "w2": rng.standard_normal((5, 8, 3, 3)) * 0.3}
    values = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()]
    values += [numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "pads")]
    values += [numpy_helper.from_array(np.array(0.5, np.float32), "half")]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="c1"),
        helper.make_node("Pad", ["c1", "pads", *(["half"] if mode == "constant" else [])], ["p"], name="p", mode=mode),
        helper.make_node("Conv", ["p", "w2"], ["c2" if tail else "y"], name="c2"),
    ]
    if tail:
        nodes.append(helper.make_node("ArgMax", ["c2"], ["y"], name="places", axis=1))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPE])
    y = helper.make_tensor_value_info("y", TensorProto.INT64 if tail else TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(tmp_path / "m.onnx"))
    quantize_static(
        str(tmp_path / "m.onnx"), str(tmp_path / "q.onnx"), _Reader(), quant_format=QuantFormat.QOperator,
        activation_type=QuantType.QUInt8,
    )  # fmt: skip
    given = onnx.load(str(tmp_path / "q.onnx"))
    assert {"Pad", "QLinearConv"} <= {n.op_type for n in given.graph.node}
    made = dequantized(given)
    assert made.reason == "" and not any("Linear" in n.op_type for n in made.model.graph.node)
    images_ = images(16, 5)
    wanted, got = run(model, images_), run(made.model, images_)
    if tail:
        assert (wanted == got).mean() > 0.95
    else:
        assert error(wanted, got) < 0.03


def contrib(nodes: list[onnx.NodeProto], x: tuple[int, ...], constants: dict[str, Any]) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=9
    )


UNIT = {"s": np.float32(0.05), "z": np.uint8(128), "t": np.float32(0.05), "u": np.uint8(120)}
TO_INT = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
TO_FLOAT = helper.make_node("DequantizeLinear", ["r", "t", "u"], ["y"])


def _ms(op: str, inputs: str, output: str, **attrs: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], domain="com.microsoft", **attrs)


RNG = np.random.default_rng(5)
WEIGHT = {"w": RNG.integers(0, 255, (8, 24)).astype(np.uint8), "k": RNG.uniform(0.001, 0.01, 24).astype(np.float32)}
WEIGHT |= {"m": np.full(24, 128, np.uint8), "b": RNG.standard_normal(24).astype(np.float32)}
CASES: dict[str, tuple[list[onnx.NodeProto], set[str]]] = {
    "DynamicQuantizeMatMul": ([_ms("DynamicQuantizeMatMul", "x w k m b", "y")], {"MatMul", "Add"}),
    "DynamicQuantizeMatMul without a bias": ([_ms("DynamicQuantizeMatMul", "x w k m", "y")], {"MatMul"}),
    "MatMulIntegerToFloat": ([TO_INT, _ms("MatMulIntegerToFloat", "q w s k z m b", "y")], {"MatMul", "Add"}),
    "QLinearWhere": ([TO_INT, _ms("QLinearWhere", "yes q s z q s z t u", "r"), TO_FLOAT], {"Where"}),
    "QAttention": ([TO_INT, _ms("QAttention", "q w b s k1 none z m1", "y", num_heads=2)], {"Attention"}),
}


@pytest.mark.parametrize(("nodes", "ops"), CASES.values(), ids=CASES)
def test_contributed_operators(nodes: list[onnx.NodeProto], ops: set[str]) -> None:
    facts = {"yes": np.array([True, False] * 4), "k1": np.float32(0.005), "m1": np.uint8(128)}
    for one in nodes:
        one.input[:] = ["" if i == "none" else i for i in one.input]
    read = {i for n in nodes for i in n.input}
    constants = {k: v for k, v in (UNIT | WEIGHT | facts).items() if k in read}
    given = contrib(nodes, (2, 3, 8), constants)
    made = dequantized(given)
    assert made.reason == "" and {n.op_type for n in made.model.graph.node} - {"Identity"} == ops
    x = (RNG.standard_normal((2, 3, 8)) * 1.5).astype(np.float32)
    assert error(run(given, x), run(made.model, x)) < 0.03


def test_one_tensor_dequantised_in_two_ways() -> None:
    weight = np.arange(16, dtype=np.uint8).reshape(4, 4)
    scales = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "k", "m"], ["a"], axis=0),
        helper.make_node("DequantizeLinear", ["w", "k", "m"], ["b"], axis=1),
        helper.make_node("DequantizeLinear", ["w", "k", "m2"], ["c"], axis=1),
        helper.make_node("MatMul", ["x", "a"], ["xa"]),
        helper.make_node("MatMul", ["xa", "b"], ["xb"]),
        helper.make_node("MatMul", ["xb", "c"], ["y"]),
    ]
    zeros = {"m": np.full(4, 3, np.uint8), "m2": np.full(4, 9, np.uint8)}
    given = contrib(nodes, (2, 4), {"w": weight, "k": scales, **zeros})
    made, x = dequantized(given), RNG.standard_normal((2, 4)).astype(np.float32)
    assert made.reason == "" and error(run(given, x), run(made.model, x)) < 1e-5


@pytest.mark.parametrize("way", ["value", "output", "codes"])
def test_scales_that_are_read_as_values(way: str) -> None:
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s1", "z1"])]
    nodes += {
        "value": [helper.make_node("Mul", ["x", "s1"], ["y"])],
        "output": [helper.make_node("Identity", ["s1"], ["y"])],
        "codes": [helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT)],
    }[way]
    made = dequantized(contrib(nodes, (2, 4), {}))
    assert "value" in made.reason


def test_pooling_with_the_channels_last() -> None:
    x, shape = images(2, 1), (2, *SHAPE)
    nodes = [
        helper.make_node("Transpose", ["x"], ["n"], perm=[0, 2, 3, 1]),
        helper.make_node("QuantizeLinear", ["n", "s", "z"], ["q"]),
        _ms("NhwcMaxPool", "q", "p", kernel_shape=[2, 2], strides=[2, 2]),
        _ms("QLinearAveragePool", "p s z s z", "a", kernel_shape=[2, 2], channels_last=1),
        _ms("QLinearGlobalAveragePool", "a s z s z", "r", channels_last=1),
        helper.make_node("DequantizeLinear", ["r", "s", "z"], ["y"]),
    ]
    given = contrib(nodes, shape, {k: UNIT[k] for k in "sz"})
    made = dequantized(given)
    assert made.reason == ""
    found = Counter(n.op_type for n in made.model.graph.node)
    assert (found["MaxPool"], found["AveragePool"], found["GlobalAveragePool"]) == (1, 1, 1)
    assert not any("Linear" in op or op.startswith("Nhwc") for op in found)
    assert error(run(given, x), run(made.model, x)) < 0.15, "three roundings of small values"


def test_dynamic_quantisation(tmp_path: Path) -> None:
    model = network()
    onnx.save(model, str(tmp_path / "m.onnx"))
    quantize_dynamic(str(tmp_path / "m.onnx"), str(tmp_path / "q.onnx"), weight_type=QuantType.QUInt8)
    given = onnx.load(str(tmp_path / "q.onnx"))
    assert is_quantized(given)
    made = dequantized(given)
    assert made.reason == ""
    assert not {n.op_type for n in made.model.graph.node} & {"DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"}
    x = images(32, 77)
    assert error(run(model, x), run(made.model, x)) < 0.05


def quantised(nodes: list[onnx.NodeProto], outputs: dict[str, int]) -> ModelProto:
    constants: dict[str, Array] = {"s": np.array(0.1, np.float32), "z": np.array(128, np.uint8)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPE])],
        [helper.make_tensor_value_info(n, kind, None) for n, kind in outputs.items()],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


QUANTIZE = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])


def test_a_quantised_output_stays_quantised() -> None:
    model = quantised([QUANTIZE, helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])], {"q": 2, "y": 1})
    made = dequantized(model)
    assert made.reason == ""
    assert np.array_equal(run(made.model, images(2, 0)), run(model, images(2, 0)))


@pytest.mark.parametrize(
    ("nodes", "kind", "why"),
    [
        ([QUANTIZE, helper.make_node("Cast", ["q"], ["y"], to=1)], 1, "computes with quantised values"),
        (
            [
                QUANTIZE,
                helper.make_node("Cast", ["x"], ["c"], to=2),
                helper.make_node("Concat", ["q", "c"], ["k"], axis=1),
                helper.make_node("DequantizeLinear", ["k", "s", "z"], ["y"]),
            ],
            1,
            "computes with quantised values",
        ),
        (
            [
                helper.make_node("ReduceMax", ["x"], ["t"], keepdims=0),
                helper.make_node("QuantizeLinear", ["x", "t", "z"], ["q"]),
                helper.make_node("DequantizeLinear", ["q", "t", "z"], ["y"]),
            ],
            1,
            "is computed",
        ),
    ],
)
def test_what_cannot_be_taken_apart_stays(nodes: list[onnx.NodeProto], kind: int, why: str) -> None:
    model = quantised(nodes, {"y": kind})
    made = dequantized(model)
    assert made.model is model and why in made.reason


def test_what_is_not_quantised_or_broken_stays(tmp_path: Path) -> None:
    model = network()
    assert dequantized(model).model is model
    broken = quantised([QUANTIZE, helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])], {"y": 1})
    broken.graph.initializer[0].raw_data = b"1"
    made = dequantized(broken)
    assert made.model is broken and made.reason


def test_values_that_subgraphs_read_are_renamed_there() -> None:
    branches = {
        f"{k}_branch": helper.make_graph(
            [helper.make_node(op, ["f"], [k])], k, [], [helper.make_tensor_value_info(k, TensorProto.FLOAT, None)]
        )
        for k, op in (("then", "Relu"), ("else", "Neg"))
    }
    nodes = [
        QUANTIZE,
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["f"]),
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "s"], ["c"]),
        helper.make_node("If", ["c"], ["y"], **branches),
    ]
    model = quantised(nodes, {"y": 1})
    made = dequantized(model)
    assert made.reason == "" and "QuantizeLinear" not in {n.op_type for n in made.model.graph.node}
    x = images(2, 0)
    assert np.abs(run(made.model, x) - run(model, x)).max() <= 0.051
