"""QDQ quantisation: numerics, which nodes, where Q/DQ stand, and what ONNX Runtime makes of it."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from hantc.core.errors import HantcError
from hantc.dialect import qdq_graph
from hantc.dialect.half import to_fp16
from hantc.dialect.qdq import QuantSpec, quantize, quantize_for_timing, quantize_whole

Array = np.ndarray[Any, Any]

# 7-bit weights: right on every x86 machine that runs the tests
SPEC = QuantSpec(reduce_range=True)
SYMMETRIC = QuantSpec(reduce_range=False, symmetric=True)
SPECS = [SPEC, QuantSpec(True, per_channel=False), QuantSpec(True, calibration="percentile"), SYMMETRIC]
FIRST, SECOND = ["conv1", "relu1", "conv2", "add", "relu2"], ["conv3", "conv4"]


class Net:
    """Builds small graphs over x: (N, 8, 12, 12)."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.inits: list[TensorProto] = []

    def const(self, name: str, value: Any, dtype: type = np.float32) -> str:
        """An initializer."""
        self.inits.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def node(self, op: str, inputs: Sequence[str], name: str, **attrs: Any) -> str:
        """A node whose output is called like itself."""
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attrs))
        return name

    def conv(self, x: str, name: str, c_in: int = 8, c_out: int = 8, k: int = 3) -> str:
        """A convolution with bias, outputs of about unit variance."""
        w = self.const(f"{name}.w", self.rng.standard_normal((c_out, c_in, k, k)) / np.sqrt(c_in * k * k))
        b = self.const(f"{name}.b", 0.1 * self.rng.standard_normal(c_out))
        return self.node("Conv", [x, w, b], name, pads=[k // 2] * 4)

    def model(self, *outputs: tuple[str, list[int | str]], opset: int = 17) -> onnx.ModelProto:
        """The finished model."""
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8, 12, 12])
        ys = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs]
        graph = helper.make_graph(self.nodes, "net", [x], ys, self.inits)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        model.producer_name = "test"
        helper.set_model_props(model, {"task": "none"})
        return model


def cnn(opset: int = 17) -> onnx.ModelProto:
    """Residual block, HardSwish, two convolutions, mean, Gemm."""
    n = Net()
    x = n.node("Relu", [n.conv("x", "conv1")], "relu1")
    x = n.node("Relu", [n.node("Add", [n.conv(x, "conv2"), "x"], "add")], "relu2")
    x = n.node("HardSwish", [x], "hs")
    x = n.conv(n.conv(x, "conv3", 8, 16), "conv4", 16, 16)
    x = n.node("Flatten", [n.node("GlobalAveragePool", [x], "gap")], "flat")
    n.node("Gemm", [x, n.const("fc.w", n.rng.standard_normal((5, 16))), n.const("fc.b", np.ones(5))], "y", transB=1)
    return n.model(("y", ["N", 5]), opset=opset)


def feeds(count: int = 4, batch: int = 4) -> list[dict[str, Array]]:
    """Seeded inputs."""
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((batch, 8, 12, 12)).astype(np.float32)} for _ in range(count)]


def run(model: onnx.ModelProto, feed: dict[str, Array]) -> list[Array]:
    """Outputs under ONNX Runtime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(o) for o in session.run(None, feed)]


def optimised_ops(model: onnx.ModelProto) -> Counter[str]:
    """Operator types after ONNX Runtime's graph optimisations."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)


