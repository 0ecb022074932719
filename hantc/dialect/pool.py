"""Pooling and reductions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor

from hantc.core.errors import UnsupportedError
from hantc.dialect.conv import explicit_pads, torch_pads
from hantc.dialect.leaf import EmitContext, Leaf, OnnxNode


class Pool(Leaf):
    """Max or average pooling over windows. `pads` in ONNX order (begins, ends)."""

    ops: ClassVar[tuple[str, ...]] = ("MaxPool", "AveragePool")

    def __init__(
        self,
        op: str,
        kernel: Sequence[int],
        stride: Sequence[int],
        pads: Sequence[int] | None = None,
        *,
        dilation: Sequence[int] | None = None,
        ceil_mode: bool = False,
        count_include_pad: bool = False,
    ) -> None:
        super().__init__()
        self.op = op
        self.kernel, self.stride = tuple(kernel), tuple(stride)
        self.pads = tuple(pads) if pads is not None else (0,) * 2 * len(self.kernel)
        self.dilation = tuple(dilation) if dilation is not None else (1,) * len(self.kernel)
        self.ceil_mode, self.count_include_pad = ceil_mode, count_include_pad

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, …) → (N, C, …)."""
        n = len(self.kernel)
        if not x.is_floating_point():  # torch pools floats alone; bytes are exact in them
            pooled: Tensor = self(x.double())
            return pooled.to(x.dtype)
        if self.op == "MaxPool":
            if any(self.pads):
                x = F.pad(x, torch_pads(self.pads), value=float("-inf"))
            op = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[n]
            out: Tensor = op(x, self.kernel, self.stride, 0, self.dilation, self.ceil_mode)
            return out
        avg = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[n]
        if not any(self.pads):
            plain: Tensor = avg(x, self.kernel, self.stride, 0, self.ceil_mode)
            return plain
        padded = F.pad(x, torch_pads(self.pads))
        mean: Tensor = avg(padded, self.kernel, self.stride)
        if self.count_include_pad:
            return mean
        ones = F.pad(torch.ones_like(x[:1, :1]), torch_pads(self.pads))
        return mean / avg(ones, self.kernel, self.stride)

    @classmethod
    def parse(cls, node: OnnxNode) -> Pool:
        if len([o for o in node.outputs if o]) > 1:
            raise UnsupportedError("MaxPool with indices")
        kernel = [int(k) for k in node.attrs["kernel_shape"]]
        strides = [int(s) for s in node.attrs.get("strides", [1] * len(kernel))]
        dilations = [int(d) for d in node.attrs.get("dilations", [1] * len(kernel))]
        pads = explicit_pads(node, kernel, strides, dilations)
        ceil_mode = bool(node.attrs.get("ceil_mode", 0))
        if len(kernel) not in (1, 2, 3) or node.attrs.get("storage_order", 0):
            raise UnsupportedError(f"{node.op} in {len(kernel)} dims or column-major")
        if ceil_mode and any(pads):
            raise UnsupportedError("ceil_mode with padding")
        if node.op == "AveragePool" and any(d != 1 for d in dilations):
            raise UnsupportedError("dilated AveragePool")
        return cls(
            node.op,
            kernel,
            strides,
            pads,
            dilation=dilations,
            ceil_mode=ceil_mode,
            count_include_pad=bool(node.attrs.get("count_include_pad", 0)),
        )

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        attrs: dict[str, object] = {
            "kernel_shape": list(self.kernel),
            "strides": list(self.stride),
            "pads": list(self.pads),
        }
        if self.ceil_mode:
            attrs["ceil_mode"] = 1
        if self.op == "MaxPool" and any(d != 1 for d in self.dilation):
            attrs["dilations"] = list(self.dilation)
        if self.op == "AveragePool":
            attrs["count_include_pad"] = int(self.count_include_pad)
        return e.node(self.op, xs, attrs)


class GlobalPool(Leaf):
    """Average or maximum over all spatial dims, which stay as ones."""

    ops: ClassVar[tuple[str, ...]] = ("GlobalAveragePool", "GlobalMaxPool")

    def __init__(self, op: str = "GlobalAveragePool") -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, …) → (N, C, 1, …)."""
        dims = tuple(range(2, x.dim()))
        return x.mean(dims, keepdim=True) if self.op == "GlobalAveragePool" else x.amax(dims, keepdim=True)

    @classmethod
    def parse(cls, node: OnnxNode) -> GlobalPool:
        return cls(node.op)

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        return e.node(self.op, xs)


REDUCE: Mapping[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = MappingProxyType(
    {
        "ReduceMean": lambda x, dims, keep: torch.mean(x, dims, keepdim=keep),
        "ReduceSum": lambda x, dims, keep: torch.sum(x, dims, keepdim=keep),
        "ReduceMax": lambda x, dims, keep: torch.amax(x, dims, keepdim=keep),
        "ReduceMin": lambda x, dims, keep: torch.amin(x, dims, keepdim=keep),
    }
)


class Reduce(Leaf):
    """Mean, sum, max or min over some axes."""

    ops: ClassVar[tuple[str, ...]] = tuple(REDUCE)

    def __init__(self, op: str, axes: Sequence[int], keepdims: bool = True) -> None:
        super().__init__()
        self.op, self.axes, self.keepdims = op, tuple(axes), keepdims

    def forward(self, x: Tensor) -> Tensor:
        """Dims in `axes` become one or go."""
        return REDUCE[self.op](x, self.axes, self.keepdims)

    @classmethod
    def parse(cls, node: OnnxNode) -> Reduce:
        if "axes" in node.attrs:
            axes = [int(a) for a in node.attrs["axes"]]
        elif node.has(1):
            axes = [int(a) for a in node.require_const(1, "axes")]
        else:
            axes = []
        if not axes:
            if node.attrs.get("noop_with_empty_axes", 0):
                raise UnsupportedError(f"{node.op} as a no-op")
            axes = list(range(node.rank()))
        return cls(node.op, axes, bool(node.attrs.get("keepdims", 1)))

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        since = 13 if self.op == "ReduceSum" else 18
        if e.opset >= since:
            axes = e.const(np.array(self.axes, np.int64), "axes")
            return e.node(self.op, [xs[0], axes], {"keepdims": int(self.keepdims)})
        return e.node(self.op, xs, {"axes": list(self.axes), "keepdims": int(self.keepdims)})
