"""The teacher's own region written otherwise: the same function by other operations, which an engine may run faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import fx, nn

from hantc.core.types import CandidateSpec
from hantc.dialect.activation import Clip, HardSigmoid, HardSwish, LeakyRelu, Silu, Unary
from hantc.dialect.conv import Conv
from hantc.dialect.graph import leaf_of, shapes_of
from hantc.dialect.linear import Linear
from hantc.dialect.rewrites.base import calls, shared, sole_user, source, swap
from hantc.dialect.rewrites.merge_convs import MergeConvs
from hantc.dialect.shape import Flatten, Reshape
from hantc.ops.derived import DerivedFamily, Origin, editable

_POINTWISE = (Unary, Silu, HardSwish, HardSigmoid, LeakyRelu, Clip)
_GROWTH = 12.0  # times the multiplications that a form may take: more is never faster


class Exact(DerivedFamily):
    """One of the exact rewrites that take more arithmetic, or other operations, so that only a measurement says
    whether they pay.

    `form` merged: convolutions in a row without an activation between as one, grouped ones too (depthwise +
    pointwise); wide16, wide32, wide64: grouped convolutions in groups of so many channels, with zeros where nothing
    was (ONNX Runtime needs 2 to 5 times as long for groups of 4 or 8 channels); matrix: convolutions of single pixels
    (gates) as matrix products; pixels: matrix products of such pixels as convolutions."""

    name = "exact"
    source = "exact; hantc"
    params = MappingProxyType({"form": ("merged", "wide16", "wide32", "wide64", "matrix", "pixels")})
    exact = True

    def unsuited(self, spec: CandidateSpec, origin: Origin) -> str:
        """The region must hold what the form changes; a span more of it than its blocks do."""
        form = str(spec.kwargs["form"])
        if form not in _FORMS:
            return f"form={form} is none of {', '.join(_FORMS)}"
        if any(p.dtype != torch.float32 for p in origin.whole.parameters()):
            return "its weights are not float32"
        change, lacking = _FORMS[form]
        found = change(editable(origin.whole))
        if not found:
            return lacking
        if len(origin.blocks) > 1 and found <= sum(change(editable(block)) for block in origin.blocks):
            return "the same as this form of each block of the span"
        return ""

    def derive(self, spec: CandidateSpec, origin: Origin) -> fx.GraphModule:
        """The region, rewritten."""
        made = editable(origin.whole)
        _FORMS[str(spec.kwargs["form"])][0](made)
        made.recompile()
        return made


def _merge(block: fx.GraphModule) -> int:
    return len(MergeConvs(_GROWTH).apply(block)[0])


def _widen(width: int, block: fx.GraphModule) -> int:
    """Make the groups of grouped convolutions, depthwise ones apart, up to `width` channels wide; how many it were."""
    done = 0
    for node, conv in calls(block, Conv):
        each = min(conv.weight.shape[1], conv.weight.shape[0] // conv.groups)
        most = min(width // each, int(_GROWTH))
        joined = max((n for n in range(2, most + 1) if conv.groups % n == 0), default=1)
        if conv.groups > 1 and each > 1 and joined > 1 and not shared(block, node):
            swap(block, node, conv.with_groups(conv.groups // joined))
            done += 1
    return done


def _matrix(block: fx.GraphModule) -> int:
    """Write convolutions that see one pixel as products with a matrix; how many."""
    shape = block.meta["info"].inputs[0].shape[1:]
    shapes = shapes_of(block, [torch.zeros(1, *shape)])
    pixels = {n for n in block.graph.nodes if math.prod(shapes.get(n.name, (2, 2, 2))[2:]) == 1}
    single = {n for n in pixels if n.all_input_nodes and source(n) in pixels}
    maps: set[fx.Node] = set()
    done = 0
    for node, conv in calls(block, Conv):
        if node not in single or conv.groups > 1 or math.prod(conv.kernel) > 1 or any(conv.pads) or shared(block, node):
            continue
        linear = Linear(conv.weight.shape[1], conv.weight.shape[0], bias=conv.bias is not None)
        linear.weight = nn.Parameter(conv.weight.detach().flatten(1).clone())
        if conv.bias is not None:
            linear.bias = nn.Parameter(conv.bias.detach().clone())
        swap(block, node, linear)
        _between(block, node, linear.weight.shape[0], len(conv.kernel), maps)
        done += 1
    return done


def _between(block: fx.GraphModule, node: fx.Node, channels: int, dims: int, maps: set[fx.Node]) -> None:
    """Flatten what enters `node`, and make a map again of what leaves it and the activations after it. `maps`: the
    nodes that did so for products before this one."""
    before, last = source(node), node
    if before in maps and len(before.users) == 1:
        node.replace_input_with(before, source(before))
        block.graph.erase_node(before)
    else:
        node.replace_input_with(before, _called(block, f"{node.name}_flat", Flatten(), before))
    while (user := sole_user(last)) is not None and isinstance(leaf_of(block, user), _POINTWISE):
        last = user
    after = _called(block, f"{node.name}_map", Reshape((channels, *(1,) * dims), keep_batch=True), last)
    last.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    maps.add(after)


def _pixels(block: fx.GraphModule) -> int:
    """Write products of a gate's channels with a matrix as 1×1 convolutions; how many."""
    shapes = dict(shapes_of(block, [torch.zeros(2, *block.meta["info"].inputs[0].shape[1:])]))
    flat: set[fx.Node] = set()  # what flattens results of products before
    done = 0
    for node, linear in calls(block, Linear):
        out, channels = linear.weight.shape
        x, shape = source(node), (channels, 1, 1)
        flattens = isinstance(leaf_of(block, x), Flatten | Reshape) and len(shapes.get(x.name, ())) == 2
        if x not in flat and not (flattens and _map(source(x), shapes, shape)):
            continue
        if shared(block, node):
            continue
        conv = Conv(channels, out, 1, bias=linear.bias is not None)
        conv.weight = nn.Parameter(linear.weight.detach().clone()[..., None, None])
        if linear.bias is not None:
            conv.bias = nn.Parameter(linear.bias.detach().clone())
        swap(block, node, conv)
        node.replace_input_with(x, source(x))
        last = node
        while (user := sole_user(last)) is not None and isinstance(leaf_of(block, user), _POINTWISE):
            last = user
        for user in list(last.users):  # what makes a map of them again has nothing to do
            if isinstance(leaf_of(block, user), Reshape) and _map(user, shapes, (out, 1, 1)):
                user.replace_all_uses_with(last)
                block.graph.erase_node(user)
            else:
                made = _called(block, f"{node.name}_flat", Flatten(), last)
                user.replace_input_with(last, made)
                flat.add(made)
        done += 1
    block.graph.eliminate_dead_code()
    return done


def _map(node: fx.Node, shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> bool:
    """Whether a value has this shape for each image."""
    return shapes.get(node.name, ())[1:] == shape


def _called(block: fx.GraphModule, name: str, leaf: nn.Module, value: fx.Node) -> fx.Node:
    block.add_submodule(name, leaf)
    with block.graph.inserting_after(value):
        return block.graph.create_node("call_module", name, (value,), name=name)


_FORMS: Mapping[str, tuple[Callable[[fx.GraphModule], int], str]] = MappingProxyType(
    {
        "merged": (_merge, "no convolutions in a row that could be one"),
        **{
            f"wide{n}": (partial(_widen, n), f"no convolution in groups that fit into {n} channels more than once")
            for n in (16, 32, 64)
        },
        "matrix": (_matrix, "no convolution of single pixels"),
        "pixels": (_pixels, "no matrix product of single pixels"),
    }
)
