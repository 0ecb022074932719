"""Which channels of a graph belong together, and graphs with some of them left out (structured pruning).

Two tensors share their channels where an operation ties them: an activation, a depthwise convolution, a sum.
Such a group of tensors can lose channels if none of them enters or leaves the graph (Fang et al. 2023,
"DepGraph", arXiv 2301.12900, for graphs as simple as a region's).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from hantc.dialect.activation import activation_name
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Binary
from hantc.dialect.norm import BatchNorm
from hantc.dialect.pool import GlobalPool, Pool

_WIDE_ENOUGH = 8  # fewer channels than a vector register holds save no time


@dataclass
class Group:
    """Tensors that share their channels: `makers` are convolutions that produce them, `riders` depthwise ones
    and norms on the way, `users` convolutions that read them."""

    channels: int
    fixed: bool = False
    spatial: bool = False  # some tensor of the group is larger than one pixel
    makers: list[str] = field(default_factory=list)
    riders: list[str] = field(default_factory=list)
    users: list[str] = field(default_factory=list)


def is_depthwise(conv: Conv) -> bool:
    """One filter for each channel."""
    return conv.groups > 1 and conv.groups == conv.weight.shape[0] and conv.weight.shape[1] == 1


class _Ties:
    def __init__(self) -> None:
        self.parent: list[int] = []
        self.groups: list[Group] = []

    def new(self, channels: int) -> int:
        self.parent.append(len(self.parent))
        self.groups.append(Group(channels))
        return len(self.parent) - 1

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            i = self.parent[i]
        return i

    def group(self, i: int) -> Group:
        return self.groups[self.find(i)]

    def tie(self, i: int, j: int) -> None:
        a, b = self.find(i), self.find(j)
        if a == b:
            return
        one, other = self.groups[a], self.groups[b]
        self.parent[b] = a
        one.fixed |= other.fixed or one.channels != other.channels
        one.spatial |= other.spatial
        one.makers += other.makers
        one.riders += other.riders
        one.users += other.users


def channel_groups(module: fx.GraphModule, shapes: Mapping[str, tuple[int, ...]]) -> list[Group]:
    """The groups that can lose channels. `shapes` as from `shapes_of`."""
    ties = _Ties()
    of: dict[str, int] = {}
    for node in module.graph.nodes:
        shape = shapes.get(node.name, ())
        own = ties.new(shape[1] if len(shape) > 1 else 0)
        inputs = [of[n.name] for n in node.all_input_nodes]
        of[node.name] = own
        leaf = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not _visit(ties, own, inputs, leaf, node.name):
            for i in (own, *inputs):
                ties.group(i).fixed = True
        if len(shape) == 4 and shape[2] * shape[3] > 1:
            ties.group(own).spatial = True
    roots = sorted({ties.find(i) for i in range(len(ties.parent))})
    found = [ties.groups[r] for r in roots]
    return [g for g in found if not g.fixed and g.spatial and g.users and g.makers and g.channels > _WIDE_ENOUGH]


def _visit(ties: _Ties, own: int, inputs: list[int], leaf: nn.Module | None, name: str) -> bool:
    """Tie what `leaf` ties; False for what is not understood."""
    if isinstance(leaf, Conv) and is_depthwise(leaf):
        ties.tie(inputs[0], own)
        ties.group(own).riders.append(name)
    elif isinstance(leaf, Conv) and leaf.groups == 1:
        ties.group(inputs[0]).users.append(name)
        ties.group(own).makers.append(name)
    elif isinstance(leaf, BatchNorm):
        ties.tie(inputs[0], own)
        ties.group(own).riders.append(name)
    elif isinstance(leaf, (Pool, GlobalPool)) or activation_name(leaf):
        ties.tie(inputs[0], own)
    elif isinstance(leaf, Binary) and len(inputs) == 2:
        ties.tie(inputs[0], own)
        ties.tie(inputs[1], own)
    else:
        return False
    return True


def keep_channels(module: fx.GraphModule, group: Group, kept: Tensor) -> None:
    """Leave only the channels `kept` (indices, ascending) of a group, in place."""
    leaf_of = {n.name: module.get_submodule(str(n.target)) for n in module.graph.nodes if n.op == "call_module"}
    for name in {*group.makers, *group.riders}:
        leaf = leaf_of[name]
        for key in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(leaf, key, None)
            if value is None:
                continue
            slim = value.detach()[kept].clone()
            setattr(leaf, key, nn.Parameter(slim) if isinstance(value, nn.Parameter) else slim)
        if isinstance(leaf, Conv) and name in group.riders:
            leaf.groups = len(kept)
    for name in set(group.users):
        conv = leaf_of[name]
        assert isinstance(conv, Conv)
        conv.weight = nn.Parameter(conv.weight.detach()[:, kept].clone())
    group.channels = len(kept)


def importance(module: fx.GraphModule, group: Group, values: Mapping[str, Tensor]) -> Tensor:
    """For each channel, the energy it brings into the convolutions that read it: mean square of the
    activation times the squared norm of the weights that meet it. `values`: node name → activation."""
    total = torch.zeros(group.channels)
    nodes = {n.name: n for n in module.graph.nodes}
    for name in set(group.users):
        conv = module.get_submodule(str(nodes[name].target))
        assert isinstance(conv, Conv)
        x = values[nodes[name].all_input_nodes[0].name]
        energy = x.square().transpose(0, 1).flatten(1).mean(1)
        total += energy * conv.weight.detach().square().transpose(0, 1).flatten(1).sum(1)
    return total
