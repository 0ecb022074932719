from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import NodeProto, helper

from hantc.dialect.importer import import_model
from hantc.dialect.rewrites.carry_norm import CarryNorm
from hantc.dialect.rewrites.normalize import normalize
from tests.dialect.rewrites.conftest import ops

if TYPE_CHECKING:
    from tests.dialect.conftest import Array
    from tests.dialect.rewrites.conftest import Rewriting

RNG = np.random.default_rng(5)


def node(op: str, inputs: list[str], outputs: list[str], **attrs: Any) -> NodeProto:
    return helper.make_node(op, inputs, outputs, **attrs)


def w(*shape: int) -> Array:
    return (RNG.standard_normal(shape) * 0.5).astype(np.float32)


def norm(x: str, y: str, of: str = "") -> NodeProto:
    return node("BatchNormalization", [x, *(f"{k}{of}" for k in "sbmv")], [y])


def norm_constants(channels: int = 4, *, of: str = "", positive: bool = False, shift: bool = True) -> dict[str, Any]:
    scale = np.abs(w(channels)) + 0.1 if positive else w(channels)
    zero = np.zeros(channels, np.float32)
    bias, mean = (w(channels), w(channels)) if shift else (zero, zero)
    return {f"s{of}": scale, f"b{of}": bias, f"m{of}": mean, f"v{of}": np.abs(w(channels)) + 0.2}


POOLS = {
    "AveragePool": {"kernel_shape": [2, 2], "strides": [2, 2]},
    "AveragePool, uncounted padding": {"kernel_shape": [3, 3], "pads": [1] * 4},
    "GlobalAveragePool": {},
    "MaxPool": {"kernel_shape": [3, 3], "pads": [1] * 4},
    "GlobalMaxPool": {},
}


@pytest.mark.parametrize("pool", POOLS)
def test_norm_behind_a_pooling(rewriting: Rewriting, pool: str) -> None:
    op = pool.split(",")[0]
    nodes = [node("Conv", ["x", "w"], ["a"]), node(op, ["a"], ["p"], **POOLS[pool]), norm("p", "y")]
    r = rewriting.run(CarryNorm(), nodes, {"w": w(4, 4, 1, 1)} | norm_constants(positive="Max" in pool))
    assert r.after == ["Conv", op] and r.missed == []
    assert r.applied[0].nodes == ("batchnormalization_0", "conv_0")


@pytest.mark.parametrize("pool", POOLS)
def test_norm_before_a_pooling(rewriting: Rewriting, pool: str) -> None:
    op = pool.split(",")[0]
    nodes = [node("Relu", ["x"], ["r"]), norm("r", "n"), node(op, ["n"], ["p"], **POOLS[pool])]
    nodes += [node("Conv", ["p", "w"], ["y"])]
    r = rewriting.run(CarryNorm(), nodes, {"w": w(4, 4, 1, 1)} | norm_constants(positive="Max" in pool))
    assert r.after == ["Relu", op, "Conv"]


def test_a_maximum_of_values_turned_round(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("MaxPool", ["a"], ["p"], kernel_shape=[2, 2]), norm("p", "y")]
    constants = norm_constants(positive=True)
    constants["s"][2] = -0.3
    r = rewriting.run(CarryNorm(), nodes, {"w": w(4, 4, 1, 1)} | constants)
    assert r.after == r.before and "takes the largest" in r.reasons[0]


@pytest.mark.parametrize("shift", [True, False])
def test_counted_padding_takes_no_shift(rewriting: Rewriting, shift: bool) -> None:
    pool = node("AveragePool", ["a"], ["p"], kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)
    nodes = [node("Conv", ["x", "w"], ["a"]), pool, norm("p", "y")]
    r = rewriting.run(CarryNorm(), nodes, {"w": w(4, 4, 1, 1)} | norm_constants(shift=shift))
    assert (r.after == ["Conv", "AveragePool"]) == (not shift)
    assert all("zeros of padding" in reason for reason in r.reasons)