def relative_error(got: Array, want: Array) -> float:
    """Norm of the difference over the norm."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def qdq_of(model: onnx.ModelProto) -> list[str]:
    """Source tensors of the Q nodes, in graph order."""
    return [n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"]


@pytest.mark.parametrize("spec", SPECS)
def test_int8_is_near_fp32(spec: QuantSpec) -> None:
    model = cnn()
    int8 = quantize(model, None, feeds(), spec)
    onnx.checker.check_model(int8)
    assert relative_error(run(int8, feeds()[0])[0], run(model, feeds()[0])[0]) < 0.05


def test_entropy_calibration_runs() -> None:
    n = Net()
    n.conv("x", "y")
    model = n.model(("y", ["N", 8, 12, 12]))
    int8 = quantize(model, None, feeds(2, batch=1), QuantSpec(True, calibration="entropy"))
    assert optimised_ops(int8)["QLinearConv"] == 1


def test_onnxruntime_runs_everything_in_int8() -> None:
    ops = optimised_ops(quantize(cnn(), FIRST, feeds(), SPEC))
    assert ops["QLinearConv"] == 2 and ops["QLinearAdd"] == 1
    assert ops["Relu"] == 0 and ops["Add"] == 0  # fused: the zero point clips
    whole = optimised_ops(quantize(cnn(), None, feeds(), SPEC))
    assert whole["QLinearConv"] == 4 and whole["QLinearAdd"] == 1
    assert whole["QLinearGlobalAveragePool"] == 1 and whole["QGemm"] == 1
    # in and out of the one HardSwish, and the input; the Gemm's result is float by itself
    assert whole["QuantizeLinear"] == 2 and whole["DequantizeLinear"] == 1


def test_only_the_named_nodes_are_quantised() -> None:
    model = cnn()
    int8 = quantize(model, SECOND, feeds(), SPEC)
    by_name = {n.name: n for n in int8.graph.node}
    makers = {o: n.op_type for n in int8.graph.node for o in n.output}
    for name in FIRST:
        assert all(makers.get(i) not in ("QuantizeLinear", "DequantizeLinear") for i in by_name[name].input), name
    for name in SECOND:
        assert [makers[i] for i in by_name[name].input] == ["DequantizeLinear"] * 3
    ops = optimised_ops(int8)
    assert ops["QLinearConv"] == 2 and ops["QLinearAdd"] == 0
    # one border in, one pair between the convolutions, one border out
    assert qdq_of(int8) == ["hs", "conv3", "conv4"]
    assert ops["QuantizeLinear"] == 1 and ops["DequantizeLinear"] == 1


def test_two_regions_side_by_side_share_no_border() -> None:
    model = cnn()
    n = [*FIRST, *SECOND]
    model.graph.node[5].op_type = "Relu"  # instead of HardSwish: stays in INT8
    int8 = quantize(model, [*n, "hs"], feeds(), SPEC)
    ops = optimised_ops(int8)
    assert ops["QuantizeLinear"] == 1 and ops["DequantizeLinear"] == 1


def test_float_readers_get_the_unrounded_tensor() -> None:
    n = Net()
    a = n.conv("x", "a")
    n.node("Add", [n.conv(a, "b"), n.node("HardSwish", [a], "h")], "y")
    model = n.model(("y", ["N", 8, 12, 12]), ("a", ["N", 8, 12, 12]))
    int8 = quantize(model, ["b"], feeds(), SPEC)
    by_name = {node.name: node for node in int8.graph.node}
    assert list(by_name["h"].input) == ["a"] and list(by_name["a"].output) == ["a"]
    assert optimised_ops(int8)["QLinearConv"] == 1
    got, want = run(int8, feeds()[0]), run(model, feeds()[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)  # the graph output is not rounded either
    assert 1e-4 < relative_error(got[0], want[0]) < 0.05


def test_shared_constant_stays_exact_for_float_nodes() -> None:
    n = Net()
    a = n.conv("x", "a")
    n.nodes.append(helper.make_node("Conv", [a, "a.w", "a.b"], ["b"], name="b", pads=[1] * 4))
    model = n.model(("b", ["N", 8, 12, 12]), ("a", ["N", 8, 12, 12]))
    int8 = quantize(model, ["b"], feeds(), SPEC)
    np.testing.assert_allclose(run(int8, feeds()[0])[1], run(model, feeds()[0])[1], rtol=1e-5, atol=1e-5)
    assert optimised_ops(int8)["QLinearConv"] == 1


def test_reduced_range_keeps_weights_to_7_bits() -> None:
    def largest(spec: QuantSpec) -> int:
        int8 = quantize(cnn(), None, feeds(), spec)
        weights = [i for i in int8.graph.initializer if i.data_type == TensorProto.INT8 and len(i.dims) > 1]
        assert len(weights) == 5
        return max(int(np.abs(numpy_helper.to_array(w).astype(int)).max()) for w in weights)

    assert largest(QuantSpec(reduce_range=True)) == 64
    assert largest(QuantSpec(reduce_range=False)) == 127


def test_symmetric_values_are_signed_and_biases_floats() -> None:
    int8 = quantize(cnn(), None, feeds(), SYMMETRIC)
    inits = {i.name: i for i in int8.graph.initializer}
    pairs = [n for n in int8.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    zeros = [numpy_helper.to_array(inits[n.input[2]]) for n in pairs]
    assert len(pairs) > 10 and all(z.dtype == np.int8 and not z.any() for z in zeros)
    products = [n for n in int8.graph.node if n.op_type in ("Conv", "Gemm")]
    assert len(products) == 5
    assert all(inits[n.input[2]].data_type == TensorProto.FLOAT for n in products)


def test_symmetric_rounds_nothing_that_is_computed_in_a_products_kernel() -> None:
    int8 = quantize(cnn(), None, feeds(), SYMMETRIC)
    makers = {o: n for n in int8.graph.node for o in n.output}
    read = {n.name: [makers[i].op_type if i in makers else i for i in n.input] for n in int8.graph.node}
    assert read["relu1"] == ["Conv"] and read["relu2"] == ["Add"]
    assert read["add"] == ["Conv", "DequantizeLinear"], "the shortcut alone is rounded"
    assert read["hs"] == ["Relu"], "what only floats read is not rounded"
    assert all(read[n][0] == "DequantizeLinear" for n in ("conv1", "conv2", "conv3", "conv4"))
    assert qdq_of(int8)[:3] == ["x", "relu1", "hs"]


@pytest.mark.parametrize("outputs", [("y",), ("y", "c")])
def test_symmetric_keeps_what_others_read(outputs: tuple[str, ...]) -> None:
    """A convolution's result that an activation and another convolution read, or the output too."""
    n = Net()
    c = n.conv("x", "c")
    n.node("Add", [n.conv(n.node("Relu", [c], "r"), "d"), n.conv(c, "e")], "y")
    shape: list[int | str] = ["N", 8, 12, 12]
    model = n.model(*((name, shape) for name in outputs))
    int8 = quantize(model, None, feeds(), SYMMETRIC)
    onnx.checker.check_model(int8)
    for got, want in zip(run(int8, feeds()[0]), run(model, feeds()[0]), strict=True):
        assert relative_error(got, want) < 0.05


