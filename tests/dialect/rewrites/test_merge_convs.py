from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import NodeProto, helper

from hantc.dialect.importer import import_model
from hantc.dialect.rewrites.merge_convs import MergeConvs, MergeLinears

if TYPE_CHECKING:
    from tests.dialect.conftest import Array
    from tests.dialect.rewrites.conftest import Rewriting

RNG = np.random.default_rng(5)


def w(*shape: int) -> Array:
    return (RNG.standard_normal(shape) * 0.5).astype(np.float32)


def convs(first: dict[str, Any], second: dict[str, Any], *, biases: str = "") -> list[NodeProto]:
    a = ["x", "w1", *(["b1"] if "1" in biases else [])]
    b = ["a", "w2", *(["b2"] if "2" in biases else [])]
    return [
        helper.make_node("Conv", a, ["a"], **first),
        helper.make_node("Conv", b, ["y"], **second),
    ]


@pytest.mark.parametrize("biases", ["", "1", "2", "12"])
@pytest.mark.parametrize("stride", [1, 2])
def test_wide_pointwise_then_3x3(rewriting: Rewriting, biases: str, stride: int) -> None:
    constants = {"w1": w(16, 4, 1, 1), "b1": w(16), "w2": w(6, 16, 3, 3), "b2": w(6)}
    nodes = convs({}, {"strides": [stride] * 2, "dilations": [1, 2]}, biases=biases)
    r = rewriting.run(MergeConvs(), nodes, constants)
    assert r.before == ["Conv", "Conv"] and r.after == ["Conv"]
    assert r.applied[0].nodes == ("conv_0", "conv_1") and "multiply-accumulates" in r.applied[0].note


@pytest.mark.parametrize("biases", ["", "12"])
def test_3x3_then_pointwise(rewriting: Rewriting, biases: str) -> None:
    constants = {"w1": w(16, 4, 3, 3), "b1": w(16), "w2": w(6, 16, 1, 1), "b2": w(6)}
    nodes = convs({"pads": [1, 0, 1, 2], "strides": [1, 2]}, {"strides": [2, 1]}, biases=biases)
    assert rewriting.run(MergeConvs(), nodes, constants).after == ["Conv"]


def test_padded_second_without_a_bias_in_the_first(rewriting: Rewriting) -> None:
    constants = {"w1": w(16, 4, 1, 1), "w2": w(6, 16, 3, 3), "b2": w(6)}
    assert rewriting.run(MergeConvs(), convs({}, {"pads": [1] * 4}, biases="2"), constants).after == ["Conv"]


def test_three_in_a_row(rewriting: Rewriting) -> None:
    nodes = [*convs({}, {}), helper.make_node("Conv", ["y", "w3"], ["z"])]
    constants = {"w1": w(8, 4, 1, 1), "w2": w(8, 8, 3, 3), "w3": w(4, 8, 1, 1)}
    assert rewriting.run(MergeConvs(), nodes, constants, outputs=("z",)).after == ["Conv"]


def test_one_dim(rewriting: Rewriting) -> None:
    constants = {"w1": w(8, 4, 1), "w2": w(4, 8, 3)}
    assert rewriting.run(MergeConvs(), convs({}, {}), constants, x=("N", 4, 9)).after == ["Conv"]


@pytest.mark.parametrize(
    ("first", "second", "shapes", "biases", "reason"),
    [
        ({}, {"pads": [1] * 4}, ((16, 4, 1, 1), (6, 16, 3, 3)), "1", "where the first would give its bias"),
        ({"strides": [2, 2]}, {}, ((16, 4, 1, 1), (6, 16, 3, 3)), "", "skips pixels"),
        ({"pads": [1] * 4}, {}, ((16, 4, 1, 1), (6, 16, 3, 3)), "", "the pointwise convolution pads"),
        ({}, {}, ((16, 4, 3, 3), (6, 16, 3, 3)), "", "neither is a plain pointwise"),
        ({}, {"pads": [1] * 4}, ((16, 4, 3, 3), (6, 16, 1, 1)), "", "neither is a plain pointwise"),
        ({"group": 4}, {}, ((4, 1, 3, 3), (6, 4, 1, 1)), "", "lose its groups"),
        ({}, {"group": 2}, ((4, 4, 1, 1), (4, 2, 3, 3)), "", "lose its groups"),
        ({}, {}, ((2, 4, 1, 1), (6, 2, 3, 3)), "", "would take"),  # a low-rank pair
    ],
)
def test_pairs_that_stay(
    rewriting: Rewriting, first: dict[str, Any], second: dict[str, Any], shapes: Any, biases: str, reason: str
) -> None:
    constants = {"w1": w(*shapes[0]), "w2": w(*shapes[1]), "b1": w(shapes[0][0])}
    r = rewriting.run(MergeConvs(), convs(first, second, biases=biases), constants)
    assert r.after == r.before and reason in r.reasons[0]


