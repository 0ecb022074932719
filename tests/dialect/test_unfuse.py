"""ONNX Runtime's fused operators taken apart: the same function, in ONNX's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.shape_inference
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper

from hantc.dialect.emitter import opaque_leaves
from hantc.dialect.importer import import_model
from hantc.dialect.unfuse import unfused
from tests.dialect.conftest import run_ort

if TYPE_CHECKING:
    from tests.dialect.conftest import Models

MS = {"com.microsoft": 1}
IMAGE = ("N", 4, 6, 6)
TOKENS = ("N", 5, 8)


def node(op: str, inputs: list[str], outputs: list[str], **attrs: Any) -> NodeProto:
    return helper.make_node(op, inputs, outputs, domain="com.microsoft", **attrs)


def check(models: Models, model: ModelProto, ops: list[str]) -> ModelProto:
    """`unfused` makes these operators of it, and the same function; so does the import."""
    before = model.SerializeToString()
    plain = unfused(model)
    assert model.SerializeToString() == before
    assert [n.op_type for n in plain.graph.node] == ops and not any(n.domain for n in plain.graph.node)
    onnx.shape_inference.infer_shapes(plain, strict_mode=True)
    feeds = models.feeds(model)
    wanted = run_ort(model, feeds)
    for one, two in zip(wanted, run_ort(plain, feeds), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5)
    network = import_model(model)
    assert opaque_leaves(network) == []
    for one, two in zip(wanted, models.forward(network, feeds), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5)
    return plain


ACTIVATIONS = {
    "Relu": {},
    "Tanh": {},
    "Sigmoid": {},
    "LeakyRelu": {"activation_params": [0.2]},
    "HardSigmoid": {"activation_params": [0.3, 0.4]},
    "Clip": {"activation_params": [-0.5, 1.5]},
}


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_fused_conv(models: Models, kind: str, opset: int) -> None:
    conv = node("FusedConv", ["x", "w", "b"], ["y"], activation=kind, pads=[1] * 4, group=2, **ACTIVATIONS[kind])
    constants = {"w": models.weight(6, 2, 3, 3), "b": models.weight(6)}
    model = models.make([conv], {"x": IMAGE}, ["y"], constants, opset=opset, domains=MS)
    check(models, model, ["Conv", kind])


def test_fused_conv_with_a_sum(models: Models) -> None:
    conv = node("FusedConv", ["x", "w", "b", "x"], ["y"], activation="Relu", pads=[1] * 4)
    constants = {"w": models.weight(4, 4, 3, 3), "b": models.weight(4)}
    check(models, models.make([conv], {"x": IMAGE}, ["y"], constants, domains=MS), ["Conv", "Add", "Relu"])


def test_fused_gemm(models: Models) -> None:
    gemm = node("FusedGemm", ["x", "w", "b"], ["y"], activation="LeakyRelu", activation_alpha=0.3, transB=1, alpha=0.5)
    model = models.make([gemm], {"x": ("N", 8)}, ["y"], {"w": models.weight(3, 8), "b": models.weight(3)}, domains=MS)
    check(models, model, ["Gemm", "LeakyRelu"])


@pytest.mark.parametrize(
    ("attrs", "ops"),
    [
        ({}, ["MatMul"]),
        ({"transB": 1, "alpha": 0.25}, ["Transpose", "MatMul", "Mul"]),
        ({"transA": 1}, ["Transpose", "MatMul"]),
    ],
)
def test_fused_matmul(models: Models, attrs: dict[str, Any], ops: list[str]) -> None:
    a, b = [(2, 3, 4), (2, 4, 5)] if not attrs.get("transA") else [(2, 4, 3), (2, 4, 5)]
    if attrs.get("transB"):
        b = (2, 5, 4)
    model = models.make(
        [node("FusedMatMul", ["x", "w"], ["y"], **attrs)], {"x": a}, ["y"], {"w": models.weight(*b)}, domains=MS
    )
    check(models, model, ops)


def test_fused_matmul_of_unknown_rank_stays(models: Models) -> None:
    """Where the rank hangs on an input's values, and one operand must be turned."""
    made = helper.make_tensor_value_info("shape", TensorProto.INT64, ["R"])
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["r"]), node("FusedMatMul", ["r", "w"], ["y"], transA=1)]
    model = models.make(nodes, {"x": (4, 6)}, ["y"], {"w": models.weight(4, 5)}, domains=MS)
    model.graph.input.append(made)
    assert unfused(model) is model