def test_types_of_weights_activations_and_biases() -> None:
    int8 = quantize(cnn(), None, feeds(), SPEC)
    inits = {i.name: i for i in int8.graph.initializer}
    makers = {o: n for n in int8.graph.node for o in n.output}
    conv = next(n for n in int8.graph.node if n.name == "conv3")
    data, weight, bias = (makers[i] for i in conv.input)
    assert inits[data.input[2]].data_type == TensorProto.UINT8
    assert inits[weight.input[0]].data_type == TensorProto.INT8
    assert list(inits[weight.input[1]].dims) == [16]  # per channel
    assert inits[bias.input[0]].data_type == TensorProto.INT32
    assert not any(i.data_type == TensorProto.FLOAT and len(i.dims) > 1 for i in int8.graph.initializer)


def test_weights_equal_those_of_onnxruntime() -> None:
    n = Net()
    n.conv("x", "y")
    model = n.model(("y", ["N", 8, 12, 12]))
    ours, theirs = quantize(model, None, feeds(), SPEC), quantize_whole(model, feeds(), SPEC)
    pairs = [{i.name: numpy_helper.to_array(i) for i in m.graph.initializer} for m in (ours, theirs)]
    for name in ("y.w_scale", "y.b_quantized_scale"):
        np.testing.assert_array_equal(pairs[0][name], pairs[1][name])
    (w1,), (w2,) = ([a for a in p.values() if a.dtype == np.int8 and a.ndim == 4] for p in pairs)
    np.testing.assert_array_equal(w1, w2)