def test_first_used_elsewhere(rewriting: Rewriting) -> None:
    constants = {"w1": w(16, 4, 1, 1), "w2": w(6, 16, 3, 3)}
    r = rewriting.run(MergeConvs(), convs({}, {}), constants, outputs=("a", "y"))
    assert r.applied == [] and r.reasons == ["the value of conv_0 is used elsewhere too"]


def test_open_sizes(rewriting: Rewriting) -> None:
    constants = {"w1": w(16, 4, 1, 1), "w2": w(6, 16, 3, 3)}
    module = rewriting.graph(convs({}, {}), constants, x=("N", 4, "H", "W"))
    applied, missed = MergeConvs().apply(module)
    assert applied == [] and "sizes are unknown" in missed[0].reason


def test_activation_between_is_no_near_match(rewriting: Rewriting) -> None:
    first, second = convs({}, {})
    second.input[0] = "r"
    nodes = [first, helper.make_node("Relu", ["a"], ["r"]), second]
    r = rewriting.run(MergeConvs(), nodes, {"w1": w(16, 4, 1, 1), "w2": w(6, 16, 3, 3)})
    assert r.applied == [] and r.missed == []


def test_with_growth_grouped_ones_too(rewriting: Rewriting) -> None:
    nodes, constants = convs({"group": 4}, {}), {"w1": w(4, 1, 3, 3), "w2": w(6, 4, 1, 1)}
    assert rewriting.run(MergeConvs(growth=9.0), nodes, constants).after == ["Conv"]
    r = rewriting.run(MergeConvs(growth=1.5), nodes, constants)
    assert r.after == r.before and "would take" in r.reasons[0]


@pytest.mark.parametrize("ops_", [("Gemm", "Gemm"), ("MatMul", "MatMul"), ("Gemm", "MatMul")])
def test_products_in_a_row(rewriting: Rewriting, ops_: tuple[str, str]) -> None:
    """A classifier of low rank whose product is not wider than its factors."""
    weights = {"w1": w(8, 6), "k1": w(6), "w2": w(6, 3), "k2": w(3)}
    first = (
        helper.make_node("Gemm", ["x", "w1", "k1"], ["a"])
        if ops_[0] == "Gemm"
        else helper.make_node("MatMul", ["x", "w1"], ["a"])
    )
    last = (
        helper.make_node("Gemm", ["a", "w2", "k2"], ["y"])
        if ops_[1] == "Gemm"
        else helper.make_node("MatMul", ["a", "w2"], ["y"])
    )
    x = ("N", 8) if "Gemm" in ops_ else ("N", 5, 8)
    r = rewriting.run(MergeLinears(), [first, last], weights, x=x)
    assert r.after == [ops_[0]] and "66 → 24" in r.applied[0].note


def test_products_of_low_rank_stay(rewriting: Rewriting) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w1"], ["a"]), helper.make_node("MatMul", ["a", "w2"], ["y"])]
    r = rewriting.run(MergeLinears(), nodes, {"w1": w(8, 2), "w2": w(2, 8)}, x=("N", 8))
    assert r.after == r.before and "one product would take 64" in r.reasons[0]


def test_a_product_that_others_read_stays(rewriting: Rewriting) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("MatMul", ["a", "w2"], ["y"]),
        helper.make_node("Relu", ["a"], ["z"]),
    ]
    r = rewriting.run(MergeLinears(), nodes, {"w1": w(8, 8), "w2": w(8, 8)}, x=("N", 8), outputs=("y", "z"))
    assert r.after == r.before and "used elsewhere too" in r.reasons[0]


def test_products_too_large_for_their_type_stay(rewriting: Rewriting) -> None:
    weights = {"w1": np.full((8, 6), 1e25, np.float32), "w2": np.full((6, 3), 1e25, np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w1"], ["a"]), helper.make_node("MatMul", ["a", "w2"], ["y"])]
    graph = import_model(rewriting.models.make(nodes, {"x": ("N", 8)}, ["y"], weights))
    applied, missed = MergeLinears().apply(graph)
    assert not applied and "too large for their type" in missed[0].reason
