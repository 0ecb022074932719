from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from onnx import NodeProto, helper

from hantc.dialect.rewrites.shortcut_conv import ShortcutConv

if TYPE_CHECKING:
    from tests.dialect.rewrites.conftest import Rewriting

IMAGE = ("N", 4, 9, 8)
BIG = 2**31 - 1


def cut(name: str, source: str) -> NodeProto:
    return helper.make_node("Slice", [source, *(f"{name}_{k}" for k in ("starts", "ends", "axes", "steps"))], [name])


def bounds(name: str, starts: list[int], ends: list[int], axes: list[int], steps: list[int]) -> dict[str, np.ndarray]:
    values = {"starts": starts, "ends": ends, "axes": axes, "steps": steps}
    return {f"{name}_{k}": np.array(v, np.int64) for k, v in values.items()}


def block(*shortcut: NodeProto, last: str) -> list[NodeProto]:
    """A strided convolution and the sum with a shortcut whose last value is `last`."""
    conv = helper.make_node("Conv", ["x", "w"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1])
    return [*shortcut, conv, helper.make_node("Add", ["c", last], ["y"])]


def pad(source: str, pads: list[int]) -> tuple[NodeProto, dict[str, np.ndarray]]:
    return helper.make_node("Pad", [source, "pads"], ["p"]), {"pads": np.array(pads, np.int64)}


def weight(channels: int) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(0).standard_normal((channels, 4, 3, 3)).astype(np.float32)}


@pytest.mark.parametrize("pads", [[0, 4, 0, 0, 0, 4, 0, 0], [0, 0, 0, 0, 0, 3, 0, 0]])
def test_one_slice_and_a_pad(rewriting: Rewriting, pads: list[int]) -> None:
    node, constants = pad("s", pads)
    constants |= bounds("s", [0, 0], [9, BIG], [2, 3], [2, 2]) | weight(4 + sum(pads))
    r = rewriting.run(ShortcutConv(), block(cut("s", "x"), node, last="p"), constants, x=IMAGE)
    assert sorted(r.before) == ["Add", "Conv", "Pad", "Slice"]
    assert sorted(r.after) == ["Add", "Conv", "Conv"]
    assert "stride [2, 2]" in r.applied[0].note


def test_a_slice_for_each_axis(rewriting: Rewriting) -> None:
    node, constants = pad("s2", [0, 2, 0, 0, 0, 2, 0, 0])
    constants |= bounds("s1", [0], [BIG], [2], [2]) | bounds("s2", [-8], [BIG], [-1], [2]) | weight(8)
    r = rewriting.run(ShortcutConv(), block(cut("s1", "x"), cut("s2", "s1"), node, last="p"), constants, x=IMAGE)
    assert sorted(r.after) == ["Add", "Conv", "Conv"]
    assert len(r.applied[0].nodes) == 3


def test_a_slice_that_leaves_pixels_out_stays(rewriting: Rewriting) -> None:
    """Its Pad becomes a convolution all the same: that is what breaks the layout."""
    node, constants = pad("s", [0, 4, 0, 0, 0, 0, 0, 0])
    constants |= bounds("s", [1, 0], [9, BIG], [2, 3], [2, 2]) | weight(8)
    nodes = block(cut("s", "x"), node, last="p")
    nodes[2] = helper.make_node("Conv", ["x", "w"], ["c"], strides=[2, 2], pads=[0, 1, 0, 1])
    r = rewriting.run(ShortcutConv(), nodes, constants, x=IMAGE)
    assert sorted(r.after) == ["Add", "Conv", "Conv", "Slice"]


@pytest.mark.parametrize("pads", [[0, 2, 1, 0, 0, 2, 0, 0], [0, -1, 0, 0, 0, 5, 0, 0], [1, 0, 0, 0, 0, 4, 0, 0]])
def test_other_padding_stays(rewriting: Rewriting, pads: list[int]) -> None:
    node, constants = pad("x", pads)
    out = ("N", 4 + pads[1] + pads[5], 9 + pads[2], 8)
    nodes = [node, helper.make_node("Add", ["p", "one"], ["y"])]
    r = rewriting.run(ShortcutConv(), nodes, {**constants, "one": np.ones((1, *out[1:]), np.float32)}, x=IMAGE)
    assert r.after == r.before


def test_a_pad_that_is_no_shortcut_stays(rewriting: Rewriting) -> None:
    node, constants = pad("x", [0, 0, 0, 0, 0, 4, 0, 0])
    r = rewriting.run(ShortcutConv(), [node, helper.make_node("Relu", ["p"], ["y"])], constants, x=IMAGE)
    assert r.after == ["Pad", "Relu"]


def test_a_cut_value_with_other_readers_stays(rewriting: Rewriting) -> None:
    node, constants = pad("s", [0, 0, 0, 0, 0, 4, 0, 0])
    constants |= bounds("s", [0, 0], [BIG, BIG], [2, 3], [2, 2]) | weight(8)
    nodes = [*block(cut("s", "x"), node, last="p"), helper.make_node("Relu", ["s"], ["z"])]
    r = rewriting.run(ShortcutConv(), nodes, constants, x=IMAGE, outputs=("y", "z"))
    assert sorted(r.after) == ["Add", "Conv", "Conv", "Relu", "Slice"]


@pytest.mark.parametrize(("start", "end"), [(0, 4), (0, 2), (-2, BIG)])
def test_a_slice_of_the_batch_stays(rewriting: Rewriting, start: int, end: int) -> None:
    """The batch is free: how large it is here says nothing of how large it will be."""
    node, constants = pad("s", [0, 4, 0, 0, 0, 0, 0, 0])
    constants |= bounds("s", [start, 0, 0], [end, BIG, BIG], [0, 2, 3], [1, 2, 2])
    constants["one"] = np.ones((1, 8, 5, 4), np.float32)
    nodes = [cut("s", "x"), node, helper.make_node("Add", ["p", "one"], ["y"])]
    r = rewriting.run(ShortcutConv(), nodes, constants, x=IMAGE)
    assert "Slice" in r.after


def test_backward_slices_stay(rewriting: Rewriting) -> None:
    node, constants = pad("s", [0, 4, 0, 0, 0, 0, 0, 0])
    constants |= bounds("s", [-1], [-BIG], [2], [-1])
    constants["one"] = np.ones((1, 8, 9, 8), np.float32)
    nodes = [cut("s", "x"), node, helper.make_node("Add", ["p", "one"], ["y"])]
    r = rewriting.run(ShortcutConv(), nodes, constants, x=IMAGE)
    assert "Slice" in r.after
