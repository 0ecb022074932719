"""Open sizes of a model's inputs: named where they stand in the way, and fixed where they are given.

Exporters leave height and width open; everything that hantc measures and replaces needs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import ModelProto

from hantc.core.errors import UsageError

OPTION = "--input-shape"


def fix_inputs(model: ModelProto, shapes: Mapping[str, Sequence[int]]) -> ModelProto:
    """The model with these sizes behind the batch of its inputs, by name ("" is the only input); `model` itself where
    none is given. UsageError if they do not fit, or leave a size open."""
    inputs = _inputs(model)
    if shapes:
        made = ModelProto()
        made.CopyFrom(model)
        model, inputs = made, _inputs(made)
        given = {_named(name, inputs): tuple(dims) for name, dims in shapes.items()}
        if len(given) < len(shapes):
            raise UsageError("an input has two shapes", where=OPTION, hint="give one for each")
        for name, dims in given.items():
            _fix(inputs[name], dims)
        del model.graph.value_info[:]  # of open sizes
    for name, value in inputs.items():
        dims = value.type.tensor_type.shape.dim
        if any(map(_open, list(dims)[1:])):
            known = "x".join("224" if _open(d) else str(d.dim_value) for d in list(dims)[1:])
            raise UsageError(
                f"the size of the input {name!r} is open: {_show(value)}",
                where=OPTION,
                hint=f"give it without the batch, such as {OPTION} {known if len(inputs) == 1 else f'{name}={known}'}",
            )
    return model


def _inputs(model: ModelProto) -> dict[str, onnx.ValueInfoProto]:
    weights = {i.name for i in model.graph.initializer}
    return {i.name: i for i in model.graph.input if i.name not in weights and i.type.HasField("tensor_type")}


def _named(name: str, inputs: Mapping[str, onnx.ValueInfoProto]) -> str:
    if name in inputs:
        return name
    if not name and len(inputs) == 1:
        return next(iter(inputs))
    known = ", ".join(inputs)
    what = f"the model has no input {name!r}" if name else f"the model has {len(inputs)} inputs"
    raise UsageError(f"{what}: {known}", where=OPTION, hint="write NAME=CxHxW")


def _fix(value: onnx.ValueInfoProto, dims: Sequence[int]) -> None:
    """Set the sizes behind the batch, in place."""
    own = list(value.type.tensor_type.shape.dim)[1:]
    fits = len(own) == len(dims) and all(_open(d) or d.dim_value == n for d, n in zip(own, dims, strict=True))
    if not fits:
        text = "x".join(map(str, dims))
        raise UsageError(
            f"{text} does not fit the input {value.name!r}: {_show(value)}",
            where=OPTION,
            hint="leave the batch out" if len(own) == len(dims) - 1 else "sizes that the file fixes stay as they are",
        )
    for d, n in zip(own, dims, strict=True):
        d.dim_value = n


def _open(dim: onnx.TensorShapeProto.Dimension) -> bool:
    """Without a size; some exporters write 0 or -1."""
    return not dim.HasField("dim_value") or dim.dim_value <= 0


def _show(value: onnx.ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    return " x ".join((d.dim_param or "?") if _open(d) else str(d.dim_value) for d in dims)