def test_norm_behind_a_join(rewriting: Rewriting) -> None:
    """Each convolution takes the part of its channels, one of them behind a pooling."""
    nodes = [
        node("Conv", ["x", "w1"], ["a"], strides=[2, 2]),
        node("Conv", ["x", "w2"], ["d"]),
        node("AveragePool", ["d"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Concat", ["a", "p"], ["c"], axis=1),
        norm("c", "y"),
    ]
    r = rewriting.run(CarryNorm(), nodes, {"w1": w(3, 4, 1, 1), "w2": w(5, 4, 1, 1)} | norm_constants(8))
    assert r.after == ["Conv", "Conv", "AveragePool", "Concat"] and r.missed == []


def test_a_join_with_what_takes_nothing_stays_whole(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Relu", ["x"], ["d"]), node("Concat", ["a", "d"], ["c"], axis=1)]
    r = rewriting.run(CarryNorm(), [*nodes, norm("c", "y")], {"w": w(4, 4, 1, 1)} | norm_constants(8))
    assert r.after == r.before and "relu_0 is no convolution" in r.reasons[0]


def test_norm_behind_a_sum(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w1"], ["a"]), node("Conv", ["x", "w2"], ["d"]), node("Add", ["a", "d"], ["c"])]
    r = rewriting.run(
        CarryNorm(), [*nodes, norm("c", "y")], {"w1": w(4, 4, 1, 1), "w2": w(4, 4, 1, 1), "k": w(4)} | norm_constants()
    )
    assert r.after == ["Conv", "Conv", "Add"]


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Add", ["a", "a"], ["c"])],
        [node("Mul", ["a", "x"], ["c"])],
        [node("Relu", ["a"], ["r"]), node("Add", ["a", "r"], ["c"])],
    ],
    ids=["twice", "product", "read elsewhere"],
)
def test_sums_that_do_not_share_out(rewriting: Rewriting, nodes: list[NodeProto]) -> None:
    all_nodes = [node("Conv", ["x", "w"], ["a"]), *nodes, norm("c", "y")]
    r = rewriting.run(CarryNorm(), all_nodes, {"w": w(4, 4, 1, 1)} | norm_constants())
    assert r.after == r.before and len(r.reasons) == 1


def test_norm_behind_norm(rewriting: Rewriting) -> None:
    nodes = [node("Relu", ["x"], ["r"]), norm("r", "n"), norm("n", "y", "2")]
    r = rewriting.run(CarryNorm(), nodes, norm_constants() | norm_constants(of="2"))
    assert r.after == ["Relu", "BatchNormalization"]


def test_norm_of_flattened_single_pixels(rewriting: Rewriting) -> None:
    """As between global pooling and classifier; the dim of channels stays where it was."""
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("GlobalAveragePool", ["a"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        norm("f", "y"),
    ]
    r = rewriting.run(CarryNorm(), nodes, {"w": w(4, 4, 3, 3)} | norm_constants())
    assert r.after == ["Conv", "GlobalAveragePool", "Flatten"]


@pytest.mark.parametrize("flat", ["Flatten", "Reshape"])
def test_norm_before_flattening_and_product(rewriting: Rewriting, flat: str) -> None:
    """ArcFace's head: every pixel of a channel is scaled alike."""
    flatten = node("Flatten", ["n"], ["f"]) if flat == "Flatten" else node("Reshape", ["n", "to"], ["f"])
    nodes = [node("Relu", ["x"], ["r"]), norm("r", "n"), flatten, node("Gemm", ["f", "w", "k"], ["y"], transB=1)]
    constants = {"w": w(6, 4 * 64), "k": w(6), "to": np.array([0, -1])} | norm_constants()
    r = rewriting.run(CarryNorm(), nodes, constants)
    assert r.after == ["Relu", flat, "Gemm"]


def test_norm_behind_a_flattening_of_maps(rewriting: Rewriting) -> None:
    """A scale per feature is none per channel of the convolution."""
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Flatten", ["a"], ["f"]), norm("f", "y")]
    r = rewriting.run(CarryNorm(), nodes, {"w": w(4, 4, 1, 1)} | norm_constants(256))
    assert r.after == r.before and "moves values between channels" in r.reasons[0]


def test_constant_scaling_behind_a_pooling(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("GlobalAveragePool", ["a"], ["p"]), node("Mul", ["p", "k"], ["y"])]
    r = rewriting.run(CarryNorm(), nodes, {"w": w(4, 4, 1, 1), "k": w(4, 1, 1)})
    assert r.after == ["Conv", "GlobalAveragePool"]


def test_a_map_that_others_read_too_goes_nowhere(rewriting: Rewriting) -> None:
    nodes = [node("Relu", ["x"], ["r"]), norm("r", "n"), node("GlobalAveragePool", ["n"], ["p"])]
    nodes += [node("Conv", ["p", "w"], ["y"]), node("Relu", ["n"], ["z"])]
    r = rewriting.run(CarryNorm(), nodes, {"w": w(4, 4, 1, 1)} | norm_constants(), outputs=("y", "z"))
    assert r.after == r.before


def test_padding_before_the_convolution_takes_no_shift(rewriting: Rewriting) -> None:
    nodes = [node("Relu", ["x"], ["r"]), norm("r", "n"), node("AveragePool", ["n"], ["p"], kernel_shape=[2, 2])]
    nodes += [node("Conv", ["p", "w"], ["y"], pads=[1] * 4)]
    r = rewriting.run(CarryNorm(), nodes, {"w": w(4, 4, 3, 3)} | norm_constants())
    assert r.after == r.before


def test_values_too_large_for_the_weights(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("GlobalAveragePool", ["a"], ["p"]), norm("p", "y")]
    constants = {"w": w(4, 4, 1, 1) * 1e20} | norm_constants()
    constants["s"][:] = 1e30
    graph = import_model(rewriting.models.make(nodes, {"x": ("N", 4, 8, 8)}, ["y"], constants))
    applied, missed = CarryNorm().apply(graph)
    assert not applied and "too large" in missed[0].reason


def test_a_norm_beside_its_convolution_is_left_to_fold_norm(rewriting: Rewriting) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), norm("a", "n"), node("GlobalAveragePool", ["n"], ["y"])]
    r = rewriting.run(CarryNorm(), nodes, {"w": w(4, 4, 1, 1)} | norm_constants())
    assert r.applied == [] and r.missed == []


def test_all_rewrites_together(rewriting: Rewriting) -> None:
    """Norms behind a join, of which one branch has a norm of its own."""
    nodes = [
        node("Conv", ["x", "w1"], ["a"]),
        norm("a", "an", "2"),
        node("Conv", ["x", "w2"], ["d"], pads=[1] * 4),
        node("Concat", ["an", "d"], ["c"], axis=1),
        norm("c", "n"),
        node("Relu", ["n"], ["y"]),
    ]
    constants = {"w1": w(3, 4, 1, 1), "w2": w(5, 4, 3, 3)} | norm_constants(8) | norm_constants(3, of="2")
    graph = rewriting.graph(nodes, constants)
    made, _, missed = normalize(graph)
    rewriting.equal(graph, made)
    assert ops(made) == ["Conv", "Conv", "Concat", "Relu"] and missed == []


def test_long_ways(rewriting: Rewriting) -> None:
    """As deep as a hostile file makes them."""
    pools = [node("MaxPool", [f"a{i}"], [f"a{i + 1}"], kernel_shape=[3, 3], pads=[1] * 4) for i in range(1200)]
    ahead = [node("Relu", ["x"], ["r"]), norm("r", "a0"), *pools, node("Conv", ["a1200", "w"], ["y"])]
    behind = [node("Conv", ["x", "w"], ["a0"]), *pools, norm("a1200", "y")]
    constants = {"w": w(4, 4, 1, 1)} | norm_constants(positive=True)
    for nodes in (ahead, behind):
        made, _, _ = normalize(rewriting.graph(nodes, constants, x=("N", 4, 2, 2)), [CarryNorm()])
        assert "BatchNormalization" not in ops(made)


def test_a_batch_that_a_reshape_names_is_the_examples_only(rewriting: Rewriting) -> None:
    """Two is what the example has, and no other batch."""
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Reshape", ["a", "to"], ["f"]), norm("f", "y")]
    constants = {"w": w(4, 4, 1, 1), "to": np.array([2, 4, -1])} | norm_constants()
    r = rewriting.run(CarryNorm(), nodes, constants)
    assert r.after == r.before and "moves values between channels" in r.reasons[0]
