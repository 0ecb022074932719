"""INT8 arithmetic imitated in float, for scoring candidates as they will run and for training through it.

The same scheme as the emitted file's (`QuantSpec`): weights per output channel and symmetric (7 bits where the CPU
has no VNNI), activations per tensor in 8 bits, asymmetric on CPUs. Rounding passes gradients straight through.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Binary
from hantc.dialect.linear import Linear, MatMul
from hantc.dialect.qdq import QuantSpec
from hantc.dialect.ranges import robust_range

_MANY = 8  # images, for some of them to be outliers


def quantize_weight(weight: Tensor, *, bits: int) -> Tensor:
    """Symmetric rounding per output channel (dim 0) to `bits` bits."""
    top = 127 if bits == 8 else 2 ** (bits - 1)  # onnxruntime's reduced range reaches ±64
    scale = weight.detach().abs().flatten(1).amax(1).clamp_min(1e-12) / top
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -top, top)


class ActivationQuant(nn.Module):
    """8-bit rounding of a tensor over the range chosen while observing (`robust_range`), `symmetric` about zero or
    not. With `rounding` off it is the identity and costs nothing: looking for ranges reads every activation twice."""

    low: Tensor
    high: Tensor

    def __init__(self, *, symmetric: bool = False) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.observing, self.rounding = True, True
        self.images = 0  # in each batch observed; 0: as many as there are rows

    @property
    def active(self) -> bool:
        """Whether values are rounded now."""
        return self.rounding and not self.observing

    def forward(self, x: Tensor) -> Tensor:
        """Same shape; the identity while observing, or with `rounding` off."""
        if self.observing:
            low, high = _range(x.detach(), self.images)
            self.low = torch.clamp(self.low, max=low)
            self.high = torch.clamp(self.high, min=high)
        if not self.active:
            return x
        if self.symmetric:
            scale = (torch.maximum(self.high, -self.low) / 127).clamp_min(1e-12)
            zero, lowest, highest = torch.zeros_like(scale, dtype=torch.int32), -127, 127
        else:
            scale = ((self.high - self.low) / 255).clamp_min(1e-12)
            zero, lowest, highest = torch.round(-self.low / scale).to(torch.int32), 0, 255
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, lowest, highest)


def _range(x: Tensor, images: int) -> tuple[float, float]:
    """What to round a batch of activations over. Windows or tokens may lie beside the images in its first dimension."""
    n = images or (x.shape[0] if x.dim() else 0)
    if n < _MANY or x.shape[0] % n:
        return float(x.amin()), float(x.amax())
    flat = x.reshape(n, -1)
    per_image = (flat.amin(1), flat.amax(1), flat.var(1, correction=0))
    if not all(bool(torch.isfinite(v).all()) for v in per_image):
        return float(x.amin()), float(x.amax())
    low, high, variance = (v.double().cpu().numpy() for v in per_image)
    return robust_range(low, high, variance)


class QuantizedProduct(nn.Module):
    """A convolution or linear leaf with its input and weight rounded. The leaf's parameters stay its own."""

    def __init__(self, leaf: Conv | Linear, spec: QuantSpec) -> None:
        super().__init__()
        self.leaf, self.bits = leaf, 7 if spec.reduce_range else 8
        self.input = ActivationQuant(symmetric=spec.symmetric)

    def forward(self, x: Tensor) -> Tensor:
        """As the leaf."""
        x = self.input(x)
        weight = quantize_weight(self.leaf.weight, bits=self.bits) if self.input.active else self.leaf.weight
        return self.leaf.product(x, weight)


class QuantizedBinary(nn.Module):
    """An addition (the residual sum stays in INT8) or a product of two activations, both operands rounded but the one
    that is summed in its own product's kernel (`fused`: which)."""

    def __init__(self, leaf: Binary | MatMul, spec: QuantSpec, fused: int | None = None) -> None:
        super().__init__()
        self.leaf = leaf
        self.a, self.b = (nn.Identity() if i == fused else ActivationQuant(symmetric=spec.symmetric) for i in range(2))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """As the leaf."""
        out: Tensor = self.leaf(self.a(a), self.b(b))
        return out


def fake_quantize(module: fx.GraphModule, spec: QuantSpec, *, share: bool = False) -> fx.GraphModule:
    """A copy of a graph of leaves with rounded products and sums (`share`: of the graph, on the same leaves).
    Norms should be folded before. It observes ranges until `calibrated` has run."""
    made = fx.GraphModule(module, copy.deepcopy(module.graph)) if share else copy.deepcopy(module)
    for node in made.graph.nodes:
        if node.op != "call_module":
            continue
        leaf = made.get_submodule(str(node.target))
        wrapped: nn.Module | None = None
        if isinstance(leaf, (Conv, Linear)):
            wrapped = QuantizedProduct(leaf, spec)
        elif len(node.all_input_nodes) == 2 and (
            isinstance(leaf, MatMul) or (isinstance(leaf, Binary) and leaf.op == "Add")
        ):
            wrapped = QuantizedBinary(leaf, spec, _fused(made, node) if spec.symmetric else None)
        if wrapped is not None:
            owner, _, name = str(node.target).rpartition(".")
            setattr(made.get_submodule(owner), name, wrapped)
    return made


def _fused(module: fx.GraphModule, node: fx.Node) -> int | None:
    """Which operand of a sum is a product that nothing else reads."""
    leaf = module.get_submodule(str(node.target))
    if not isinstance(leaf, Binary):
        return None
    for i, operand in enumerate(node.all_input_nodes):
        made_by = module.get_submodule(str(operand.target)) if operand.op == "call_module" else None
        if isinstance(made_by, QuantizedProduct) and len(operand.users) == 1:
            return i
    return None


@contextmanager
def observing(module: nn.Module, images: int = 0) -> Iterator[None]:
    """While inside, forward passes on so many images record ranges; afterwards they round."""
    quants = [m for m in module.modules() if isinstance(m, ActivationQuant)]
    for q in quants:
        q.observing, q.images = True, images
    try:
        yield
    finally:
        for q in quants:
            q.observing = False
