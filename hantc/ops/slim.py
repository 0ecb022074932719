"""The teacher's own region, made cheaper: fewer inner channels, smaller kernels, a simpler activation, its gate a
constant."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from hantc.core.types import CandidateSpec, ParamValue
from hantc.dialect.activation import activation, activation_name
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Binary
from hantc.dialect.graph import shapes_of, tidy
from hantc.dialect.pool import GlobalPool
from hantc.dialect.rewrites.base import swap
from hantc.ops.channels import Group, channel_groups, importance, keep_channels
from hantc.ops.derived import DerivedFamily, Origin, editable, leaves
from hantc.ops.geometry import round_width
from hantc.ops.refit import activations, refit

SMOOTH = ("silu", "hardswish")
KEPT = (1.0, 0.75, 0.5, 0.25)
UNCHANGED: Mapping[str, ParamValue] = MappingProxyType({"act": "same", "kernel": 0, "se": "same"})
"""What these are unless given: `act` may name an activation, `kernel` be the size of the largest kernel that is
left, `se` be "mean"."""


class Slim(DerivedFamily):
    """Channels inside the region pruned to a share `keep` by their energy (He et al. 2017, arXiv 1707.06168:
    importance, then least squares); SiLU or HardSwish replaced by `act`; squeeze-and-excite gates replaced by
    their mean, folded into the next convolution (`se`), so that all of it quantises; kernels larger than `kernel`
    cut down to their middle. Then every convolution is fitted, front to back, to the teacher's values on real
    activations (for a smaller kernel, the projection of the larger one's work onto what it can do)."""

    name = "slim"
    source = "channel pruning (arXiv 1707.06168); hantc"
    params = MappingProxyType({"keep": KEPT})
    options = UNCHANGED
    start = 0.1  # near its goal from the start: over 29 regions of a ResNet-56, 40 s in all, the geometric mean of
    # the relative errors was 0.0118 untrained, 0.0107 at 0.03, 0.0104 at 0.1, 0.0118 at 0.33

    def grid(self) -> list[CandidateSpec]:
        """Not every combination: what hardly saves time keeps its channels."""
        styles = [((), KEPT[1:]), (("se",), (1.0, 0.5)), (("relu",), (1.0, 0.5)), (("relu", "se"), KEPT)]
        styles += [(("hardswish", "se"), (1.0, 0.5)), (("k3",), (1.0,)), (("relu", "se", "k3"), KEPT)]
        return [spec_of(self.name, keep, *style) for style, kept in styles for keep in kept]

    def unsuited(self, spec: CandidateSpec, origin: Origin) -> str:
        """Something must change, and all that is asked for must be there."""
        if len(origin.blocks) > 1:
            return "the same as slimming each block of the span"
        return unsuited(self.values(spec), origin.whole)

    def derive(self, spec: CandidateSpec, origin: Origin) -> fx.GraphModule:
        """The region, changed and refitted."""
        return slimmed(self.values(spec), origin.whole, origin.samples)


_STYLES: Mapping[str, tuple[str, ParamValue]] = MappingProxyType({"se": ("se", "mean"), "k3": ("kernel", 3)})


def spec_of(family: str, keep: float, *style: str) -> CandidateSpec:
    """A spec with those changes only that are asked for: an activation's name, "se", "k3"."""
    changes = dict(_STYLES.get(s, ("act", s)) for s in style)
    return CandidateSpec.make(family, keep=keep, **changes)


def unsuited(p: Mapping[str, Any], block: fx.GraphModule) -> str:
    """Why `block` cannot be slimmed as the parameters `p` say."""
    keep = float(p["keep"])
    if not 0 < keep <= 1:
        return f"keep={keep:g} is not within 0 and 1"
    if p["act"] != "same" and not [1 for _, leaf in _smooth(block) if activation_name(leaf) != p["act"]]:
        return f"no activation that {p['act']} would simplify"
    if p["se"] not in ("same", "mean"):
        return f"se={p['se']} is neither same nor mean"
    if p["se"] == "mean" and not gates(block):
        return "no squeeze-and-excite gate"
    if p["kernel"] and (p["kernel"] < 0 or p["kernel"] % 2 == 0):
        return f"kernel={p['kernel']} is not an odd size"
    if p["kernel"] and not _wide(block, p["kernel"]):
        return f"no kernel larger than {p['kernel']}"
    if keep < 1 and not _prunable(block, keep, gated=p["se"] == "same"):
        return "no channels inside that could be left out"
    if {**p, "keep": keep} == {**UNCHANGED, "keep": 1.0}:
        return "the teacher itself"
    return ""


def _prunable(block: fx.GraphModule, keep: float, *, gated: bool) -> bool:
    """Whether some channels would go, with the gates or once they are folded."""
    if not gated:
        block = editable(block)
        fold_gates(block, {})
    return any(_kept(g, keep) < g.channels for g in _groups(block))


def slimmed(p: Mapping[str, Any], block: fx.GraphModule, samples: Tensor | None) -> fx.GraphModule:
    """`block` with the changes that `p` asks for; fitted to itself on `samples` if there are any."""
    made = editable(block)
    values = activations(block, samples) if samples is not None else {}
    targets = {n.name: values[n.name] for n, _ in leaves(block, _is_conv)} if values else {}
    if p["act"] != "same":
        for node, _ in _smooth(made):
            swap(made, node, activation(str(p["act"])))
    if p["se"] == "mean":
        fold_gates(made, values)
    for conv in _wide(made, p["kernel"]) if p["kernel"] else []:
        _cut_kernel(conv, p["kernel"])
    for group in _groups(made) if float(p["keep"]) < 1 else []:
        count = _kept(group, float(p["keep"]))
        if count >= group.channels:
            continue
        order = importance(made, group, values).argsort(descending=True) if values else torch.arange(group.channels)
        kept = order[:count].sort().values
        keep_channels(made, group, kept)
        for name in {*group.makers, *group.riders} & set(targets):
            targets[name] = targets[name][:, kept]
    if samples is not None:
        refit(made, {n.name: targets[n.name] for n, _ in leaves(made, _is_conv)}, samples)
    return made


def gates(block: fx.GraphModule) -> list[tuple[fx.Node, fx.Node, fx.Node]]:
    """(product, gated value, gate) of each gate whose product only ungrouped convolutions read."""
    found = []
    for node, _ in leaves(block, lambda m: isinstance(m, Binary) and m.op == "Mul"):
        if len(node.all_input_nodes) != 2 or len(node.args) != 2:
            continue
        readers = [block.get_submodule(str(u.target)) if u.op == "call_module" else None for u in node.users]
        if not readers or not all(isinstance(r, Conv) and r.groups == 1 for r in readers):
            continue
        for value, gate in (node.all_input_nodes, node.all_input_nodes[::-1]):
            if _pools(block, gate, value):
                found.append((node, value, gate))
                break
    return found


def fold_gates(block: fx.GraphModule, values: dict[str, Tensor]) -> None:
    """Replace every gate by its mean over the images of `values`, scaled into what reads the product; in place."""
    for node, value, gate in gates(block):
        for reader in list(node.users):
            conv = block.get_submodule(str(reader.target))
            assert isinstance(conv, Conv)
            scale = values[gate.name].mean((0, 2, 3)) if values else torch.full((conv.weight.shape[1],), 0.5)
            conv.weight.data.mul_(scale.view(1, -1, 1, 1))
        node.replace_all_uses_with(value)
    tidy(block)


def _pools(block: fx.GraphModule, gate: fx.Node, value: fx.Node) -> bool:
    """Whether `gate` is computed from the global pool of `value` alone."""
    node = gate
    while node.op == "call_module" and node is not value:
        if len(node.all_input_nodes) != 1:
            return False
        if isinstance(block.get_submodule(str(node.target)), GlobalPool):
            return node.all_input_nodes[0] is value
        node = node.all_input_nodes[0]
    return False


def _smooth(block: fx.GraphModule) -> list[tuple[fx.Node, nn.Module]]:
    """Smooth activations, but for the last, which decides the range of what follows."""
    last = next(n for n in block.graph.nodes if n.op == "output").all_input_nodes[0]
    return [(n, m) for n, m in leaves(block, lambda m: activation_name(m) in SMOOTH) if n is not last]


def _wide(block: fx.GraphModule, kernel: int) -> list[Conv]:
    """Undilated convolutions whose kernels can be cut down to `kernel`."""
    found = []
    for _, leaf in leaves(block, _is_conv):
        assert isinstance(leaf, Conv)
        extra = [k - kernel for k in leaf.kernel]
        if (
            len(extra) == 2
            and set(leaf.dilation) == {1}
            and all(e >= 0 and e % 2 == 0 for e in extra)
            and any(extra)
            and all(pad >= e // 2 for pad, e in zip(leaf.pads, extra * 2, strict=True))
        ):
            found.append(leaf)
    return found


def _cut_kernel(conv: Conv, kernel: int) -> None:
    """Leave the middle of a kernel, in place; the output keeps its size."""
    top, left = ((k - kernel) // 2 for k in conv.kernel)
    middle = conv.weight.detach()[:, :, top : top + kernel, left : left + kernel]
    conv.weight = nn.Parameter(middle.clone(memory_format=torch.contiguous_format))
    conv.kernel = (kernel, kernel)
    conv.pads = tuple(pad - e for pad, e in zip(conv.pads, (top, left) * 2, strict=True))


def _is_conv(leaf: nn.Module) -> bool:
    return isinstance(leaf, Conv)


def _groups(block: fx.GraphModule) -> list[Group]:
    shape = block.meta["info"].inputs[0].shape[1:]
    return channel_groups(block, shapes_of(block, [torch.zeros(1, *shape)]))


def _kept(group: Group, keep: float) -> int:
    return min(group.channels, round_width(keep * group.channels))
