"""The teacher's own region with its convolutions factorised into thinner ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from hantc.core.types import CandidateSpec, ParamValue
from hantc.dialect.conv import Conv
from hantc.dialect.graph import shapes_of
from hantc.ops.derived import DerivedFamily, Origin, editable, leaves
from hantc.ops.geometry import round_width
from hantc.ops.refit import activations, refit


class LowRank(DerivedFamily):
    """Each ungrouped convolution in thinner ones, where that saves multiplications. `form` svd: a k×k one to `rank`
    of its channels and a 1×1 one back, by singular value decomposition of its weights (Zhang et al. 2016, arXiv
    1505.06798); tucker2: a 1×1 one to `rank` of its input channels, a k×k one to `rank` of its output channels, a 1×1
    one to all of them, by Tucker-2 decomposition (Kim et al. 2016, arXiv 1511.06530). Then the last of each is
    fitted, front to back, to the teacher's values on real activations."""

    name = "low_rank"
    source = "low-rank factorisation (arXiv 1505.06798, 1511.06530); hantc"
    params = MappingProxyType({"rank": (0.75, 0.5, 0.25)})
    options: ClassVar[Mapping[str, ParamValue]] = MappingProxyType({"form": "svd"})

    def grid(self) -> list[CandidateSpec]:
        """Every rank by svd; by tucker2 those at which it saves enough to pay for a third operation."""
        tucker = [CandidateSpec.make(self.name, rank=rank, form="tucker2") for rank in (0.6, 0.4)]
        return super().grid() + tucker

    def unsuited(self, spec: CandidateSpec, origin: Origin) -> str:
        """A single block, with something to factorise."""
        rank, form = float(spec.kwargs["rank"]), str(self.values(spec)["form"])
        if not 0 < rank <= 1:
            return f"rank={rank:g} is not within 0 and 1"
        if form not in _FORMS:
            return f"form={form} is none of {', '.join(_FORMS)}"
        if len(origin.blocks) > 1:
            return "the same as factorising each block of the span"
        if not _thick(origin.whole, rank, form):
            return "no convolution that thinner ones would undercut"
        return ""

    def derive(self, spec: CandidateSpec, origin: Origin) -> fx.GraphModule:
        """The region, factorised and refitted."""
        rank, form = float(spec.kwargs["rank"]), str(self.values(spec)["form"])
        made, x = editable(origin.whole), origin.samples
        chosen = _thick(made, rank, form)
        for node, conv in chosen:
            _put(made, node, _tucker(conv, rank) if form == "tucker2" else _svd(conv, rank))
        made.recompile()
        if x is not None:
            values = activations(origin.whole, x)
            refit(made, {node.name: values[node.name] for node, _ in chosen}, x)
        return made


_FORMS = ("svd", "tucker2")


def _thick(block: fx.GraphModule, rank: float, form: str) -> list[tuple[fx.Node, Conv]]:
    """Convolutions that cost less in thinner ones; those on single pixels (gates) cost next to nothing."""
    shapes = shapes_of(block, [torch.zeros(1, *block.meta["info"].inputs[0].shape[1:])])
    found = []
    for node, leaf in leaves(block, lambda m: isinstance(m, Conv) and m.groups == 1 and len(m.kernel) == 2):
        assert isinstance(leaf, Conv)
        if math.prod(shapes[node.name][2:]) > 1 and _saves(leaf, rank, form):
            found.append((node, leaf))
    return found


def _saves(conv: Conv, rank: float, form: str) -> bool:
    """Whether the thinner convolutions have fewer multiplications, and are thinner at all."""
    c_out, c_in = conv.weight.shape[:2]
    area = conv.kernel[0] * conv.kernel[1]
    if form == "svd":
        r = _share(rank, min(c_in, c_out))
        return min(c_in, c_out) > r and r * (c_in * area + c_out) < c_in * c_out * area
    r_in, r_out = _share(rank, c_in), _share(rank, c_out)
    before = math.prod(conv.stride)  # positions that the first one sees, for each of the others
    macs = before * c_in * r_in + r_in * r_out * area + r_out * c_out
    return area > 1 and r_in < c_in and r_out < c_out and macs < c_in * c_out * area


def _share(rank: float, channels: int) -> int:
    return round_width(rank * channels)


def _svd(conv: Conv, rank: float) -> list[Conv]:
    """k×k to the leading singular directions, 1×1 back."""
    c_out, c_in = conv.weight.shape[:2]
    r = _share(rank, min(c_in, c_out))
    u, s, v = torch.linalg.svd(conv.weight.detach().flatten(1), full_matrices=False)
    root = s[:r].sqrt()  # shared evenly, so that both train at one rate
    thin = Conv(c_in, r, conv.kernel, conv.stride, bias=False, dilation=conv.dilation, pads=conv.pads)
    return [_with(thin, root[:, None] * v[:r]), _last(conv, u[:, :r] * root)]


def _tucker(conv: Conv, rank: float) -> list[Conv]:
    """1×1 to the leading input directions, k×k between, 1×1 from the leading output directions."""
    weight = conv.weight.detach()
    c_out, c_in = weight.shape[:2]
    r_in, r_out = _share(rank, c_in), _share(rank, c_out)
    into = torch.linalg.svd(weight.transpose(0, 1).flatten(1), full_matrices=False)[0][:, :r_in]
    outof = torch.linalg.svd(weight.flatten(1), full_matrices=False)[0][:, :r_out]
    core = torch.einsum("oihw,ir,os->srhw", weight, into, outof)
    middle = Conv(r_in, r_out, conv.kernel, conv.stride, bias=False, dilation=conv.dilation, pads=conv.pads)
    return [_with(Conv(c_in, r_in, bias=False), into.t()), _with(middle, core), _last(conv, outof)]


def _with(conv: Conv, weight: Tensor) -> Conv:
    conv.weight = nn.Parameter(weight.reshape(conv.weight.shape).contiguous())
    return conv


def _last(conv: Conv, weight: Tensor) -> Conv:
    """The 1×1 convolution that ends a factorisation, with the bias of the whole."""
    made = _with(Conv(weight.shape[1], weight.shape[0], bias=conv.bias is not None), weight)
    if conv.bias is not None:
        made.bias = nn.Parameter(conv.bias.detach().clone())
    return made


def _put(block: fx.GraphModule, node: fx.Node, factors: Sequence[Conv]) -> None:
    """Put convolutions in the place of one, in place: the last keeps the node's name and target."""
    owner, _, name = str(node.target).rpartition(".")
    parent = block.get_submodule(owner)
    setattr(parent, name, factors[-1])
    for i, conv in enumerate(factors[:-1]):
        parent.add_module(f"{name}_thin{i}", conv)
        with block.graph.inserting_before(node):
            target = f"{node.target}_thin{i}"
            before = block.graph.create_node("call_module", target, node.args, name=f"{node.name}_thin{i}")
        node.args = (before,)
