"""Load: ONNX model -> imported teacher."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from onnx import ModelProto
from torch import fx

from hantc.core.errors import DataError, HantcError, ModelError
from hantc.dialect.agreement import disagreement
from hantc.dialect.emitter import opaque_leaves
from hantc.dialect.examples import example_inputs
from hantc.dialect.guard import check_survives
from hantc.dialect.importer import import_model
from hantc.passes.engine import Judge, output_kind
from hantc.passes.state import Context, State

_CHECK_IMAGES = 200
_APART = 0.01  # of the largest output: kernels' roundings stay far below, but for answers that jump (NMS, ArgMax)


def survives(model: ModelProto, where: str) -> None:
    """`check_survives`, with the file's name in its error."""
    try:
        check_survives(model)
    except ModelError as error:
        raise ModelError(error.message, where=where, hint=error.hint) from error


def check_runs(network: fx.GraphModule, where: str) -> None:
    """ModelError, naming the node, unless the graph computes something from an example input: what a file says of a
    node may be nonsense that only shows when it is computed."""
    at = ""

    class Follow(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            nonlocal at
            at = n.meta.get("onnx_name") or n.name
            return super().run_node(n)

    try:
        with torch.no_grad():
            Follow(network).run(*example_inputs(network.meta["info"], 1))
    except HantcError as error:
        raise ModelError(error.message, where=where, hint=error.hint) from error
    except Exception as error:  # torch and ONNX Runtime raise many types
        told = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ModelError(f"node {at!r} cannot be computed: {told[:300]}", where=where) from error


def _how(apart: float) -> str:
    if math.isinf(apart):
        return "it gives another shape, other values that are not finite, or nothing"
    return f"outputs differ by {100 * apart:.2g} % of the largest"


class Load:
    """ONNX model -> imported teacher, checked: it runs, and with labels it is better than chance."""

    name: ClassVar[str] = "import"
    requires: ClassVar[tuple[str, ...]] = ("model",)
    ensures: ClassVar[tuple[str, ...]] = ("teacher",)

    def call(self, state: State, ctx: Context) -> State:
        """Import the graph; ModelError or DataError where it cannot serve as a teacher."""
        where = str(ctx.config.model)
        survives(state.model, where)
        ok, reason = ctx.backend.supports(state.model)
        if not ok:
            raise ModelError(f"{ctx.backend.name} cannot run it: {reason}", where=where)
        teacher = import_model(state.model, where=where)
        for name, leaf in opaque_leaves(teacher):
            ctx.reporter.event("opaque", node=name, op=leaf.proto.op_type, reason=leaf.reason)
        check_runs(teacher, where)
        info = teacher.meta["info"]
        apart = disagreement(state.model, teacher)
        if apart > _APART:
            ctx.reporter.warn(
                f"hantc reads the model otherwise than ONNX Runtime: on random input {_how(apart)}; see how far the "
                "student is from the file in the report"
            )
        if ctx.data is not None:
            if len(info.inputs) != 1:
                raise DataError(f"the model has {len(info.inputs)} inputs; --data can feed only one", where=where)
            self._check(teacher, state, ctx)
        return replace(state, teacher=teacher)

    @staticmethod
    def _check(teacher: object, state: State, ctx: Context) -> None:
        assert isinstance(teacher, fx.GraphModule) and ctx.data is not None
        try:
            kind = output_kind(teacher, example_inputs(teacher.meta["info"], 2)[0], ctx.data.num_classes)
            found = Judge(teacher, ctx.data.search, kind, limit=_CHECK_IMAGES)(teacher)
        except HantcError:
            raise
        except Exception as error:  # torch raises many types for shapes that do not fit
            raise DataError(
                f"the model does not run on the data: {error}", where=str(ctx.config.data), hint="check --preprocess"
            ) from error
        if not math.isfinite(found["kl"]):
            raise ModelError(
                "its output is NaN or infinite on the data",
                where=str(ctx.config.model),
                hint="look for NaN among its weights; inputs far outside their usual range (--preprocess) do it too",
            )
        classes = ctx.data.num_classes or 0
        if ctx.data.labelled and kind.classifier and classes > 1 and found["accuracy"] < _near_chance(classes):
            raise DataError(
                f"the teacher scores {found['accuracy']:.1f} %, near chance ({100 / classes:.1f} %)",
                where=str(ctx.config.data),
                hint="the preprocessing is probably wrong (scale, mean, std, colour order, layout): see --preprocess; "
                "or the class order of the folders differs from the model's",
            )
        ctx.reporter.event("teacher", **found)


def _near_chance(classes: int) -> float:
    """Accuracy in percent below which a teacher of so many classes is as good as guessing."""
    chance = 100 / classes
    return chance + min(0.5 * chance, 0.1 * (100 - chance))
