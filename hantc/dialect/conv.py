"""Convolutions: any rank, groups, dilations, asymmetric padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hantc.core.errors import UnsupportedError
from hantc.dialect.leaf import EmitContext, Leaf, OnnxNode, array, in_mixed_precision, tensor


def explicit_pads(node: OnnxNode, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """ONNX `pads` (begins then ends) of a node with either `pads` or `auto_pad`; UnsupportedError if
    `SAME_*` meets an unknown input size."""
    auto = node.attrs.get("auto_pad", "NOTSET")
    n = len(kernel)
    if auto in ("NOTSET", ""):
        return [int(p) for p in node.attrs.get("pads", [0] * 2 * n)]
    if auto == "VALID":
        return [0] * 2 * n
    shape = node.shape(0)
    if shape is None or any(not isinstance(d, int) for d in shape[2:]):
        raise UnsupportedError(f"auto_pad={auto} on an input of unknown size")
    begins, ends = [], []
    for size, k, s, d in zip(shape[2:], kernel, strides, dilations, strict=True):
        assert isinstance(size, int)
        total = max(0, (math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size)
        small, large = total // 2, total - total // 2
        begins.append(small if auto == "SAME_UPPER" else large)
        ends.append(large if auto == "SAME_UPPER" else small)
    return begins + ends


def torch_pads(pads: Sequence[int]) -> list[int]:
    """ONNX pads (begins, ends) → `F.pad` order (last dim first)."""
    n = len(pads) // 2
    return [p for i in reversed(range(n)) for p in (pads[i], pads[n + i])]


class Conv(Leaf):
    """N-d convolution, NCHW. Default padding keeps ⌈size/stride⌉ (k // 2 on both sides)."""

    ops: ClassVar[tuple[str, ...]] = ("Conv",)
    live = MappingProxyType({"weight": 1, "bias": 2})
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        *,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        pads: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.kernel = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
        n = len(self.kernel)
        self.stride = (stride,) * n if isinstance(stride, int) else tuple(stride)
        self.dilation = (dilation,) * n if isinstance(dilation, int) else tuple(dilation)
        same = [d * (k - 1) // 2 for k, d in zip(self.kernel, self.dilation, strict=True)]
        self.pads = tuple(pads) if pads is not None else tuple(same + same)
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel))
        # He initialisation: the field's default before a ReLU-like activation
        nn.init.kaiming_normal_(self.weight, mode="fan_out" if groups == 1 else "fan_in", nonlinearity="relu")
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_channels))
        else:
            self.register_parameter("bias", None)

    @property
    def in_channels(self) -> int:
        """Of the weights as they are: pruning changes them. Read so that symbolic tracing does not see it."""
        weight = self._parameters.get("weight")
        return weight.shape[1] * self.groups if weight is not None else 0

    @property
    def symmetric(self) -> bool:
        """Whether padding is the same on both sides of every dim."""
        n = len(self.kernel)
        return self.pads[:n] == self.pads[n:]

    def with_groups(self, groups: int) -> Conv:
        """The same function in fewer groups, of which the present number is a multiple: zeros where nothing was."""
        joined = self.groups // groups
        out, each = self.weight.shape[:2]
        inside = out // self.groups  # output channels of one present group
        made = Conv(
            each * self.groups,
            out,
            self.kernel,
            self.stride,
            groups=groups,
            bias=self.bias is not None,
            dilation=self.dilation,
            pads=self.pads,
        )
        weight = torch.zeros(groups, joined, inside, joined, each, *self.kernel, dtype=self.weight.dtype)
        own = self.weight.detach().reshape(groups, joined, inside, each, *self.kernel)
        for k in range(joined):
            weight[:, k, :, k] = own[:, k]
        made.weight = nn.Parameter(weight.reshape(out, joined * each, *self.kernel))
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone())
        return made

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, …) → (N, C', …)."""
        return self.product(x, self.weight)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """`forward` with another weight of the same shape."""
        n, stride = len(self.kernel), self.stride
        if set(self.kernel) == {1} and not any(self.pads):
            # equal; oneDNN's strided 1×1 kernel corrupts the heap in its backward pass, for 2 to 7 channels in
            # channels-last layout (torch 2.13, AVX2)
            steps: tuple[slice[Any, Any, Any], ...] = tuple(slice(None, None, s) for s in stride)
            x, stride = x[(slice(None), slice(None), *steps)], (1,) * n
        if not self.symmetric:
            x = F.pad(x, torch_pads(self.pads))
        if self.in_channels == 1 and len(set(stride)) > 1:
            # oneDNN computes a single column of one channel in channels-last strides wrongly (torch 2.13, AVX-512)
            x = x.clone(memory_format=torch.contiguous_format)
        padding = self.pads[:n] if self.symmetric else (0,) * n
        op = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[n]
        # oneDNN's depthwise gradients take up to twice as long in BF16 as in FP32 (torch 2.13, AVX512-BF16)
        depthwise = 1 < self.groups == self.in_channels
        if depthwise and in_mixed_precision() and weight.dtype == torch.float32:
            with torch.autocast(x.device.type, enabled=False):
                plain: Tensor = op(x.float(), weight, self.bias, stride, padding, self.dilation, self.groups)
            return plain
        out: Tensor = op(x, weight, self.bias, stride, padding, self.dilation, self.groups)
        return out

    @classmethod
    def parse(cls, node: OnnxNode) -> Conv:
        weight = tensor(node.require_const(1, "weight"))
        bias = tensor(node.require_const(2, "bias")) if node.has(2) else None
        kernel = list(weight.shape[2:])
        if len(kernel) not in (1, 2, 3):
            raise UnsupportedError(f"{len(kernel)}-d convolution")
        strides = [int(v) for v in node.attrs.get("strides", [1] * len(kernel))]
        dilations = [int(v) for v in node.attrs.get("dilations", [1] * len(kernel))]
        groups = int(node.attrs.get("group", 1))
        pads = explicit_pads(node, kernel, strides, dilations)
        if min(pads) < 0:
            raise UnsupportedError("negative padding")
        with torch.device("meta"):  # no weights are drawn that the file's would replace
            leaf = cls(
                weight.shape[1] * groups,
                weight.shape[0],
                kernel,
                strides,
                groups=groups,
                dilation=dilations,
                pads=pads,
            )
        leaf.weight = nn.Parameter(weight)
        leaf.bias = nn.Parameter(bias) if bias is not None else None
        return leaf

    def emit(self, e: EmitContext, xs: list[gs.Tensor]) -> gs.Variable:
        inputs = [xs[0], e.const(array(self.weight), "weight")]
        if self.bias is not None:
            inputs.append(e.const(array(self.bias), "bias"))
        attrs = {
            "kernel_shape": list(self.kernel),
            "strides": list(self.stride),
            "pads": list(self.pads),
            "dilations": list(self.dilation),
            "group": self.groups,
        }
        return e.node("Conv", inputs, attrs)
