"""The roofline's arithmetic, by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from hantc.backends.prediction import Machine, _Graph, predict
from hantc.backends.roofline.backend import RooflineBackend
from hantc.core.backend_api import BuildSpec
from hantc.core.errors import ModelError
from hantc.dialect.conv import Conv
from hantc.dialect.emitter import emit
from hantc.dialect.graph import trace
from hantc.dialect.qdq import QuantSpec, quantize_for_timing

FLAT = Machine("flat", peak_fp32=1e9, peak_int8=4e9, bandwidth=1e12, bandwidth_max=1e12, op_overhead_s=0.0)
THIN = Machine("thin", peak_fp32=1e15, peak_int8=1e15, bandwidth=1e6, bandwidth_max=1e6, op_overhead_s=0.0)


def conv(int8: bool = False) -> onnx.ModelProto:
    """4→8 channels, 3×3, over (N, 4, 10, 10), then Relu; as float or QDQ."""
    w = np.ones((8, 4, 3, 3), dtype=np.float32)
    inits = [numpy_helper.from_array(w, "w")]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    if int8:
        inits = [
            numpy_helper.from_array(w.astype(np.int8), "wq"),
            numpy_helper.from_array(np.array(0.1, dtype=np.float32), "s"),
            numpy_helper.from_array(np.array(0, dtype=np.int8), "z8"),
            numpy_helper.from_array(np.array(0, dtype=np.uint8), "zu"),
        ]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "zu"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "s", "zu"], ["xd"]),
            helper.make_node("DequantizeLinear", ["wq", "s", "z8"], ["wd"]),
            helper.make_node("Conv", ["xd", "wd"], ["c"], pads=[1] * 4),
            helper.make_node("QuantizeLinear", ["c", "s", "zu"], ["cq"]),
            helper.make_node("DequantizeLinear", ["cq", "s", "zu"], ["y"]),
        ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 10, 10])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8, 10, 10])
    graph = helper.make_graph(nodes, "g", [x], [y], inits)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_conv_by_hand_and_fused_relu() -> None:
    flops = 2 * 8 * 100 * 4 * 9
    moved = 4 * (4 * 100 + 8 * 4 * 9 + 8 * 100)
    p = predict(conv(), FLAT, batch=1, threads=1)
    assert (p.flops, p.bytes_moved) == (flops, moved)
    assert p.latency_ms == pytest.approx(flops / 1e9 * 1e3)
    assert predict(conv(), THIN, batch=1, threads=1).latency_ms == pytest.approx(moved / 1e6 * 1e3)


def test_batch_and_threads_scale() -> None:
    one = predict(conv(), FLAT, batch=1, threads=1)
    assert predict(conv(), FLAT, batch=5, threads=1).flops == 5 * one.flops
    two = predict(conv(), FLAT, batch=1, threads=2)
    assert two.latency_ms == pytest.approx(one.latency_ms / 1.9)


def test_int8_is_faster_and_moves_less() -> None:
    fp32, int8 = (predict(conv(q), FLAT, batch=1, threads=1) for q in (False, True))
    conv_flops = 2 * 8 * 100 * 4 * 9
    border_flops = 400 + 800  # the first Quantize, the last Dequantize
    assert int8.flops == conv_flops + border_flops
    # border work is not INT8 work
    assert int8.latency_ms == pytest.approx((conv_flops / 4e9 + border_flops / 1e9) * 1e3)
    conv_bytes = 400 + 8 * 4 * 9 + 800
    scale_and_zero = 2 * 5  # of the two border nodes
    assert int8.bytes_moved == conv_bytes + 400 * 5 + 800 * 5 + scale_and_zero
    assert int8.latency_ms < fp32.latency_ms


def test_what_is_computed_in_a_products_kernel_is_not_moved() -> None:
    """Engines that round behind the activation: it costs nothing, and the product's result is kept in bytes."""
    absorbed, fused = conv(int8=True), conv(int8=True)
    fused.graph.node[3].output[0] = "r"
    fused.graph.node.insert(4, helper.make_node("Relu", ["r"], ["c"]))
    for machine in (FLAT, THIN):
        want, got = (predict(m, machine, batch=1, threads=1) for m in (absorbed, fused))
        assert got.latency_ms == pytest.approx(want.latency_ms)
        assert (got.flops, got.bytes_moved) == (want.flops, want.bytes_moved)
    fused.graph.output.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, ["N", 8, 10, 10]))
    assert (
        predict(fused, FLAT, batch=1, threads=1).bytes_moved > predict(absorbed, FLAT, batch=1, threads=1).bytes_moved
    )


