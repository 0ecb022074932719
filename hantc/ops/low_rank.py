"""The teacher's own region with its convolutions factorised into two thinner ones."""

from __future__ import annotations

import math
from types import MappingProxyType

import torch
from torch import fx, nn

from hantc.core.types import CandidateSpec
from hantc.dialect.conv import Conv
from hantc.dialect.graph import shapes_of
from hantc.ops.derived import DerivedFamily, Origin, editable, leaves
from hantc.ops.geometry import round_width
from hantc.ops.refit import activations, refit


class LowRank(DerivedFamily):
    """Each ungrouped convolution as a k×k one to `rank` of its channels and a 1×1 one back, by singular value
    decomposition of its weights (Zhang et al. 2016, arXiv 1505.06798), where that saves multiplications. Then
    the 1×1 ones are fitted, front to back, to the teacher's values on real activations."""

    name = "low_rank"
    source = "low-rank factorisation (arXiv 1505.06798); hantc"
    params = MappingProxyType({"rank": (0.75, 0.5, 0.25)})

    def unsuited(self, spec: CandidateSpec, origin: Origin) -> str:
        """A single block, with something to factorise."""
        rank = float(spec.kwargs["rank"])
        if not 0 < rank <= 1:
            return f"rank={rank:g} is not within 0 and 1"
        if len(origin.blocks) > 1:
            return "the same as factorising each block of the span"
        if not _thick(origin.whole, rank):
            return "no convolution that two thinner ones would undercut"
        return ""

    def derive(self, spec: CandidateSpec, origin: Origin) -> fx.GraphModule:
        """The region, factorised and refitted."""
        rank, made, x = float(spec.kwargs["rank"]), editable(origin.whole), origin.samples
        chosen = _thick(made, rank)
        for node, conv in chosen:
            _split(made, node, conv, _rank(conv, rank))
        made.recompile()
        if x is not None:
            values = activations(origin.whole, x)
            refit(made, {node.name: values[node.name] for node, _ in chosen}, x)
        return made


def _thick(block: fx.GraphModule, rank: float) -> list[tuple[fx.Node, Conv]]:
    """Convolutions that cost less as two of the given rank; those on single pixels (gates) cost next to nothing."""
    found = []
    shapes = shapes_of(block, [torch.zeros(1, *block.meta["info"].inputs[0].shape[1:])])
    for node, leaf in leaves(block, lambda m: isinstance(m, Conv) and m.groups == 1 and len(m.kernel) == 2):
        assert isinstance(leaf, Conv)
        c_out, c_in = leaf.weight.shape[:2]
        area, r = leaf.kernel[0] * leaf.kernel[1], _rank(leaf, rank)
        if (
            math.prod(shapes[node.name][2:]) > 1
            and min(c_in, c_out) > r
            and r * (c_in * area + c_out) < c_in * c_out * area
        ):
            found.append((node, leaf))
    return found


def _rank(conv: Conv, rank: float) -> int:
    return round_width(rank * min(conv.weight.shape[:2]))


def _split(block: fx.GraphModule, node: fx.Node, conv: Conv, rank: int) -> None:
    """Put two convolutions in the place of one, in place: the second keeps the node's name and target."""
    c_out, c_in = conv.weight.shape[:2]
    u, s, v = torch.linalg.svd(conv.weight.detach().flatten(1), full_matrices=False)
    thin = Conv(c_in, rank, conv.kernel, conv.stride, bias=False, dilation=conv.dilation, pads=conv.pads)
    wide = Conv(rank, c_out, bias=conv.bias is not None)
    root = s[:rank].sqrt()  # shared evenly, so that both train at one rate
    thin.weight = nn.Parameter((root[:, None] * v[:rank]).reshape(rank, c_in, *conv.kernel).contiguous())
    wide.weight = nn.Parameter((u[:, :rank] * root).reshape(c_out, rank, 1, 1).contiguous())
    if conv.bias is not None:
        wide.bias = nn.Parameter(conv.bias.detach().clone())
    owner, _, name = str(node.target).rpartition(".")
    parent = block.get_submodule(owner)
    setattr(parent, name, wide)
    parent.add_module(f"{name}_thin", thin)
    with block.graph.inserting_before(node):
        before = block.graph.create_node("call_module", f"{node.target}_thin", node.args, name=f"{node.name}_thin")
    node.args = (before,)
