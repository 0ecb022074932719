from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import NodeProto, helper

from hantc.dialect.rewrites.fold_pad import FoldPad

if TYPE_CHECKING:
    from tests.dialect.rewrites.conftest import Rewriting

W = (np.random.default_rng(0).standard_normal((4, 4, 3, 3)) * 0.5).astype(np.float32)


def node(op: str, inputs: list[str], outputs: list[str], **attrs: Any) -> NodeProto:
    return helper.make_node(op, inputs, outputs, **attrs)


def pad(*pads: int, mode: str = "constant", value: float | None = None) -> tuple[NodeProto, dict[str, Any]]:
    constants: dict[str, Any] = {"pads": np.array(pads), "w": W}
    if value is not None:
        constants["value"] = np.array(value, np.float32)
    return node("Pad", ["x", "pads", *(["value"] if value is not None else [])], ["p"], mode=mode), constants


@pytest.mark.parametrize("own", [[0] * 4, [1, 0, 0, 2]])
def test_into_conv(rewriting: Rewriting, own: list[int]) -> None:
    first, constants = pad(0, 0, 0, 1, 0, 0, 1, 2)
    r = rewriting.run(FoldPad(), [first, node("Conv", ["p", "w"], ["y"], pads=own, strides=[2, 2])], constants)
    assert r.before == ["Pad", "Conv"] and r.after == ["Conv"] and r.missed == []


def test_into_two_convs(rewriting: Rewriting) -> None:
    first, constants = pad(0, 0, 1, 1, 0, 0, 1, 1)
    nodes = [first, node("Conv", ["p", "w"], ["a"]), node("Conv", ["p", "w"], ["b"]), node("Add", ["a", "b"], ["y"])]
    assert rewriting.run(FoldPad(), nodes, constants).after == ["Conv", "Conv", "Add"]


@pytest.mark.parametrize("attrs", [{}, {"count_include_pad": 1, "pads": [1, 0, 0, 1]}, {"count_include_pad": 1}])
def test_into_average_pool(rewriting: Rewriting, attrs: dict[str, Any]) -> None:
    first, constants = pad(0, 0, 0, 1, 0, 0, 1, 1)
    nodes = [first, node("AveragePool", ["p"], ["y"], kernel_shape=[3, 3], **attrs)]
    assert rewriting.run(FoldPad(), nodes, constants).after == ["AveragePool"]


def test_into_max_pool_of_what_is_not_negative(rewriting: Rewriting) -> None:
    first, constants = pad(0, 0, 1, 1, 0, 0, 1, 1)
    first.input[0] = "r"
    nodes = [node("Relu", ["x"], ["r"]), first, node("MaxPool", ["p"], ["y"], kernel_shape=[3, 3], strides=[2, 2])]
    assert rewriting.run(FoldPad(), nodes, constants).after == ["Relu", "MaxPool"]


@pytest.mark.parametrize("value", [-np.inf, float(np.finfo(np.float32).min)])
def test_lowest_values_into_max_pool(rewriting: Rewriting, value: float) -> None:
    """As "same" padding of maxima is exported, of values of either sign."""
    first, constants = pad(0, 0, 0, 1, 0, 0, 1, 1, value=value)
    r = rewriting.run(FoldPad(), [first, node("MaxPool", ["p"], ["y"], kernel_shape=[3, 3], strides=[2, 2])], constants)
    assert r.after == ["MaxPool"] and r.missed == []


@pytest.mark.parametrize(
    ("user", "reason"),
    [
        (node("Conv", ["p", "w"], ["y"]), "not zeros"),
        (node("AveragePool", ["p"], ["y"], kernel_shape=[3, 3]), "which is no value"),
        (node("MaxPool", ["p"], ["y"], kernel_shape=[1, 1]), "by a whole window"),
    ],
    ids=["Conv", "AveragePool", "MaxPool"],
)
def test_lowest_values_into_anything_else(rewriting: Rewriting, user: NodeProto, reason: str) -> None:
    first, constants = pad(0, 0, 1, 1, 0, 0, 1, 1, value=-np.inf)
    applied, missed = FoldPad().apply(rewriting.graph([first, user], constants))
    assert not applied and reason in missed[0].reason


@pytest.mark.parametrize(
    ("pads", "how", "user", "reason"),
    [
        ((0, 1, 0, 0, 0, 0, 0, 0), {}, node("Relu", ["p"], ["y"]), "pads batch or channels"),
        ((0, 0, -1, 0, 0, 0, 0, 0), {}, node("Conv", ["p", "w"], ["y"]), "negative"),
        ((0, 0, 1, 1, 0, 0, 1, 1), {"value": 1.0}, node("Conv", ["p", "w"], ["y"]), "pads with 1, not zeros"),
        ((0, 0, 1, 1, 0, 0, 1, 1), {"mode": "reflect"}, node("Conv", ["p", "w"], ["y"]), "pads with reflect"),
        ((0, 0, 1, 1, 0, 0, 1, 1), {}, node("Relu", ["p"], ["y"]), "something other than a convolution"),
        ((0, 0, 1, 1, 0, 0, 1, 1), {}, node("MaxPool", ["p"], ["y"], kernel_shape=[3, 3]), "negative values"),
        ((0, 0, 3, 1, 0, 0, 1, 1), {}, node("AveragePool", ["p"], ["y"], kernel_shape=[3, 3]), "whole window"),
        (
            (0, 0, 1, 1, 0, 0, 1, 1),
            {},
            node("AveragePool", ["p"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            "leaves its own padding out",
        ),
        (
            (0, 0, 1, 1, 0, 0, 1, 1),
            {},
            node("AveragePool", ["p"], ["y"], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
            "rounds its size up",
        ),
    ],
)
def test_pads_that_stay(
    rewriting: Rewriting, pads: tuple[int, ...], how: dict[str, Any], user: NodeProto, reason: str
) -> None:
    first, constants = pad(*pads, **how)
    r = rewriting.run(FoldPad(), [first, user], constants)
    assert r.after == r.before and reason in r.reasons[0]


def test_one_user_that_cannot_keeps_the_pad(rewriting: Rewriting) -> None:
    first, constants = pad(0, 0, 1, 1, 0, 0, 1, 1)
    nodes = [first, node("Conv", ["p", "w"], ["y"]), node("Relu", ["p"], ["z"])]
    r = rewriting.run(FoldPad(), nodes, constants, outputs=("y", "z"))
    assert r.applied == [] and len(r.missed) == 1