def test_model_is_untouched_and_its_header_survives() -> None:
    model = cnn()
    before = model.SerializeToString()
    int8 = quantize(model, None, feeds(), SPEC)
    quantize_for_timing(model, SPEC)
    assert model.SerializeToString() == before
    assert int8.producer_name == "test" and int8.metadata_props == model.metadata_props
    assert int8.opset_import == model.opset_import and int8.ir_version == model.ir_version
    assert int8.graph.input == model.graph.input and int8.graph.output == model.graph.output


def test_no_nodes_means_no_change() -> None:
    model = cnn()
    for names in ([], ["hs"]):
        int8 = quantize(model, names, feeds(), SPEC)
        assert [n.op_type for n in int8.graph.node] == [n.op_type for n in model.graph.node]
        np.testing.assert_array_equal(run(int8, feeds()[0])[0], run(model, feeds()[0])[0])


def test_refusals() -> None:
    with pytest.raises(HantcError, match="opset 12"):
        quantize(cnn(opset=12), None, feeds(), SPEC)
    with pytest.raises(HantcError, match="opset 12"):
        quantize_for_timing(cnn(opset=12), SPEC)
    with pytest.raises(HantcError, match="no_such_node"):
        quantize(cnn(), ["conv1", "no_such_node"], feeds(), SPEC)
    with pytest.raises(HantcError, match="calibration data"):
        quantize(cnn(), None, [], SPEC)
    with pytest.raises(HantcError, match="calibration data"):
        quantize_whole(cnn(), [], SPEC)
    with pytest.raises(HantcError, match="calibration fails"):
        quantize(cnn(), None, [{"nope": np.zeros(1)}], SPEC)
    nan = [{"x": np.full((1, 8, 12, 12), np.nan, dtype=np.float32)}]
    with pytest.raises(HantcError, match="reaches nan"):
        quantize(cnn(), None, nan, SPEC)


def test_timing_form_has_the_graph_of_the_real_one() -> None:
    for nodes in (None, FIRST, SECOND):
        real, quick = quantize(cnn(), nodes, feeds(), SPEC), quantize_for_timing(cnn(), SPEC, nodes)
        assert optimised_ops(real) == optimised_ops(quick)
        assert [n.op_type for n in real.graph.node] == [n.op_type for n in quick.graph.node]
    assert all(np.isfinite(o).all() for o in run(quick, feeds()[0]))


def test_matmul_with_bias_stays_float_after_the_product() -> None:
    n = Net()
    x = n.node("Reshape", ["x", n.const("shape", [0, 8, 144], np.int64)], "r")
    m = n.node("MatMul", [x, n.const("w", n.rng.standard_normal((144, 16)) / 12)], "m")
    n.node("Add", [m, n.const("b", n.rng.standard_normal(16))], "y")
    model = n.model(("y", ["N", 8, 16]))
    int8 = quantize(model, None, feeds(), SPEC)
    assert optimised_ops(int8)["MatMulIntegerToFloat"] == 1
    assert relative_error(run(int8, feeds()[0])[0], run(model, feeds()[0])[0]) < 0.03


@pytest.mark.parametrize(("low", "high", "kept"), [(0.0, 6.0, 0), (-1.0, 1.0, 0), (0.5, 2.0, 1), (-3.0, -1.0, 1)])
def test_clip_is_absorbed_only_where_uint8_can_stand_for_it(low: float, high: float, kept: int) -> None:
    n = Net()
    c = n.node("Clip", [n.conv("x", "c"), n.const("low", low), n.const("high", high)], "clip")
    n.conv(c, "y")
    model = n.model(("y", ["N", 8, 12, 12]))
    int8 = quantize(model, None, feeds(), SPEC)
    assert sum(node.op_type == "Clip" for node in int8.graph.node) == kept
    assert relative_error(run(int8, feeds()[0])[0], run(model, feeds()[0])[0]) < 0.05


