"""Ready-made random inputs for a model, from its declared input types and shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from hantc.core.errors import ModelError

Array = np.ndarray[Any, Any]


def input_dims(model: onnx.ModelProto) -> dict[str, list[int | str]]:
    """Dims of every real graph input (initializers left out); a symbolic dim is its name, an unknown one ""."""
    constants = {i.name for i in model.graph.initializer}
    dims: dict[str, list[int | str]] = {}
    for value in model.graph.input:
        if value.name not in constants:
            shape = value.type.tensor_type.shape.dim
            dims[value.name] = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in shape]
    return dims


def random_feeds(model: onnx.ModelProto, batch: int, seed: int = 0) -> dict[str, Array]:
    """One random feed per graph input: standard normal floats, integers and booleans in {0, 1}. ModelError as for
    `feed_shapes`, or for a type of which there are no random values."""
    rng = np.random.default_rng(seed)
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    return {name: _random(name, types[name], shape, rng) for name, shape in feed_shapes(model, batch).items()}


def empty_feeds(model: onnx.ModelProto, batch: int) -> dict[str, Array]:
    """Zeros in the shapes of `random_feeds`, which take no memory and no time. ModelError as there."""
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    shapes = feed_shapes(model, batch)
    return {name: np.broadcast_to(np.zeros((), _dtype(name, types[name])), shape) for name, shape in shapes.items()}


def feed_shapes(model: onnx.ModelProto, batch: int) -> dict[str, tuple[int, ...]]:
    """The shape of what each graph input is fed.

    A symbolic first dim becomes `batch`, and so does any other dim of the same name. ModelError names any
    other symbolic dim, since a latency at an invented resolution would say nothing.
    """
    dims = input_dims(model)
    batch_names = {d[0] for d in dims.values() if d and isinstance(d[0], str) and d[0]}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in dims.items():
        fixed = []
        for axis, dim in enumerate(shape):
            if isinstance(dim, int):
                fixed.append(dim)
            elif axis == 0 or dim in batch_names:
                fixed.append(batch)
            else:
                raise ModelError(
                    f"input {name!r} has the symbolic dim {dim or '?'!r} at axis {axis}; only the batch may be so",
                    hint="export the model with a fixed resolution",
                )
        shapes[name] = tuple(fixed)
    return shapes


def timing_feeds(model: onnx.ModelProto, batch: int) -> tuple[dict[str, Array], str]:
    """`random_feeds` and "", or no feeds and why there are none: such a model can be run, but not timed."""
    try:
        return random_feeds(model, batch), ""
    except ModelError as e:
        return {}, e.message


def _dtype(name: str, elem_type: int) -> np.dtype[Any]:
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
    except KeyError as e:
        raise ModelError(f"input {name!r} is not a tensor") from e


def _random(name: str, elem_type: int, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    dtype = _dtype(name, elem_type)
    if dtype.kind in "iub":  # small, so that they are valid as indices too
        return rng.integers(0, 2, size=shape).astype(dtype)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    raise ModelError(f"input {name!r} has the type {dtype}, for which no test input can be made")
