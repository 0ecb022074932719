"""Sums become additions of two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from onnx import helper

from hantc.dialect.rewrites.normalize import normalize
from hantc.dialect.rewrites.split_sum import SplitSum

if TYPE_CHECKING:
    from tests.dialect.rewrites.conftest import Rewriting


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_sum_becomes_additions(rewriting: Rewriting, n: int) -> None:
    ops = ["Relu", "Neg", "Abs", "Exp", "Tanh"][:n]
    nodes = [helper.make_node(op, ["x"], [op]) for op in ops]
    r = rewriting.run(SplitSum(), [*nodes, helper.make_node("Sum", ops, ["s"]), helper.make_node("Relu", ["s"], ["y"])])
    assert sorted(r.after) == sorted([*ops, *["Add"] * (n - 1), "Relu"])


def test_operands_of_several_shapes(rewriting: Rewriting) -> None:
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Sum", ["p", "r", "x"], ["y"]),
    ]
    assert rewriting.run(SplitSum(), nodes).after.count("Add") == 2


def test_a_sum_with_constants_stays(rewriting: Rewriting) -> None:
    r = rewriting.run(SplitSum(), [helper.make_node("Sum", ["x", "c"], ["y"])], {"c": np.float32(2)})
    assert r.applied == [] and r.reasons == ["it adds constants"]


def test_branches_added_by_one_sum_merge(rewriting: Rewriting) -> None:
    """RepVGG's block, as some exporters write it."""
    rng = np.random.default_rng(0)
    weights = {"k3": rng.standard_normal((4, 4, 3, 3)), "k1": rng.standard_normal((4, 4, 1, 1))}
    weights |= {n: rng.uniform(0.5, 2, 4) for n in ("gamma", "beta", "mean", "var")}
    nodes = [
        helper.make_node("Conv", ["x", "k3"], ["a"], pads=[1] * 4),
        helper.make_node("Conv", ["x", "k1"], ["b"]),
        helper.make_node("BatchNormalization", ["x", "gamma", "beta", "mean", "var"], ["c"]),
        helper.make_node("Sum", ["a", "b", "c"], ["s"]),
        helper.make_node("Relu", ["s"], ["y"]),
    ]
    found = normalize(rewriting.graph(nodes, {k: v.astype(np.float32) for k, v in weights.items()}))[0]
    kinds = [type(m).__name__ for m in found.modules()]
    assert kinds.count("Conv") == 1 and "Add" not in kinds and "BatchNorm" not in kinds