def test_gemm_with_absorbed_relu_still_clips() -> None:
    n = Net()
    x = n.node("Flatten", [n.node("GlobalAveragePool", [n.conv("x", "c")], "g")], "f")
    n.node("Relu", [n.node("Gemm", [x, n.const("w", n.rng.standard_normal((8, 5)))], "m")], "y")
    model = n.model(("y", ["N", 5]))
    int8 = quantize(model, None, feeds(), SPEC)
    assert not any(node.op_type == "Relu" for node in int8.graph.node)
    got, want = run(int8, feeds()[0])[0], run(model, feeds()[0])[0]
    assert (want == 0).any() and (got >= 0).all()
    assert relative_error(got, want) < 0.1


@pytest.mark.parametrize("opset", [13, 18])
def test_spatial_mean_becomes_int8_pooling(opset: int) -> None:
    n = Net()
    c = n.conv("x", "c")
    if opset < 18:
        c = n.node("ReduceMean", [c], "mean", axes=[-1, -2])
    else:
        c = n.node("ReduceMean", [c, n.const("axes", [2, 3], np.int64)], "mean")
    n.conv(c, "y", k=1)
    model = n.model(("y", ["N", 8, 1, 1]), opset=opset)
    int8 = quantize(model, None, feeds(), SPEC)
    assert optimised_ops(int8)["QLinearGlobalAveragePool"] == 1
    assert relative_error(run(int8, feeds()[0])[0], run(model, feeds()[0])[0]) < 0.1


def test_unnamed_nodes_and_constant_nodes() -> None:
    n = Net()
    n.node("Relu", [n.conv("x", "c")], "y")
    weight = n.inits.pop(0)
    n.nodes.insert(0, helper.make_node("Constant", [], ["c.w"], value=weight))
    for node in n.nodes:
        node.name = ""
    int8 = quantize(n.model(("y", ["N", 8, 12, 12])), None, feeds(), SPEC)
    assert optimised_ops(int8)["QLinearConv"] == 1


def test_tensors_of_unknown_type_stay_float() -> None:
    n = Net()
    n.nodes.append(helper.make_node("Opaque", ["x"], ["o"], name="o", domain="vendor"))
    n.conv(n.conv("o", "c"), "y")
    model = n.model(("y", ["N", 8, 12, 12]))
    model.opset_import.append(helper.make_opsetid("vendor", 1))
    int8 = quantize_for_timing(model, SPEC)
    assert qdq_of(int8) == []
    model.graph.value_info.append(helper.make_tensor_value_info("o", TensorProto.FLOAT, ["N", 8, 12, 12]))
    assert qdq_of(quantize_for_timing(model, SPEC)) == ["o", "c", "y_QuantizeLinear_Input"]


def test_whole_is_onnxruntimes_own_and_close() -> None:
    model = cnn()
    for m in (model, cnn_below_opset_13()):
        int8 = quantize_whole(m, feeds(), SPEC)
        assert qdq_graph.opset_of(int8) >= 13
        assert relative_error(run(int8, feeds()[0])[0], run(m, feeds()[0])[0]) < 0.1
        assert optimised_ops(int8)["QLinearConv"] >= 2
    broken = cnn()
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(HantcError, match="cannot quantise the whole model"):
        quantize_whole(broken, feeds(), SPEC)


def cnn_below_opset_13() -> onnx.ModelProto:
    """A residual block at opset 11."""
    n = Net()
    x = n.node("Relu", [n.conv("x", "conv1")], "relu1")
    n.node("Add", [n.conv(x, "conv2"), "x"], "y")
    return n.model(("y", ["N", 8, 12, 12]), opset=11)