def test_fused_matmul_behind_a_computed_reshape(models: Models) -> None:
    """A shape of three numbers makes three dims, whatever they are; so does what follows."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Concat", ["n", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("Relu", ["r"], ["a"]),
        node("FusedMatMul", ["a", "w"], ["y"], transA=1),
    ]
    constants = {"zero": np.array([0]), "rest": np.array([6, 4]), "w": models.weight(6, 5)}
    model = models.make(nodes, {"x": ("N", 24)}, ["y"], constants, opset=9, domains=MS)
    plain = unfused(model)
    assert [n.op_type for n in plain.graph.node][-2:] == ["Transpose", "MatMul"]
    feeds = models.feeds(model)
    np.testing.assert_allclose(run_ort(plain, feeds)[0], run_ort(model, feeds)[0], rtol=1e-5, atol=1e-6)


def test_vectors_are_not_turned(models: Models) -> None:
    model = models.make(
        [node("FusedMatMul", ["x", "w"], ["y"], transA=1)], {"x": (4,)}, ["y"], {"w": models.weight(4, 5)}, domains=MS
    )
    assert [n.op_type for n in unfused(model).graph.node] == ["MatMul"]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
@pytest.mark.parametrize(("op", "attrs"), [("QuickGelu", {}), ("FastGelu", {}), ("Gelu", {})])
def test_constants_are_of_the_models_type(models: Models, op: str, attrs: dict[str, Any], kind: int) -> None:
    model = models.make([node(op, ["x"], ["y"], **attrs)], {"x": TOKENS}, ["y"], dtype=kind, domains=MS)
    plain = unfused(model)
    assert {i.data_type for i in plain.graph.initializer} == {kind}
    onnx.shape_inference.infer_shapes(plain, strict_mode=True)
    if op == "Gelu" and kind == TensorProto.DOUBLE:
        return  # ONNX Runtime has neither that nor Erf
    assert run_ort(plain, models.feeds(model))[0].dtype == helper.tensor_dtype_to_np_dtype(kind)


def test_names_that_are_taken(models: Models) -> None:
    nodes = [node("Gelu", ["x"], ["y"]), helper.make_node("Mul", ["y", "y/number_0"], ["y/Div_0"])]
    model = models.make(nodes, {"x": TOKENS}, ["y/Div_0"], {"y/number_0": np.float32(3)}, domains=MS)
    plain, feeds = unfused(model), models.feeds(model)
    np.testing.assert_allclose(run_ort(plain, feeds)[0], run_ort(model, feeds)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "broken", [node("QuickGelu", ["x"], ["y"], alpha="abc"), node("FusedConv", ["x", "w"], ["y"], activation_params=3)]
)
def test_attributes_that_are_none_stay(models: Models, broken: NodeProto) -> None:
    if broken.op_type == "FusedConv":
        broken.attribute.append(helper.make_attribute("activation", "Clip"))
    model = models.make([broken], {"x": IMAGE}, ["y"], {"w": models.weight(4, 4, 1, 1)}, domains=MS)
    assert unfused(model) is model


@pytest.mark.parametrize(("op", "opset"), [("Gelu", 8), ("QuickGelu", 6)])
def test_what_an_opset_cannot_say_stays(models: Models, op: str, opset: int) -> None:
    model = models.make([node(op, ["x"], ["y"])], {"x": TOKENS}, ["y"], domains=MS, opset=opset)
    assert unfused(model) is model


def test_transposed_batches_stay(models: Models) -> None:
    attrs = {"transA": 0, "transBatchA": 1}
    product = node("FusedMatMul", ["x", "w"], ["y"], **attrs)
    model = models.make([product], {"x": (3, 2, 4)}, ["y"], {"w": models.weight(2, 4, 5)}, domains=MS)
    assert unfused(model) is model


@pytest.mark.parametrize(
    ("op", "attrs", "ops"),
    [
        ("QuickGelu", {"alpha": 1.0}, ["Sigmoid", "Mul"]),
        ("QuickGelu", {}, ["Mul", "Sigmoid", "Mul"]),
        ("Gelu", {}, ["Div", "Erf", "Add", "Mul", "Mul"]),
        ("FastGelu", {}, ["Mul", "Mul", "Add", "Mul", "Tanh", "Mul", "Add", "Mul"]),
    ],
)
def test_gelus(models: Models, op: str, attrs: dict[str, Any], ops: list[str]) -> None:
    check(models, models.make([node(op, ["x"], ["y"], **attrs)], {"x": TOKENS}, ["y"], domains=MS), ops)


@pytest.mark.parametrize("op", ["BiasGelu", "FastGelu"])
def test_gelus_of_a_sum(models: Models, op: str) -> None:
    model = models.make([node(op, ["x", "b"], ["y"])], {"x": TOKENS}, ["y"], {"b": models.weight(8)}, domains=MS)
    plain = unfused(model)
    assert plain.graph.node[0].op_type == "Add" and not any(n.domain for n in plain.graph.node)
    feeds = models.feeds(model)
    np.testing.assert_allclose(run_ort(plain, feeds)[0], run_ort(model, feeds)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_skip_layer_normalization(models: Models, bias: bool) -> None:
    inputs = ["x", "k", "g", "b", *(["c"] if bias else [])]
    norm = node("SkipLayerNormalization", inputs, ["y", "", "", "s"], epsilon=1e-4)
    constants = {n: models.weight(8) for n in "gbc"} | {"k": models.weight(1, 5, 8)}
    model = models.make([norm], {"x": (1, 5, 8)}, ["y", "s"], constants, domains=MS)
    check(models, model, ["Add", *(["Add"] if bias else []), "LayerNormalization"])
    old = models.make([norm], {"x": (1, 5, 8)}, ["y", "s"], constants, domains=MS, opset=13)
    assert unfused(old) is old, "no such norm in ONNX by then"


ATTENTION = ["MatMul", "Add", "Split", "Reshape", "Transpose", "Reshape", "Transpose", "MatMul", "Mul", "Softmax"]
ATTENTION += ["Reshape", "Transpose", "MatMul", "Transpose", "Reshape"]


@pytest.mark.parametrize(
    "attrs",
    [{"num_heads": 2}, {"num_heads": 4, "scale": 0.3}, {"num_heads": 2, "qkv_hidden_sizes": [8, 8, 12]}],
    ids=["plain", "scaled", "wider values"],
)
@pytest.mark.parametrize("scores", [False, True])
def test_attention(models: Models, attrs: dict[str, Any], scores: bool) -> None:
    """As ONNX Runtime's tools write vision transformers; Swin's adds a bias to the scores."""
    width = sum(attrs.get("qkv_hidden_sizes", [8] * 3))
    inputs = ["x", "w", "b", *(["", "", "s"] if scores else [])]
    constants = {"w": models.weight(8, width), "b": models.weight(width)}
    constants["s"] = models.weight(1, attrs["num_heads"], 5, 5)
    model = models.make([node("Attention", inputs, ["y"], **attrs)], {"x": TOKENS}, ["y"], constants, domains=MS)
    wanted = list(ATTENTION)
    if scores:
        wanted.insert(wanted.index("Softmax"), "Add")
    check(models, model, wanted)


@pytest.mark.parametrize("bias", [True, False])
def test_multi_head_attention(models: Models, bias: bool) -> None:
    names = ["q", "k", "v"]
    nodes = [helper.make_node("MatMul", ["x", f"w{n}"], [n]) for n in names]
    nodes += [node("MultiHeadAttention", [*names, *(["b"] if bias else [])], ["y"], num_heads=2)]
    constants = {f"w{n}": models.weight(8, 8) for n in names} | {"b": models.weight(24)}
    model = models.make(nodes, {"x": TOKENS}, ["y"], constants, domains=MS)
    plain = unfused(model)
    assert not any(n.domain for n in plain.graph.node)
    check(models, model, [n.op_type for n in plain.graph.node])


@pytest.mark.parametrize(
    ("inputs", "attrs", "outputs"),
    [
        (["x", "w", "b", "mask"], {"num_heads": 2}, ["y"]),
        (["x", "w", "b"], {"num_heads": 2, "unidirectional": 1}, ["y"]),
        (["x", "w", "b"], {"num_heads": 2}, ["y", "present"]),
        (["x", "w", "b"], {"num_heads": 2, "qkv_hidden_sizes": [8, 8]}, ["y"]),
        (["x", "w", "b"], {}, ["y"]),
    ],
    ids=["masked", "causal", "with its states", "sizes that do not fit", "without heads"],
)
def test_attention_that_stays(models: Models, inputs: list[str], attrs: dict[str, Any], outputs: list[str]) -> None:
    constants = {"w": models.weight(8, 24), "b": models.weight(24), "mask": np.ones((1, 5), np.int32)}
    made = [node("Attention", inputs, outputs, **attrs)]
    model = models.make(made, {"x": (1, 5, 8)}, ["y"], constants, domains=MS)
    assert unfused(model).graph.node[0].op_type == "Attention"


def test_gradients_pass_attention(models: Models) -> None:
    made = [node("Attention", ["x", "w", "b"], ["y"], num_heads=2)]
    constants = {"w": models.weight(8, 24), "b": models.weight(24)}
    network = import_model(models.make(made, {"x": TOKENS}, ["y"], constants, domains=MS))
    x = torch.rand(2, 5, 8, requires_grad=True)
    network(x).square().sum().backward()
    assert x.grad is not None and x.grad.abs().min() > 0
    assert all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())


def test_others_stay(models: Models) -> None:
    model = models.make([node("Inverse", ["x"], ["y"])], {"x": (2, 2)}, ["y"], domains=MS)
    assert unfused(model) is model
    plain = models.make([helper.make_node("Relu", ["x"], ["y"])], {"x": (2, 2)}, ["y"])
    assert unfused(plain) is plain


def test_a_file_that_onnxruntime_optimised(models: Models, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "w2"], ["d"]),
        helper.make_node("Sigmoid", ["d"], ["g"]),
        helper.make_node("Mul", ["d", "g"], ["y"]),
    ]
    constants = {"w1": models.weight(4, 4, 3, 3), "b": models.weight(4), "w2": models.weight(6, 4, 1, 1)}
    model = models.make(nodes, {"x": IMAGE}, ["y"], constants)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fast.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = onnx.load(tmp_path / "fast.onnx")
    assert {n.op_type for n in given.graph.node} == {"FusedConv", "Conv", "QuickGelu"}
    check(models, given, ["Conv", "Relu", "Conv", "Sigmoid", "Mul"])


def test_a_file_for_one_kind_of_cpu_says_so(models: Models, tmp_path: Path) -> None:
    """What ONNX Runtime saves at its default level: weights in blocks, which nobody else can read."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4), helper.make_node("Relu", ["c"], ["y"])]
    model = models.make(nodes, {"x": ("N", 32, 6, 6)}, ["y"], {"w": models.weight(32, 32, 3, 3)})
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, str(tmp_path / "fast.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = onnx.load(tmp_path / "fast.onnx")
    blocked = {n.op_type for n in given.graph.node if n.domain == "com.microsoft.nchwc"}
    if not blocked:
        pytest.skip("ONNX Runtime does not block channels on this CPU")
    network = import_model(given)
    reasons = {leaf.proto.op_type: leaf.reason for _, leaf in opaque_leaves(network)}
    assert set(reasons) == blocked and all("ORT_ENABLE_EXTENDED" in r for r in reasons.values())
    feeds = models.feeds(model)
    np.testing.assert_allclose(models.forward(network, feeds)[0], run_ort(model, feeds)[0], rtol=1e-4, atol=1e-4)
