"""Dequantised and quantised again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import NodeProto, helper

from hantc.dialect.rewrites.drop_requantize import DropRequantize

if TYPE_CHECKING:
    from tests.dialect.rewrites.conftest import Rewriting

SCALES: dict[str, Any] = {
    "s": np.array(0.02, np.float32),
    "z": np.array(120, np.uint8),
    "s2": np.array(0.03, np.float32),
    "z2": np.array(0, np.int8),
    "many": np.array([0.02, 0.5, 0.1], np.float32),
    "zeros": np.array([1, 2, 3], np.uint8),
}


def node(op: str, *ends: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, list(ends[:-1]), [ends[-1]], **attributes)


def chain(*middle: NodeProto) -> list[NodeProto]:
    first, last = node("QuantizeLinear", "x", "s", "z", "q"), node("DequantizeLinear", "p", "s", "z", "y")
    return [first, *middle, last]


def test_the_same_scale(rewriting: Rewriting) -> None:
    pair = [node("DequantizeLinear", "q", "s", "z", "d"), node("QuantizeLinear", "d", "s", "z", "p")]
    r = rewriting.run(DropRequantize(), chain(*pair), SCALES)
    assert r.after == ["QuantizeLinear", "DequantizeLinear"]


def test_a_scale_for_each_channel(rewriting: Rewriting) -> None:
    nodes = [
        node("QuantizeLinear", "x", "many", "zeros", "q", axis=1),
        node("DequantizeLinear", "q", "many", "zeros", "d", axis=1),
        node("QuantizeLinear", "d", "many", "zeros", "p", axis=1),
        node("DequantizeLinear", "p", "many", "zeros", "y", axis=1),
    ]
    r = rewriting.run(DropRequantize(), nodes, SCALES, x=("N", 3, 5, 5))
    assert r.after == ["QuantizeLinear", "DequantizeLinear"]


def test_other_readers_keep_the_value(rewriting: Rewriting) -> None:
    pair = [node("DequantizeLinear", "q", "s", "z", "d"), node("QuantizeLinear", "d", "s", "z", "p")]
    r = rewriting.run(DropRequantize(), [*chain(*pair), node("Relu", "d", "r")], SCALES, outputs=["y", "r"])
    assert sorted(r.after) == ["DequantizeLinear", "DequantizeLinear", "QuantizeLinear", "Relu"]


@pytest.mark.parametrize(("scale", "zero"), [("s2", "z"), ("s", "z2")])
def test_another_grid(rewriting: Rewriting, scale: str, zero: str) -> None:
    middle = [node("DequantizeLinear", "q", "s", "z", "d"), node("QuantizeLinear", "d", scale, zero, "p")]
    last = node("DequantizeLinear", "p", scale, zero, "y")
    r = rewriting.run(DropRequantize(), [*chain(*middle)[:-1], last], SCALES)
    assert r.before == r.after
    assert r.reasons == ["the scales or zero points differ"]


@pytest.mark.parametrize("scale", [1e-40, 1e37, 0.0, np.inf, np.nan])
def test_scales_that_float32_hardly_holds(rewriting: Rewriting, scale: float) -> None:
    pair = [node("DequantizeLinear", "q", "s", "z", "d"), node("QuantizeLinear", "d", "s", "z", "p")]
    graph = rewriting.graph(chain(*pair), {**SCALES, "s": np.array(scale, np.float32)})
    applied, missed = DropRequantize().apply(graph)
    assert applied == [] and len(missed) == 1
