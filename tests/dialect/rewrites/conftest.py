"""Applying one rewrite to a small graph and checking that values stay as they were."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from onnx import NodeProto
from torch import Tensor, fx

from hantc.dialect.emitter import emit
from hantc.dialect.examples import example_inputs
from hantc.dialect.importer import import_model
from hantc.dialect.rewrites.base import Applied, Missed, Rewrite

if TYPE_CHECKING:
    from tests.dialect.conftest import Dims, Models

TOLERANCE = 1e-9  # of the largest value, in float64


@dataclass(frozen=True)
class Result:
    """A graph before and after a rewrite."""

    before: list[str]
    after: list[str]  # op types of the emitted nodes
    applied: list[Applied]
    missed: list[Missed]
    module: fx.GraphModule

    @property
    def reasons(self) -> list[str]:
        return [m.reason for m in self.missed]


def as_double(module: fx.GraphModule) -> fx.GraphModule:
    """The graph in float64, inputs too, so that equality can be asked for closely."""
    info = module.meta["info"]
    inputs = tuple(replace(s, dtype="float64") if s.dtype == "float32" else s for s in info.inputs)
    module.double().meta["info"] = replace(info, inputs=inputs)
    return module


def largest_error(wanted: Any, got: Any) -> float:
    """Over all outputs, relative to each one's largest value; infinite for other shapes or dtypes."""
    pairs = zip(*([w] if isinstance(w, Tensor) else list(w) for w in (wanted, got)), strict=True)
    errors = []
    for w, g in pairs:
        if w.shape != g.shape or w.dtype != g.dtype:
            return float("inf")
        errors.append(float((w - g).abs().max() / w.abs().max().clamp_min(1e-9)))
    return max(errors)


def ops(module: fx.GraphModule) -> list[str]:
    return [n.op_type for n in emit(module).model.graph.node]


class Rewriting:
    """What the tests apply rewrites with, as the fixture `rewriting`."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def graph(
        self,
        nodes: Sequence[NodeProto],
        constants: Mapping[str, Any] | None = None,
        *,
        x: Dims = ("N", 4, 8, 8),
        z: Dims | None = None,
        outputs: Sequence[str] = ("y",),
        opset: int = 17,
    ) -> fx.GraphModule:
        """A float64 graph from "x" (and "z") to `outputs`."""
        inputs = {"x": x} | ({"z": z} if z is not None else {})
        return as_double(import_model(self.models.make(nodes, inputs, outputs, constants, opset=opset)))

    def apply(self, rewrite: Rewrite, module: fx.GraphModule) -> Result:
        """Apply to a copy; the original must not change, and values must agree."""
        kept = {k: v.clone() for k, v in module.state_dict().items()}
        deep = copy.deepcopy(module)
        applied, missed = rewrite.apply(deep)
        assert {a.rewrite for a in applied} | {m.rewrite for m in missed} <= {rewrite.name}
        assert rewrite.apply(copy.deepcopy(deep))[0] == [], "a second application finds nothing"
        assert all(torch.equal(v, kept[k]) for k, v in module.state_dict().items())
        self.equal(module, deep)
        return Result(ops(module), ops(deep), applied, missed, deep)

    @staticmethod
    def equal(module: fx.GraphModule, made: fx.GraphModule) -> None:
        """Both compute the same, at another batch size than the example's."""
        xs = example_inputs(module.meta["info"], 3, seed=1)
        with torch.no_grad():
            assert largest_error(module(*xs), made(*xs)) <= TOLERANCE

    def run(
        self, rewrite: Rewrite, nodes: Sequence[NodeProto], constants: Mapping[str, Any] | None = None, **how: Any
    ) -> Result:
        """`graph`, then `apply`."""
        return self.apply(rewrite, self.graph(nodes, constants, **how))


@pytest.fixture
def rewriting(models: Models) -> Rewriting:
    return Rewriting(models)
