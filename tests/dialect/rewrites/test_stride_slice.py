from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import NodeProto, helper

from hantc.dialect.rewrites.normalize import normalize
from hantc.dialect.rewrites.stride_slice import StrideSlice
from tests.dialect.rewrites.conftest import ops

if TYPE_CHECKING:
    from tests.dialect.rewrites.conftest import Rewriting

BIG = 2**31 - 1
RNG = np.random.default_rng(9)


def node(op: str, inputs: list[str], outputs: list[str], **attrs: Any) -> NodeProto:
    return helper.make_node(op, inputs, outputs, **attrs)


def cut(source: str, name: str) -> NodeProto:
    return node("Slice", [source, "starts", "ends", "axes", "steps"], [name])


def bounds(steps: tuple[int, int] = (2, 2), starts: tuple[int, int] = (0, 0)) -> dict[str, np.ndarray]:
    values = {"starts": starts, "ends": (BIG, BIG), "axes": (2, 3), "steps": steps}
    return {k: np.array(v, np.int64) for k, v in values.items()}


def w(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size", [7, 8, 9])
@pytest.mark.parametrize("steps", [(2, 2), (3, 1)])
@pytest.mark.parametrize("groups", [1, 4])
def test_behind_a_convolution(rewriting: Rewriting, size: int, steps: tuple[int, int], groups: int) -> None:
    """Depthwise ones too: a blur of stride 1 whose pixels are skipped is a blur of stride 2."""
    nodes = [node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1], group=groups), cut("a", "y")]
    r = rewriting.run(StrideSlice(), nodes, {"w": w(4, 4 // groups, 3, 3)} | bounds(steps), x=("N", 4, size, size))
    assert r.after == ["Conv"] and r.missed == []
    assert r.module.conv_0.stride == steps


@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("stride", [1, 2])
def test_behind_a_pooling(rewriting: Rewriting, pool: str, stride: int) -> None:
    nodes = [node(pool, ["x"], ["a"], kernel_shape=[3, 3], pads=[1] * 4, strides=[stride] * 2), cut("a", "y")]
    r = rewriting.run(StrideSlice(), nodes, bounds(), x=("N", 4, 9, 11))
    assert r.after == [pool]


def test_through_activations(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Relu", ["a"], ["b"]), node("Tanh", ["b"], ["c"]), cut("c", "y")]
    r = rewriting.run(StrideSlice(), nodes, {"w": w(4, 4, 3, 3)} | bounds())
    assert r.after == ["Conv", "Relu", "Tanh"]


def test_before_pointwise_convolutions(rewriting: Rewriting) -> None:
    nodes = [cut("x", "s"), node("Conv", ["s", "w1"], ["y"]), node("Conv", ["s", "w2"], ["z"], strides=[2, 1])]
    constants = {"w1": w(4, 4, 1, 1), "w2": w(3, 4, 1, 1)} | bounds()
    r = rewriting.run(StrideSlice(), nodes, constants, outputs=("y", "z"), x=("N", 4, 9, 8))
    assert r.after == ["Conv", "Conv"]
    assert [r.module.conv_0.stride, r.module.conv_1.stride] == [(2, 2), (4, 2)]


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([node("Conv", ["x", "w3"], ["a"]), cut("a", "y"), node("Relu", ["a"], ["z"])], "used elsewhere too"),
        ([cut("x", "s"), node("Conv", ["s", "w3"], ["y"]), node("Relu", ["x"], ["z"])], "neither convolution nor"),
        ([node("MatMul", ["x", "m"], ["a"]), cut("a", "y"), node("Relu", ["x"], ["z"])], "neither convolution nor"),
        (
            [
                node("MaxPool", ["x"], ["a"], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
                cut("a", "y"),
                node("Relu", ["x"], ["z"]),
            ],
            "rounds its size up",
        ),
    ],
)
def test_what_stays(rewriting: Rewriting, nodes: list[NodeProto], reason: str) -> None:
    constants = {"w3": w(4, 4, 3, 3), "m": w(8, 5)} | bounds()
    r = rewriting.run(StrideSlice(), nodes, constants, outputs=("y", "z"))
    assert r.after == r.before and reason in r.reasons[0]


def test_from_the_second_pixel_on_it_stays(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), cut("a", "y")]
    r = rewriting.run(StrideSlice(), nodes, {"w": w(4, 4, 3, 3)} | bounds(starts=(1, 0)))
    assert r.after == r.before


def test_a_blur_then_becomes_part_of_the_convolution_before_it(rewriting: Rewriting) -> None:
    """A 1×1 convolution, a norm, a blur of stride 1 and skipped pixels: rewritten to what is computed once."""
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Conv", ["a", "blur"], ["b"], group=4), cut("b", "y")]
    blur = np.broadcast_to(np.outer([1, 2, 1], [1, 2, 1]).astype(np.float32) / 16, (4, 1, 3, 3)).copy()
    graph = rewriting.graph(nodes, {"w": w(4, 4, 1, 1), "blur": blur} | bounds())
    made, applied, _ = normalize(graph)
    rewriting.equal(graph, made)
    assert ops(made) == ["Conv", "Conv"] and "stride_slice" in {a.rewrite for a in applied}


def test_long_ways(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w"], ["a0"])]
    nodes += [node("Tanh", [f"a{i}"], [f"a{i + 1}"]) for i in range(1500)]
    made, applied, _ = normalize(rewriting.graph([*nodes, cut("a1500", "y")], {"w": w(4, 4, 1, 1)} | bounds()))
    assert "stride_slice" in {a.rewrite for a in applied} and "Slice" not in ops(made)
