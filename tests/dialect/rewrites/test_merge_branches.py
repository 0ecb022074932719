"""Parallel convolutions become one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import NodeProto, helper

from hantc.dialect.rewrites.merge_branches import MergeBranches

if TYPE_CHECKING:
    from tests.dialect.conftest import Array
    from tests.dialect.rewrites.conftest import Rewriting

RNG = np.random.default_rng(9)


def w(*shape: int) -> Array:
    return (RNG.standard_normal(shape) * 0.5).astype(np.float32)


def norm(channels: int) -> dict[str, Array]:
    positive = {"scale": w(channels), "var": np.abs(w(channels)) + 0.5}
    return {**positive, "shift": w(channels), "mean": w(channels)}


def conv(weight: str, out: str, *bias: str, **attrs: Any) -> NodeProto:
    return helper.make_node("Conv", ["x", weight, *bias], [out], **attrs)


def add(a: str, b: str, out: str = "y") -> NodeProto:
    return helper.make_node("Add", [a, b], [out])


NORM = helper.make_node("BatchNormalization", ["x", "scale", "shift", "mean", "var"], ["n"])
THREE = {"pads": [1] * 4}


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("stride", [1, 2])
def test_3x3_and_1x1(rewriting: Rewriting, order: tuple[str, str], stride: int) -> None:
    nodes = [
        conv("w3", "a", "b3", strides=[stride] * 2, **THREE),
        conv("w1", "b", strides=[stride] * 2),
        add(*order),
    ]
    r = rewriting.run(MergeBranches(), nodes, {"w3": w(6, 4, 3, 3), "b3": w(6), "w1": w(6, 4, 1, 1)})
    assert r.after == ["Conv"]
    assert r.applied[0].note == "merged into add_0"


def test_a_norm_of_the_input_is_a_branch_too(rewriting: Rewriting) -> None:
    nodes = [conv("w3", "a", **THREE), NORM, add("a", "n")]
    r = rewriting.run(MergeBranches(), nodes, {"w3": w(4, 4, 3, 3), **norm(4)})
    assert r.after == ["Conv"]


def test_three_branches(rewriting: Rewriting) -> None:
    nodes = [conv("w5", "a", pads=[2] * 4), conv("w1", "b", "b1"), add("a", "b", "s"), NORM, add("s", "n")]
    r = rewriting.run(MergeBranches(), nodes, {"w5": w(4, 4, 5, 5), "w1": w(4, 4, 1, 1), "b1": w(4), **norm(4)})
    assert r.after == ["Conv"]


@pytest.mark.parametrize("groups", [2, 4])
def test_branches_in_groups(rewriting: Rewriting, groups: int) -> None:
    """MobileOne's: depthwise 3×3, depthwise 1×1, norm."""
    nodes = [conv("w3", "a", group=groups, **THREE), conv("w1", "b", group=groups), add("a", "b", "s"), NORM]
    weights = {"w3": w(4, 4 // groups, 3, 3), "w1": w(4, 4 // groups, 1, 1), **norm(4)}
    r = rewriting.run(MergeBranches(), [*nodes, add("s", "n")], weights)
    assert r.after == ["Conv"]


def test_other_offsets_are_kept(rewriting: Rewriting) -> None:
    nodes = [conv("w3", "a", pads=[2, 2, 0, 0]), conv("w1", "b"), add("a", "b")]
    assert rewriting.run(MergeBranches(), nodes, {"w3": w(4, 4, 3, 3), "w1": w(4, 4, 1, 1)}).after == ["Conv"]


RELU = helper.make_node("Relu", ["b"], ["z"])


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([conv("w3", "a", **THREE), conv("w1", "b"), add("a", "b"), RELU], "elsewhere"),
        ([conv("g3", "a", group=2, **THREE), conv("w1", "b"), add("a", "b")], "other groups"),
        ([conv("w3", "a", pads=[2] * 4, dilations=[2, 2]), conv("w1", "b"), add("a", "b")], "dilated"),
        ([conv("w2", "a", pads=[0, 0, 1, 1]), conv("w3", "b", **THREE), add("a", "b")], ""),
    ],
    ids=["used", "grouped", "dilated", "inside"],
)  # fmt: skip
def test_near_matches(rewriting: Rewriting, nodes: list[NodeProto], reason: str) -> None:
    constants = {"w3": w(4, 4, 3, 3), "w1": w(4, 4, 1, 1), "g3": w(4, 2, 3, 3), "w2": w(4, 4, 2, 2)}
    outputs = ("y", "z") if reason == "elsewhere" else ("y",)
    r = rewriting.run(MergeBranches(), nodes, constants, outputs=outputs)
    if reason:
        assert r.before == r.after
        assert any(reason in m for m in r.reasons)
    else:
        assert r.after == ["Conv"], "values are compared by the fixture"


def test_different_inputs_stay(rewriting: Rewriting) -> None:
    relu, other = helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Conv", ["r", "w1"], ["b"])
    nodes = [conv("w3", "a", **THREE), relu, other, add("a", "b")]
    r = rewriting.run(MergeBranches(), nodes, {"w3": w(4, 4, 3, 3), "w1": w(4, 4, 1, 1)})
    assert r.before == r.after


@pytest.mark.parametrize("order", [("r", "d"), ("d", "r")])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_input_itself_is_a_branch(rewriting: Rewriting, order: tuple[str, str], groups: int) -> None:
    """As position encodings of vision transformers are: x + depthwise(x); x is read elsewhere too."""
    relu, last = helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Relu", ["r"], ["z"])
    nodes = [relu, helper.make_node("Conv", ["r", "w"], ["d"], group=groups, pads=[1] * 4), add(*order), last]
    r = rewriting.run(MergeBranches(), nodes, {"w": w(4, 4 // groups, 3, 3)}, outputs=("y", "z"))
    assert sorted(r.after) == ["Conv", "Relu", "Relu"]


def test_a_convolution_added_to_its_own_input_convolved(rewriting: Rewriting) -> None:
    """a = conv(x), y = a + conv(a): the second is the one that merges."""
    nodes = [conv("w3", "a", **THREE), helper.make_node("Conv", ["a", "w1"], ["b"]), add("a", "b")]
    r = rewriting.run(MergeBranches(), nodes, {"w3": w(4, 4, 3, 3), "w1": w(4, 4, 1, 1)})
    assert r.after == ["Conv", "Conv"]