def test_quiet_and_clean(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    handlers, filters, level = list(root.handlers), list(root.filters), root.level
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    quantize(cnn(), None, feeds(), QuantSpec(True, calibration="percentile"))
    quantize_whole(cnn(), feeds(), SPEC)
    quantize_for_timing(cnn(), SPEC)
    out, err = capfd.readouterr()
    assert out == "" and err == ""
    assert (list(root.handlers), list(root.filters), root.level) == (handlers, filters, level)
    assert list(tmp_path.iterdir()) == []


def test_importing_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, hantc.dialect.qdq; sys.exit(any(m.startswith(('onnxruntime', 'torch')) for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_subgraph_reads_stays() -> None:
    """A constant that only a branch reads, from outside."""
    n = Net()
    c = n.conv("x", "c")
    n.const("offset", np.full(1, 0.5))
    branches = {}
    for name, op in (("then_branch", "Add"), ("else_branch", "Sub")):
        y = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        branches[name] = helper.make_graph([helper.make_node(op, [c, "offset"], [name])], name, [], [y])
    n.node("If", [n.const("yes", True, np.bool_)], "y", **branches)
    model = n.model(("y", ["N", 8, 12, 12]))
    for spec in (SPEC, SYMMETRIC):
        int8 = quantize(model, ["c"], feeds(), spec)
        assert relative_error(run(int8, feeds()[0])[0], run(model, feeds()[0])[0]) < 0.05


def test_an_output_before_a_relu_keeps_what_is_below_zero() -> None:
    n = Net()
    a = n.conv("x", "a")
    n.conv(n.node("Relu", [a], "r"), "y")
    model = n.model(("y", ["N", 8, 12, 12]), ("a", ["N", 8, 12, 12]))
    want = run(model, feeds()[0])
    assert want[1].min() < -1
    for spec in (SPEC, SYMMETRIC):
        got = run(quantize(model, None, feeds(), spec), feeds()[0])
        assert all(relative_error(g, w) < 0.05 for g, w in zip(got, want, strict=True))


FOLLOWING: dict[str, tuple[list[str], dict[str, Any]]] = {
    "Add": (["c", "d"], {}),
    "Relu": (["c"], {}),
    "Clip": (["c", "low", "high"], {}),
    "LeakyRelu": (["c"], {}),
    "MaxPool": (["c"], {"kernel_shape": [3, 3], "pads": [1] * 4}),
    "AveragePool": (["c"], {"kernel_shape": [3, 3], "pads": [1] * 4}),
    "Flatten": (["c"], {}),
    "Reshape": (["c", "shape"], {}),
    "Transpose": (["c"], {"perm": [0, 1, 3, 2]}),
    "Squeeze": (["one", "axis"], {}),
    "Unsqueeze": (["c", "axis"], {}),
    "Slice": (["c", "starts", "ends", "axis"], {}),
    "Split": (["c"], {"axis": 1}),
    "Pad": (["c", "pads"], {}),
}


def following(op: str) -> onnx.ModelProto:
    """Convolutions, and what follows them."""
    n = Net()
    n.conv("x", "c"), n.conv("x", "d"), n.conv("x", "one", 8, 1)
    n.const("low", -0.5), n.const("high", 2.0), n.const("axis", [1], np.int64), n.const("pads", [0] * 8, np.int64)
    n.const("shape", [0, 8, 12, 12], np.int64), n.const("starts", [0], np.int64), n.const("ends", [4], np.int64)
    inputs, attributes = FOLLOWING[op]
    if op == "Split":
        n.nodes.append(helper.make_node(op, inputs, ["f", "g"], name="f", **attributes))
    else:
        n.node(op, inputs, "f", **attributes)
    n.node("Relu", ["f"], "y")
    return n.model(("y", []))


@pytest.mark.parametrize("op", sorted(qdq_graph.FUSED_FOLLOWERS))
def test_symmetric_followers_run_with_scales_in_fp16(op: str) -> None:
    """In ONNX Runtime as it comes, too."""
    model = following(op)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    want = run(model, feeds()[0])[0]
    half = to_fp16(quantize(model, None, feeds(), SYMMETRIC))
    assert any(i.data_type == TensorProto.FLOAT16 for i in half.graph.initializer)
    assert relative_error(run(half, feeds()[0])[0], want) < 0.05
