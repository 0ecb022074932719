from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from onnx import NodeProto, helper
from torch import fx

from hantc.core.errors import HantcError
from hantc.dialect.emitter import emit
from hantc.dialect.graph import trace
from hantc.dialect.importer import import_model
from hantc.dialect.norm import BatchNorm
from hantc.dialect.rewrites.base import Applied, Missed
from hantc.dialect.rewrites.normalize import normalize
from hantc.dialect.rewrites.registry import REWRITES

if TYPE_CHECKING:
    from onnx import ModelProto

    from tests.dialect.conftest import Models
    from tests.dialect.rewrites.conftest import Rewriting


def node(op: str, inputs: list[str], outputs: list[str], **attrs: Any) -> NodeProto:
    return helper.make_node(op, inputs, outputs, **attrs)


def network(models: Models) -> ModelProto:
    """Pad, Conv, (Mul by 1), BatchNorm, SiLU, 1×1, 3×3, BatchNorm that cannot fold, mean, Gemm."""
    constants: dict[str, Any] = {
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "one": np.array(1, np.float32),
        "w": models.weight(8, 3, 3, 3),
        "w1": models.weight(32, 8, 1, 1),
        "w2": models.weight(8, 32, 3, 3),
        "g": models.weight(8, 5),
        "axes": np.array([2, 3]),
        **{k: models.weight(8) for k in "sbm"},
        "v": np.abs(models.weight(8)) + np.float32(0.3),
    }
    nodes = [
        node("Pad", ["x", "pads"], ["p"]),
        node("Conv", ["p", "w"], ["c"]),
        node("Mul", ["c", "one"], ["c1"]),
        node("BatchNormalization", ["c1", "s", "b", "m", "v"], ["n"]),
        node("Sigmoid", ["n"], ["g1"]),
        node("Mul", ["g1", "n"], ["a"]),
        node("Conv", ["a", "w1"], ["d"]),
        node("Conv", ["d", "w2"], ["e"], pads=[1] * 4),
        node("Tanh", ["e"], ["t"]),
        node("Add", ["t", "a"], ["f"]),
        node("BatchNormalization", ["f", "s", "b", "m", "v"], ["h"]),
        node("Relu", ["h"], ["i"]),
        node("ReduceMean", ["i", "axes"], ["j"], keepdims=0),
        node("Gemm", ["j", "g"], ["y"]),
    ]
    return models.make(nodes, {"x": ["N", 3, 8, 8]}, {"y": ["N", 5]}, constants, opset=18)


def test_everything_at_once(models: Models) -> None:
    module = import_model(network(models))
    nodes = len(module.graph.nodes)
    made, applied, missed = normalize(module)
    assert [n.op_type for n in emit(made).model.graph.node] == [
        "Conv", "Sigmoid", "Mul", "Conv", "Tanh", "Add", "BatchNormalization", "Relu",
        "GlobalAveragePool", "Flatten", "Gemm",
    ]  # fmt: skip
    assert {a.rewrite for a in applied} == {
        "drop_noops", "fold_pad", "fold_norm", "fuse_silu", "merge_convs", "global_pool",
    }  # fmt: skip
    assert [(m.rewrite, m.nodes) for m in missed] == [
        (r, ("batchnormalization_1",)) for r in ("carry_norm", "fold_norm")
    ]
    assert len(module.graph.nodes) == nodes and made.meta["info"] == module.meta["info"]
    assert len(list(made.buffers())) == 2, "constants of removed nodes are gone; the norm's mean and variance remain"


def test_the_normalised_model_runs_like_the_original(models: Models) -> None:
    model = network(models)
    made, _, _ = normalize(import_model(model))
    trip = models.trip(emit(made).model)
    feeds = models.feeds(model)
    wanted, got = models.forward(import_model(model), feeds)[0], models.forward(trip.module, feeds)[0]
    assert np.abs(wanted - got).max() <= 1e-4 * np.abs(wanted).max()


def test_in_float64(rewriting: Rewriting, models: Models) -> None:
    module = import_model(network(models)).double()
    made, _, _ = normalize(module)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.allclose(made(x), module(x), rtol=1e-10, atol=1e-12)


def test_node_meta_is_kept(models: Models) -> None:
    module = import_model(network(models))
    names = {n.name: n.meta.get("onnx_name") for n in module.graph.nodes if n.op == "call_module"}
    made, _, _ = normalize(module)
    for n in made.graph.nodes:
        if n.name in names:
            assert n.meta["onnx_name"] == names[n.name]


def test_normalising_twice_finds_nothing_more(models: Models) -> None:
    once, _, first = normalize(import_model(network(models)))
    _, applied, second = normalize(once)
    assert applied == [] and second == first


def test_graph_without_model_information() -> None:
    """A traced candidate: sizes are unknown, what needs none is done all the same."""
    from hantc.dialect.conv import Conv

    module = trace(torch.nn.Sequential(Conv(3, 8, 3), BatchNorm(8), Conv(8, 8, 1)).eval())
    made, applied, missed = normalize(module)
    assert [a.rewrite for a in applied] == ["fold_norm"] and [m.rewrite for m in missed] == ["merge_convs"]
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(made(x), module(x), rtol=1e-4, atol=1e-5)


def test_names_are_unique_and_fit_candidate_names() -> None:
    names = [r.name for r in REWRITES]
    assert len(set(names)) == len(names) and all(n.isidentifier() for n in names)


class _Endless:
    name = "endless"

    def apply(self, gm: fx.GraphModule) -> tuple[list[Applied], list[Missed]]:
        return [Applied(self.name, (), "again")], []


def test_rewrites_that_do_not_settle(models: Models) -> None:
    module = import_model(network(models))
    with pytest.raises(HantcError, match="endless: the exact rewrites do not settle"):
        normalize(module, [_Endless()])
