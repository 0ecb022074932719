from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from onnx import NodeProto, helper

from hantc.dialect.conv import Conv
from hantc.dialect.graph import leaf_of, node_named
from hantc.dialect.rewrites.fold_norm import FoldAffine, FoldNorm

if TYPE_CHECKING:
    from tests.dialect.conftest import Array
    from tests.dialect.rewrites.conftest import Rewriting

RNG = np.random.default_rng(3)


def node(op: str, inputs: list[str], outputs: list[str], **attrs: Any) -> NodeProto:
    return helper.make_node(op, inputs, outputs, **attrs)


def w(*shape: int) -> Array:
    return (RNG.standard_normal(shape) * 0.5).astype(np.float32)


def norm(x: str, y: str) -> NodeProto:
    return node("BatchNormalization", [x, "s", "b", "m", "v"], [y])


def norm_constants(channels: int = 4) -> dict[str, Any]:
    return {"s": w(channels), "b": w(channels), "m": w(channels), "v": np.abs(w(channels)) + 0.2}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_norm_after_conv(rewriting: Rewriting, bias: bool, groups: int) -> None:
    nodes = [node("Conv", ["x", "w", *(["k"] if bias else [])], ["a"], group=groups, pads=[1] * 4), norm("a", "y")]
    r = rewriting.run(FoldNorm(), nodes, {"w": w(4, 4 // groups, 3, 3), "k": w(4)} | norm_constants())
    assert r.before == ["Conv", "BatchNormalization"] and r.after == ["Conv"] and r.missed == []
    assert r.applied[0].nodes == ("conv_0", "batchnormalization_0")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_norm_after_transposed_conv(rewriting: Rewriting, bias: bool, groups: int) -> None:
    """As in decoders; engines leave the norm there."""
    inputs = ["x", "w", *(["k"] if bias else [])]
    nodes = [node("ConvTranspose", inputs, ["a"], group=groups, strides=[2, 2]), norm("a", "y")]
    r = rewriting.run(FoldNorm(), nodes, {"w": w(4, 6 // groups, 3, 3), "k": w(6)} | norm_constants(6))
    assert r.after == ["ConvTranspose"] and r.missed == []


def test_norm_after_transposed_conv_that_others_read(rewriting: Rewriting) -> None:
    nodes = [node("ConvTranspose", ["x", "w"], ["a"]), norm("a", "y"), node("Relu", ["a"], ["z"])]
    r = rewriting.run(FoldNorm(), nodes, {"w": w(4, 4, 3, 3)} | norm_constants(), outputs=("y", "z"))
    assert r.after == r.before and "is used elsewhere too" in r.reasons[0]


@pytest.mark.parametrize("transposed", [0, 1])
def test_norm_after_gemm(rewriting: Rewriting, transposed: int) -> None:
    nodes = [node("Gemm", ["x", "w", "k"], ["a"], transB=transposed), norm("a", "y")]
    r = rewriting.run(FoldNorm(), nodes, {"w": w(4, 4), "k": w(4)} | norm_constants(), x=("N", 4))
    assert r.after == ["Gemm"]


def test_norm_after_matmul_of_two_dims(rewriting: Rewriting) -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"]), norm("a", "y")]
    r = rewriting.run(FoldNorm(), nodes, {"w": w(6, 4)} | norm_constants(), x=("N", 6))
    assert r.after == ["MatMul", "Add"] and r.missed == []


def test_norm_after_matmul_of_tokens_runs_along_the_tokens(rewriting: Rewriting) -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"]), norm("a", "y")]
    r = rewriting.run(FoldNorm(), nodes, {"w": w(6, 4)} | norm_constants(), x=("N", 4, 6))
    assert r.applied == [] and "another dim" in r.reasons[0]


@pytest.mark.parametrize("groups", [1, 2])
def test_norm_before_conv_without_padding(rewriting: Rewriting, groups: int) -> None:
    nodes = [norm("x", "a"), node("Conv", ["a", "w", "k"], ["y"], group=groups)]
    r = rewriting.run(FoldNorm(), nodes, {"w": w(6, 4 // groups, 3, 3), "k": w(6)} | norm_constants())
    assert r.after == ["Conv"] and r.missed == []


def test_norm_before_padded_conv_stays(rewriting: Rewriting) -> None:
    nodes = [norm("x", "a"), node("Conv", ["a", "w"], ["y"], pads=[1] * 4)]
    r = rewriting.run(FoldNorm(), nodes, {"w": w(6, 4, 3, 3)} | norm_constants())
    assert r.applied == [] and r.after == r.before
    assert r.reasons == ["conv_0 pads with zeros, which the shift would not reach"]


def test_norm_without_shift_before_padded_conv(rewriting: Rewriting) -> None:
    nodes = [norm("x", "a"), node("Conv", ["a", "w"], ["y"], pads=[1] * 4)]
    zero = {"b": np.zeros(4, np.float32), "m": np.zeros(4, np.float32)}
    r = rewriting.run(FoldNorm(), nodes, {"w": w(6, 4, 3, 3)} | norm_constants() | zero)
    leaf = leaf_of(r.module, node_named(r.module, "conv_0"))
    assert r.after == ["Conv"] and isinstance(leaf, Conv) and leaf.bias is None


def test_norm_before_several_convs(rewriting: Rewriting) -> None:
    nodes = [norm("x", "a"), node("Conv", ["a", "w"], ["y"]), node("Conv", ["a", "u"], ["z"])]
    r = rewriting.run(
        FoldNorm(), nodes, {"w": w(6, 4, 1, 1), "u": w(2, 4, 3, 3)} | norm_constants(), outputs=("y", "z")
    )
    assert r.after == ["Conv", "Conv"]


def test_norm_before_gemm(rewriting: Rewriting) -> None:
    nodes = [norm("x", "a"), node("Gemm", ["a", "w"], ["y"])]
    assert rewriting.run(FoldNorm(), nodes, {"w": w(4, 3)} | norm_constants(), x=("N", 4)).after == ["Gemm"]


def test_conv_used_elsewhere_too(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), norm("a", "b1"), node("Add", ["a", "b1"], ["y"])]
    r = rewriting.run(FoldNorm(), nodes, {"w": w(4, 4, 1, 1)} | norm_constants())
    assert r.after == r.before and r.reasons == ["the value of conv_0 is used elsewhere too"]


def test_conv_that_is_an_output_too(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), norm("a", "y")]
    r = rewriting.run(FoldNorm(), nodes, {"w": w(4, 4, 1, 1)} | norm_constants(), outputs=("a", "y"))
    assert r.applied == [] and len(r.missed) == 1


def test_shared_weights(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), norm("a", "c"), node("Conv", ["c", "w"], ["y"])]
    module = rewriting.graph(nodes, {"w": w(4, 4, 3, 3)} | norm_constants(), x=("N", 4, 9, 9))
    node_named(module, "conv_1").target = "conv_0"
    module.recompile()
    r = rewriting.apply(FoldNorm(), module)
    assert r.applied == [] and r.reasons == ["the weights of conv_0 are used elsewhere too"]


def test_norm_with_nothing_beside(rewriting: Rewriting) -> None:
    nodes = [node("Relu", ["x"], ["a"]), norm("a", "c"), node("Relu", ["c"], ["y"])]
    r = rewriting.run(FoldNorm(), nodes, norm_constants())
    assert r.after == r.before and r.reasons == ["no convolution or matrix product right before or after it"]


def test_broken_statistics(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), norm("a", "y")]
    module = rewriting.graph(nodes, {"w": w(4, 4, 1, 1)} | norm_constants())
    module.get_buffer("batchnormalization_0.running_var").fill_(-1)
    assert [m.reason for m in FoldNorm().apply(module)[1]] == ["its constants are not finite"]


def test_half_precision_weights_stay_half(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), norm("a", "y")]
    module = rewriting.graph(nodes, {"w": w(4, 4, 1, 1)} | norm_constants()).half()
    FoldNorm().apply(module)
    leaf = leaf_of(module, node_named(module, "conv_0"))
    assert isinstance(leaf, Conv) and leaf.bias is not None and leaf.weight.dtype == leaf.bias.dtype == torch.float16


# --- constant arithmetic


@pytest.mark.parametrize("shape", [(), (1,), (4, 1, 1), (1, 4, 1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("op", ["Mul", "Add", "Sub", "Div"])
def test_constant_after_conv(rewriting: Rewriting, op: str, shape: tuple[int, ...]) -> None:
    constants = {"w": w(4, 4, 3, 3), "k": w(4), "c": np.abs(w(*shape)) + np.float32(0.5)}
    r = rewriting.run(
        FoldAffine(), [node("Conv", ["x", "w", "k"], ["a"], pads=[1] * 4), node(op, ["a", "c"], ["y"])], constants
    )
    assert r.before == ["Conv", op] and r.after == ["Conv"] and r.missed == []


@pytest.mark.parametrize("op", ["Mul", "Add", "Sub"])
def test_constant_on_the_left(rewriting: Rewriting, op: str) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node(op, ["c", "a"], ["y"])]
    assert rewriting.run(FoldAffine(), nodes, {"w": w(4, 4, 1, 1), "c": w(4, 1, 1)}).after == ["Conv"]


def test_a_chain_of_constants(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Mul", ["a", "c"], ["b"]), node("Add", ["b", "d"], ["y"])]
    r = rewriting.run(FoldAffine(), nodes, {"w": w(4, 4, 1, 1), "c": w(4, 1, 1), "d": w(1, 4, 1, 1)})
    assert r.after == ["Conv"] and len(r.applied) == 2


def test_bias_after_matmul_of_tokens(rewriting: Rewriting) -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Add", ["k", "a"], ["y"])]
    r = rewriting.run(FoldAffine(), nodes, {"w": w(6, 3), "k": w(3)}, x=("N", 5, 6))
    assert r.after == ["MatMul", "Add"] and len(r.applied) == 1
    assert not [n for n in r.module.graph.nodes if n.op == "get_attr"]


@pytest.mark.parametrize(
    ("op", "ends", "shape", "reason"),
    [
        ("Add", ["a", "c"], (8, 8), "varies along more than the channels"),
        ("Add", ["a", "c"], (8,), "varies along more than the channels"),
        ("Mul", ["a", "c"], (1, 1, 4, 1, 1), "more dims"),
        ("Div", ["c", "a"], (4, 1, 1), "Div with this constant is no scaling or shift"),
        ("Pow", ["a", "c"], (), "Pow with this constant is no scaling or shift"),
    ],
)
def test_constants_that_stay(
    rewriting: Rewriting, op: str, ends: list[str], shape: tuple[int, ...], reason: str
) -> None:
    constants = {"w": w(4, 4, 1, 1), "c": np.full(shape, 2, np.float32)}
    r = rewriting.run(FoldAffine(), [node("Conv", ["x", "w"], ["a"]), node(op, ends, ["y"])], constants)
    assert r.after == r.before and reason in r.reasons[0]


def test_constant_that_widens_one_channel(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Mul", ["a", "c"], ["y"])]
    r = rewriting.run(FoldAffine(), nodes, {"w": w(1, 4, 1, 1), "c": w(3, 1, 1)})
    assert r.applied == [] and "varies" in r.reasons[0]


def test_constant_after_conv_used_elsewhere(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Mul", ["a", "c"], ["b"]), node("Add", ["a", "b"], ["y"])]
    r = rewriting.run(FoldAffine(), nodes, {"w": w(4, 4, 1, 1), "c": w(4, 1, 1)})
    assert r.applied == [] and r.reasons == ["the value of conv_0 is used elsewhere too"]


def test_constant_after_something_else_is_no_near_match(rewriting: Rewriting) -> None:
    r = rewriting.run(FoldAffine(), [node("Relu", ["x"], ["a"]), node("Mul", ["a", "c"], ["y"])], {"c": w(4, 1, 1)})
    assert r.applied == [] and r.missed == []


@pytest.mark.parametrize(
    ("op", "pads", "folds"), [("Mul", 1, True), ("Div", 1, True), ("Sub", 0, True), ("Sub", 1, False)]
)
def test_constant_before_convs(rewriting: Rewriting, op: str, pads: int, folds: bool) -> None:
    """As where a file begins with its own preprocessing; a shift does not reach the zeros of padding."""
    nodes = [
        node(op, ["x", "c"], ["a"]),
        node("Conv", ["a", "w"], ["p"], pads=[pads] * 4),
        node("Conv", ["a", "w2"], ["q"], pads=[pads] * 4),
        node("Add", ["p", "q"], ["y"]),
    ]
    constants = {"c": np.abs(w(1, 4, 1, 1)) + 0.5, "w": w(5, 4, 3, 3), "w2": w(5, 4, 3, 3)}
    r = rewriting.run(FoldAffine(), nodes, constants)
    assert r.after == ([] if folds else [op]) + ["Conv", "Conv", "Add"]
    assert folds or "pads with zeros" in r.reasons[0]


@pytest.mark.parametrize("op", ["Mul", "Add"])
def test_constant_that_makes_channels_of_one(rewriting: Rewriting, op: str) -> None:
    """Grey images made colour: the convolution behind would get one channel."""
    nodes = [node(op, ["x", "c"], ["a"]), node("Conv", ["a", "w"], ["y"])]
    r = rewriting.run(FoldAffine(), nodes, {"c": w(1, 3, 1, 1), "w": w(5, 3, 3, 3)}, x=("N", 1, 8, 8))
    assert r.after == r.before


def test_bias_of_a_name_that_is_free(rewriting: Rewriting) -> None:
    nodes = [node("Relu", ["x"], ["w_bias"]), node("ConvTranspose", ["w_bias", "w"], ["a"]), norm("a", "y")]
    r = rewriting.run(FoldNorm(), nodes, {"w": w(4, 4, 3, 3)} | norm_constants())
    assert r.after == ["Relu", "ConvTranspose"]


@pytest.mark.parametrize("shape", [(8, 8), (1, 4, 8, 1), (4, 4, 1, 1)])
def test_constant_before_conv_along_more_than_channels(rewriting: Rewriting, shape: tuple[int, ...]) -> None:
    nodes = [node("Mul", ["x", "c"], ["a"]), node("Conv", ["a", "w"], ["y"])]
    batch: tuple[int | str, ...] = (4 if shape[0] == 4 else "N", 4, 8, 8)
    graph = rewriting.graph(nodes, {"c": w(*shape), "w": w(5, 4, 3, 3)}, x=batch)
    done, _ = FoldAffine().apply(graph)
    assert not done
