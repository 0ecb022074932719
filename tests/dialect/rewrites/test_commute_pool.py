"""Pointwise convolutions and average poolings change places where that saves arithmetic, and only where it is equal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from onnx import NodeProto, helper

from hantc.dialect.rewrites.commute_pool import CommutePool

if TYPE_CHECKING:
    from tests.dialect.conftest import Array
    from tests.dialect.rewrites.conftest import Rewriting

RNG = np.random.default_rng(7)


def w(*shape: int) -> Array:
    return (RNG.standard_normal(shape) * 0.5).astype(np.float32)


def conv(x: str, y: str, **attrs: Any) -> NodeProto:
    return helper.make_node("Conv", [x, "w", "b"], [y], **attrs)


def pool(x: str, y: str, **attrs: Any) -> NodeProto:
    return helper.make_node("AveragePool", [x], [y], **attrs)


DENSENET = {"kernel_shape": [2, 2], "strides": [2, 2]}
INCEPTION = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    "attrs",
    [
        DENSENET,
        {**DENSENET, "ceil_mode": 1},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [3, 2], "strides": [3, 2], "pads": [0, 1, 2, 0]},
    ],
)
def test_a_transition_pools_first(rewriting: Rewriting, attrs: dict[str, Any]) -> None:
    nodes = [conv("x", "a"), pool("a", "y", **attrs)]
    r = rewriting.run(CommutePool(), nodes, {"w": w(6, 4, 1, 1), "b": w(6)}, x=("N", 4, 9, 9))
    assert r.before == ["Conv", "AveragePool"] and r.after == ["AveragePool", "Conv"]
    assert r.applied[0].nodes == ("conv_0", "averagepool_0") and "exchanged" in r.applied[0].note


def test_a_pooling_branch_convolves_first(rewriting: Rewriting) -> None:
    nodes = [pool("x", "a", **INCEPTION), conv("a", "y")]
    r = rewriting.run(CommutePool(), nodes, {"w": w(2, 12, 1, 1), "b": w(2)}, x=("N", 12, 8, 8))
    assert r.before == ["AveragePool", "Conv"] and r.after == ["Conv", "AveragePool"]


def test_global_pooling_comes_first(rewriting: Rewriting) -> None:
    nodes = [conv("x", "a"), helper.make_node("GlobalAveragePool", ["a"], ["y"])]
    r = rewriting.run(CommutePool(), nodes, {"w": w(6, 4, 1, 1), "b": w(6)})
    assert r.after == ["GlobalAveragePool", "Conv"]
    again, _ = CommutePool().apply(r.module)
    assert again == []


def test_what_follows_reads_the_last(rewriting: Rewriting) -> None:
    nodes = [
        conv("x", "a"),
        pool("a", "p", **DENSENET),
        helper.make_node("Relu", ["p"], ["r"]),
        helper.make_node("Add", ["p", "r"], ["y"]),
    ]
    r = rewriting.run(CommutePool(), nodes, {"w": w(6, 4, 1, 1), "b": w(6)}, outputs=("p", "y"))
    assert r.after == ["AveragePool", "Conv", "Relu", "Add"]


@pytest.mark.parametrize(
    ("first", "second", "shape", "reason"),
    [
        (("conv", {"strides": [2, 2]}), ("pool", DENSENET), (6, 4, 1, 1), "skips pixels"),
        (("conv", {"group": 2}), ("pool", DENSENET), (6, 2, 1, 1), "grouped"),
        (("conv", {}), ("pool", {**INCEPTION, "strides": [2, 2], "count_include_pad": 1}), (6, 4, 1, 1), "its padding"),
        (("pool", INCEPTION), ("conv", {}), (12, 4, 1, 1), "would take"),
        (("pool", DENSENET), ("conv", {}), (6, 4, 1, 1), "would take"),
    ],
)
def test_pairs_that_stay(
    rewriting: Rewriting,
    first: tuple[str, dict[str, Any]],
    second: tuple[str, dict[str, Any]],
    shape: tuple[int, ...],
    reason: str,
) -> None:
    make = {"conv": conv, "pool": pool}
    nodes = [make[first[0]]("x", "a", **first[1]), make[second[0]]("a", "y", **second[1])]
    r = rewriting.run(CommutePool(), nodes, {"w": w(*shape), "b": w(shape[0])})
    assert r.after == r.before and reason in r.reasons[0]


@pytest.mark.parametrize("kind", ["MaxPool", "Relu"])
def test_what_is_no_mean_is_no_near_match(rewriting: Rewriting, kind: str) -> None:
    attrs: dict[str, Any] = DENSENET if kind == "MaxPool" else {}
    nodes = [conv("x", "a"), helper.make_node(kind, ["a"], ["y"], **attrs)]
    r = rewriting.run(CommutePool(), nodes, {"w": w(6, 4, 1, 1), "b": w(6)})
    assert r.applied == [] and r.missed == []


def test_a_value_that_others_read_stays(rewriting: Rewriting) -> None:
    nodes = [conv("x", "a"), pool("a", "y", **DENSENET)]
    r = rewriting.run(CommutePool(), nodes, {"w": w(6, 4, 1, 1), "b": w(6)}, outputs=("a", "y"))
    assert r.applied == []


def test_open_sizes(rewriting: Rewriting) -> None:
    module = rewriting.graph(
        [conv("x", "a"), pool("a", "y", **DENSENET)], {"w": w(6, 4, 1, 1), "b": w(6)}, x=("N", 4, "H", "W")
    )
    applied, missed = CommutePool().apply(module)
    assert applied == [] and "sizes are unknown" in missed[0].reason
    assert module(torch.zeros(1, 4, 6, 6, dtype=torch.float64)).shape == (1, 6, 3, 3)
