"""One convolution in the place of a region, fitted in closed form."""

from __future__ import annotations

import copy
from types import MappingProxyType

from torch import Tensor, fx, nn

from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.activation import activation_name
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Add
from hantc.dialect.graph import trace
from hantc.ops.derived import DerivedFamily, Origin, leaves
from hantc.ops.geometry import Misfit, resize_pads, strides
from hantc.ops.refit import activations, fit_conv


class Affine(DerivedFamily):
    """A k×k convolution (beside the identity where shapes match) and the region's last activation: the best
    that a linear operation can do, by ridge regression on real activations. Trained residual blocks change
    their input little (Greff et al. 2017, arXiv 1612.07771), and the least of them little more than linearly."""

    name = "affine"
    source = "ridge regression; hantc"
    params = MappingProxyType({"k": (1, 3)})

    def unsuited(self, spec: CandidateSpec, origin: Origin) -> str:
        """The resolution must shrink by whole strides, and there must be more than such a convolution."""
        k = int(spec.kwargs["k"])
        if k < 1 or k % 2 == 0:
            return f"k={k} is not an odd size"
        convs = [m for _, m in leaves(origin.whole, lambda m: isinstance(m, Conv))]
        if len(convs) == 1 and isinstance(convs[0], Conv) and max(convs[0].kernel) <= k:
            return "the region is one convolution already"
        try:
            resize_pads(_signature(origin.whole), k)
        except Misfit as misfit:
            return str(misfit)
        return ""

    def derive(self, spec: CandidateSpec, origin: Origin) -> fx.GraphModule:
        """The convolution, fitted to the region's output before its last activation."""
        signature, k = _signature(origin.whole), int(spec.kwargs["k"])
        last, act = _ending(origin.whole)
        conv = Conv(
            signature.in_shape[0], signature.out_shape[0], k, strides(signature), pads=resize_pads(signature, k)
        )
        nn.init.zeros_(conv.weight)
        same, x = signature.in_shape == signature.out_shape, origin.samples
        if x is not None:
            wanted = activations(origin.whole, x)[last.name]
            fit_conv(conv, x, wanted - x if same else wanted)
        return trace(_Affine(conv, copy.deepcopy(act), same).eval(), signature.in_shape, signature.out_shape)


class _Affine(nn.Module):
    def __init__(self, conv: Conv, act: nn.Module | None, same: bool) -> None:
        super().__init__()
        self.conv = conv
        self.add = Add() if same else None
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H', W')."""
        y: Tensor = self.conv(x)
        y = y if self.add is None else self.add(y, x)
        out: Tensor = y if self.act is None else self.act(y)
        return out


def _ending(block: fx.GraphModule) -> tuple[fx.Node, nn.Module | None]:
    """The node whose value to fit, and the activation behind it."""
    node = next(n for n in block.graph.nodes if n.op == "output").all_input_nodes[0]
    leaf = block.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not activation_name(leaf) or len(node.all_input_nodes) != 1:
        return node, None
    return node.all_input_nodes[0], leaf


def _signature(block: fx.GraphModule) -> Signature:
    info = block.meta["info"]
    before, after = (tuple(int(d) for d in s.shape[1:]) for s in (info.inputs[0], info.outputs[0]))
    return Signature(before, after)