def test_a_sum_behind_an_int8_product_is_int8() -> None:
    made = conv(int8=True)
    made.graph.node[3].output[0] = "r"
    weight = numpy_helper.from_array(np.ones((8, 4, 3, 3), np.float32), "other")
    made.graph.initializer.append(weight)
    shortcut = [
        helper.make_node("Conv", ["x", "other"], ["o"], pads=[1] * 4),
        helper.make_node("QuantizeLinear", ["o", "s", "zu"], ["oq"]),
        helper.make_node("DequantizeLinear", ["oq", "s", "zu"], ["od"]),
        helper.make_node("Add", ["r", "od"], ["c"]),
    ]
    for k, node in enumerate(shortcut):
        made.graph.node.insert(4 + k, node)
    graph = _Graph(made, 1)
    by_output = {n.output[0]: n for n in graph.nodes}
    assert graph.in_int8(by_output["c"]) and graph.in_int8(by_output["r"]) and not graph.in_int8(by_output["o"])
    by_output["od"].op_type = "Identity"  # the other operand is a float now
    assert not graph.in_int8(by_output["c"])


def test_weights_are_not_looked_at_but_shapes_are_followed() -> None:
    model = conv()
    rows = np.arange(800, dtype=np.int64).reshape(800, 1)[:, 0]  # longer than what counts as a few numbers
    model.graph.initializer.extend(
        [numpy_helper.from_array(rows, "rows"), numpy_helper.from_array(np.array([0, 800]), "flat")]
    )
    model.graph.node.extend(
        [helper.make_node("Reshape", ["y", "flat"], ["f"]), helper.make_node("Gather", ["f", "rows"], ["z"], axis=1)]
    )
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 800]))
    before = model.SerializeToString()
    plain = predict(model, FLAT, batch=1, threads=1)
    assert plain.flops >= 2 * 8 * 100 * 4 * 9
    assert model.SerializeToString() == before
    old = onnx.ModelProto()  # IR 3: weights stand among the inputs too
    old.CopyFrom(model)
    old.ir_version = 3
    for name, kind, dims in (("w", TensorProto.FLOAT, [8, 4, 3, 3]), ("rows", TensorProto.INT64, [800])):
        old.graph.input.append(helper.make_tensor_value_info(name, kind, dims))
    old.graph.input.append(helper.make_tensor_value_info("flat", TensorProto.INT64, [2]))
    assert predict(old, FLAT, batch=1, threads=1) == plain


def test_unknown_shape_is_a_model_error() -> None:
    model = conv()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    with pytest.raises(ModelError, match="'H'"):
        predict(model, FLAT, batch=1, threads=1)


def test_device_tells_machines_apart() -> None:
    devices = {RooflineBackend(m).capabilities().device for m in (FLAT, THIN, Machine())}
    assert len(devices) == 3


def test_runs_a_quantised_model() -> None:
    torch.manual_seed(0)
    module = trace(nn.Sequential(Conv(3, 8, 3)).eval(), (3, 6, 6), (8, 6, 6))
    float_model = emit(module).model
    model = quantize_for_timing(float_model, QuantSpec(reduce_range=True))
    assert any(n.op_type == "DequantizeLinear" for n in model.graph.node)
    backend = RooflineBackend()
    x = np.random.default_rng(0).uniform(-1, 1, (1, 3, 6, 6)).astype(np.float32)
    rounded, plain = (backend.run(backend.build(m, BuildSpec()), {"x": x})[0] for m in (model, float_model))
    # the invented ranges (±4 for inputs in ±1) round coarsely: a fifth of the largest value
    assert 0 < np.abs(rounded - plain).max() < 0.2 * np.abs(plain).max()
