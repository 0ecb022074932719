"""What a leaf operation is: an `nn.Module` that knows how to come from ONNX and how to go back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from onnx import NodeProto
from torch import Tensor, nn

from hantc.core.errors import UnsupportedError

Array = np.ndarray[Any, Any]
Dim = int | str | None


@dataclass(frozen=True)
class OnnxNode:
    """One ONNX node as leaves read it: attributes decoded, constant inputs at hand, shapes where known."""

    op: str
    attrs: Mapping[str, Any]
    opset: int
    inputs: tuple[str, ...]
    constants: Mapping[str, Array] = field(default_factory=dict)
    shapes: Mapping[str, tuple[Dim, ...]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    def const(self, index: int) -> Array | None:
        """The value of input `index` if it is a constant, else None (also where the input is absent)."""
        if index >= len(self.inputs) or not self.inputs[index]:
            return None
        return self.constants.get(self.inputs[index])

    def has(self, index: int) -> bool:
        """Whether input `index` is given at all."""
        return index < len(self.inputs) and bool(self.inputs[index])

    def require_const(self, index: int, what: str) -> Array:
        """A constant input, or UnsupportedError: computed weights stay opaque."""
        value = self.const(index)
        if value is None:
            raise UnsupportedError(f"{what} of {self.op} is computed, not constant")
        return value

    def shape(self, index: int = 0) -> tuple[Dim, ...] | None:
        """Shape of input `index`, if inference found it."""
        return self.shapes.get(self.inputs[index]) if index < len(self.inputs) else None

    def rank(self, index: int = 0) -> int:
        """Rank of input `index`; UnsupportedError if unknown."""
        shape = self.shape(index)
        if shape is None:
            raise UnsupportedError(f"rank of the input of {self.op} is unknown")
        return len(shape)


class EmitContext(Protocol):
    """What a leaf sees of the emitter."""

    opset: int

    def const(self, value: Array | Tensor, hint: str) -> gs.Constant:
        """A new graph constant."""
        ...

    def node(self, op: str, inputs: Sequence[gs.Tensor], attrs: Mapping[str, Any] | None = None) -> gs.Variable:
        """A new single-output node; returns its output."""
        ...


class Leaf(nn.Module):
    """Base of the closed set of operations.

    `ops` are the ONNX op types that the class reads. `data` holds, after `parse`, which ONNX inputs are
    passed to `forward` (the others were taken in as weights or attributes). `live`: parameters and buffers that hold
    an ONNX input as it is, for where that input is computed.
    """

    ops: ClassVar[tuple[str, ...]] = ()
    live: ClassVar[Mapping[str, int]] = MappingProxyType({})
    data: tuple[int, ...] = (0,)

    @classmethod
    def parse(cls, node: OnnxNode) -> Leaf:
        """Build the leaf from an ONNX node; UnsupportedError with the reason where it cannot."""
        raise UnsupportedError(f"{node.op} has no native form")

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        """Add the ONNX node(s) computing this leaf to the emitter; returns the output tensor."""
        raise NotImplementedError


def in_mixed_precision() -> bool:
    """Whether torch rounds what products multiply (autocast), on whichever device. To be asked before anything about
    values: leaves are traced too."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes of an ONNX node as Python values; bytes become text."""
    decoded: dict[str, Any] = {}
    for attr in node.attribute:
        value = onnx.helper.get_attribute_value(attr)
        decoded[attr.name] = value.decode(errors="replace") if isinstance(value, bytes) else value
    return decoded


# types that numpy knows through ml_dtypes alone, and the integers of their width
_EXTENSIONS: Mapping[str, tuple[torch.dtype, Any]] = MappingProxyType(
    {
        "bfloat16": (torch.bfloat16, np.int16),
        "float8_e4m3fn": (torch.float8_e4m3fn, np.uint8),
        "float8_e4m3fnuz": (torch.float8_e4m3fnuz, np.uint8),
        "float8_e5m2": (torch.float8_e5m2, np.uint8),
        "float8_e5m2fnuz": (torch.float8_e5m2fnuz, np.uint8),
    }
)


def has_torch_type(value: Array) -> bool:
    """Whether torch has tensors of an array's type: not of strings, nor of integers below 8 bits."""
    return value.dtype.name in _EXTENSIONS or value.dtype.kind in "biufc"


def tensor(value: Array) -> Tensor:
    """An owned torch tensor of a constant (ONNX arrays are read-only). TypeError for types that torch lacks."""
    if value.dtype.name in _EXTENSIONS:
        kind, bits = _EXTENSIONS[value.dtype.name]
        return torch.from_numpy(np.array(value.view(bits), order="C")).view(kind)
    return torch.from_numpy(np.array(value, order="C"))


def array(value: Tensor) -> Array:
    """A numpy copy of a torch tensor."""
    value = value.detach().cpu()
    for name, (kind, bits) in _EXTENSIONS.items():
        if value.dtype == kind:
            whole = torch.int16 if bits is np.int16 else torch.uint8
            extended: Array = value.view(whole).numpy().view(np.dtype(getattr(ml_dtypes, name)))
            return extended
    result: Array = value.numpy()
    return result
