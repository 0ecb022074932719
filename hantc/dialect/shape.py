"""Operations that move, cut or join values without computing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor

from hantc.core.errors import UnsupportedError
from hantc.dialect.leaf import EmitContext, Leaf, OnnxNode, tensor


class Reshape(Leaf):
    """Reshape. Where only the dims after the batch change, the batch is kept whatever its size, so that a
    model exported for one batch size can be trained with another."""

    ops: ClassVar[tuple[str, ...]] = ("Reshape",)

    def __init__(self, shape: Sequence[int], keep_batch: bool) -> None:
        super().__init__()
        self.shape, self.keep_batch = tuple(shape), keep_batch

    def forward(self, x: Tensor) -> Tensor:
        """`shape` holds the dims after the batch if `keep_batch`, else all (0 copies, -1 is inferred)."""
        if self.keep_batch:
            return x.reshape(x.shape[0], *self.shape)
        return x.reshape([x.shape[i] if d == 0 else d for i, d in enumerate(self.shape)])

    @classmethod
    def parse(cls, node: OnnxNode) -> Reshape:
        before, after = node.shape(0), node.shapes.get(node.outputs[0])
        target = node.const(1)
        # allowzero matters only where a zero is in the target
        zeros = bool(node.attrs.get("allowzero", 0)) and (target is None or 0 in target)
        rest_in = before[1:] if before else ()
        rest_out = after[1:] if after else ()
        static = all(isinstance(d, int) for d in (*rest_in, *rest_out))
        if before and after and len(after) > 1 and static:
            sizes = [[d for d in rest if isinstance(d, int)] for rest in (rest_in, rest_out)]
            if math.prod(sizes[0]) == math.prod(sizes[1]) and not zeros:
                return cls(sizes[1], keep_batch=True)
        if target is None or zeros:
            raise UnsupportedError("Reshape to a computed shape")
        return cls([int(d) for d in target], keep_batch=False)

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        shape = (0, *self.shape) if self.keep_batch else self.shape
        return e.node("Reshape", [xs[0], e.const(np.array(shape, np.int64), "shape")])


class Flatten(Leaf):
    """Two dims: those before `axis` and those from it on."""

    ops: ClassVar[tuple[str, ...]] = ("Flatten",)

    def __init__(self, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """(N, …) → (N, prod) for axis 1."""
        return x.flatten(1) if self.axis == 1 else x.reshape(math.prod(x.shape[: self.axis]), -1)

    @classmethod
    def parse(cls, node: OnnxNode) -> Flatten:
        return cls(int(node.attrs.get("axis", 1)))

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        return e.node("Flatten", xs, {"axis": self.axis})


class Transpose(Leaf):
    """Permutation of the dims."""

    ops: ClassVar[tuple[str, ...]] = ("Transpose",)

    def __init__(self, perm: Sequence[int]) -> None:
        super().__init__()
        self.perm = tuple(perm)

    def forward(self, x: Tensor) -> Tensor:
        """Dims in the order `perm`."""
        return x.permute(self.perm)

    @classmethod
    def parse(cls, node: OnnxNode) -> Transpose:
        perm = node.attrs.get("perm")
        return cls([int(p) for p in perm] if perm is not None else list(reversed(range(node.rank()))))

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        return e.node("Transpose", xs, {"perm": list(self.perm)})


def _axes(node: OnnxNode) -> list[int] | None:
    if "axes" in node.attrs:
        return [int(a) for a in node.attrs["axes"]]
    return [int(a) for a in node.require_const(1, "axes").reshape(-1)] if node.has(1) else None


class Squeeze(Leaf):
    """Remove dims of size one, or (Unsqueeze) insert them."""

    ops: ClassVar[tuple[str, ...]] = ("Squeeze", "Unsqueeze")

    def __init__(self, op: str, axes: Sequence[int]) -> None:
        super().__init__()
        self.op, self.axes = op, tuple(axes)

    def forward(self, x: Tensor) -> Tensor:
        """Dims `axes` go (Squeeze) or come (Unsqueeze)."""
        if self.op == "Squeeze":
            return x.squeeze(self.axes)
        rank = x.dim() + len(self.axes)
        for axis in sorted(a % rank for a in self.axes):
            x = x.unsqueeze(axis)
        return x

    @classmethod
    def parse(cls, node: OnnxNode) -> Squeeze:
        axes = _axes(node)
        if axes is None:
            raise UnsupportedError("Squeeze of whatever dims are one")
        return cls(node.op, axes)

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        if e.opset >= 13:
            return e.node(self.op, [xs[0], e.const(np.array(self.axes, np.int64), "axes")])
        return e.node(self.op, xs, {"axes": list(self.axes)})


def _over_all_dims(pads: Sequence[int], axes: Sequence[int], rank: int) -> list[int]:
    """Pads of listed axes (opset 18) as pads of every dim."""
    full = [0] * 2 * rank
    for i, axis in enumerate(axes):
        full[axis % rank], full[axis % rank + rank] = pads[i], pads[len(axes) + i]
    return full


class Pad(Leaf):
    """Constant, reflect or edge padding; `pads` in ONNX order over all dims."""

    ops: ClassVar[tuple[str, ...]] = ("Pad",)

    def __init__(self, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> None:
        super().__init__()
        self.pads, self.mode, self.value = tuple(pads), mode, value
        self.dtype: np.dtype[Any] | None = None  # of the value, where the file gives one

    def forward(self, x: Tensor) -> Tensor:
        """Every dim grows by its begin and end pad."""
        n = len(self.pads) // 2
        flat = [p for i in reversed(range(n)) for p in (self.pads[i], self.pads[n + i])]
        if self.mode == "constant":
            return F.pad(x, flat, value=self.value if x.is_floating_point() else int(self.value))
        # torch wants the spatial dims only; parse has checked that batch and channels are not padded
        return F.pad(x, flat[:-4], mode={"reflect": "reflect", "edge": "replicate"}[self.mode])

    @classmethod
    def parse(cls, node: OnnxNode) -> Pad:
        mode = str(node.attrs.get("mode", "constant"))
        if mode not in ("constant", "reflect", "edge"):
            raise UnsupportedError(f"Pad in mode {mode}")
        if node.opset < 11:
            pads, value = node.attrs["pads"], node.attrs.get("value", 0.0)
        else:
            pads = node.require_const(1, "pads")
            value = node.require_const(2, "value").item() if node.has(2) else 0.0
        pads = [int(p) for p in pads]
        if node.has(3):
            pads = _over_all_dims(pads, node.require_const(3, "axes").tolist(), node.rank())
        outside = any(pads[:2]) or any(pads[len(pads) // 2 :][:2])
        if mode != "constant" and (outside or len(pads) < 6 or min(pads) < 0):
            raise UnsupportedError(f"{mode} padding of batch or channels, or by a negative amount")
        leaf = cls(pads, mode, float(value))
        given = node.const(2)
        leaf.dtype = given.dtype if given is not None else None
        return leaf

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        if e.opset < 11:
            return e.node("Pad", xs, {"pads": list(self.pads), "mode": self.mode, "value": self.value})
        inputs = [xs[0], e.const(np.array(self.pads, np.int64), "pads")]
        if self.mode == "constant" and (self.value != 0 or self.dtype is not None):
            inputs.append(e.const(np.array(self.value, self.dtype or np.float32), "value"))
        return e.node("Pad", inputs, {"mode": self.mode})


class Slice(Leaf):
    """A strided cut along some axes; constant bounds, positive steps."""

    ops: ClassVar[tuple[str, ...]] = ("Slice",)

    def __init__(self, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int], steps: Sequence[int]) -> None:
        super().__init__()
        self.starts, self.ends, self.axes, self.steps = tuple(starts), tuple(ends), tuple(axes), tuple(steps)

    def forward(self, x: Tensor) -> Tensor:
        """x[start:end:step] along each axis."""
        index = [slice(None)] * x.dim()
        for start, end, axis, step in zip(self.starts, self.ends, self.axes, self.steps, strict=True):
            index[axis] = slice(start, end, step)
        return x[tuple(index)]

    @classmethod
    def parse(cls, node: OnnxNode) -> Slice:
        if node.opset < 10:
            starts, ends = list(node.attrs["starts"]), list(node.attrs["ends"])
            axes = list(node.attrs.get("axes", range(len(starts))))
            steps = [1] * len(starts)
        else:
            starts = node.require_const(1, "starts").tolist()
            ends = node.require_const(2, "ends").tolist()
            axes = node.require_const(3, "axes").tolist() if node.has(3) else list(range(len(starts)))
            steps = node.require_const(4, "steps").tolist() if node.has(4) else [1] * len(starts)
        if min(steps, default=1) <= 0:
            raise UnsupportedError("Slice backwards")
        return cls(starts, ends, axes, steps)

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        if e.opset < 10:
            if any(s != 1 for s in self.steps):
                raise UnsupportedError("strided Slice before opset 10")
            return e.node("Slice", xs, {"starts": list(self.starts), "ends": list(self.ends), "axes": list(self.axes)})
        parts = (("starts", self.starts), ("ends", self.ends), ("axes", self.axes), ("steps", self.steps))
        return e.node("Slice", [xs[0], *(e.const(np.array(v, np.int64), h) for h, v in parts)])


class Concat(Leaf):
    """Join along one axis."""

    ops: ClassVar[tuple[str, ...]] = ("Concat",)

    def __init__(self, axis: int = 1, count: int = 2) -> None:
        super().__init__()
        self.axis = axis
        self.data = tuple(range(count))

    def forward(self, *xs: Tensor) -> Tensor:
        """All dims but `axis` are equal."""
        return torch.cat(xs, self.axis)

    @classmethod
    def parse(cls, node: OnnxNode) -> Concat:
        return cls(int(node.attrs["axis"]), len(node.inputs))

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        return e.node("Concat", xs, {"axis": self.axis})


def torch_dtype(onnx_type: int) -> torch.dtype:
    """The torch type of an ONNX element type; TypeError where torch has none."""
    return tensor(np.zeros(1, onnx.helper.tensor_dtype_to_np_dtype(onnx_type))).dtype


class Cast(Leaf):
    """Change of dtype."""

    ops: ClassVar[tuple[str, ...]] = ("Cast",)

    def __init__(self, to: int) -> None:
        super().__init__()
        self.to_type = to
        self.dtype = torch_dtype(to)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape, other dtype."""
        return x.to(self.dtype)

    @classmethod
    def parse(cls, node: OnnxNode) -> Cast:
        to = int(node.attrs["to"])
        if to not in (
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.FLOAT16,
            onnx.TensorProto.BFLOAT16,
            onnx.TensorProto.DOUBLE,
            onnx.TensorProto.INT8,
            onnx.TensorProto.UINT8,
            onnx.TensorProto.INT16,
            onnx.TensorProto.INT32,
            onnx.TensorProto.INT64,
            onnx.TensorProto.BOOL,
        ):
            raise UnsupportedError(f"Cast to ONNX type {to}")
        return cls(to)

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        return e.node("Cast", xs, {"to": self.to_type})
