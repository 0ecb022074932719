"""The teacher's own strided stem as space-to-depth and a dense convolution: the same function, other kernels."""

from __future__ import annotations

import torch
from torch import fx, nn

from hantc.core.types import CandidateSpec
from hantc.dialect.conv import Conv
from hantc.dialect.graph import shapes_of
from hantc.dialect.rearrange import SpaceToDepth
from hantc.ops.derived import DerivedFamily, Origin, editable

_MOST_CHANNELS = 16  # of the input: more are read well as they are


class TeacherS2D(DerivedFamily):
    """The region's first convolution, k×k at stride s, as space-to-depth by s and a convolution of ⌈k/s⌉ (or one
    more, if the padding is no multiple of s) at stride 1: exactly equal (Ridnik et al. 2021, arXiv 2003.13630; as
    MLPerf's ResNet-50 stems). Engines made for many channels read 3 of them badly."""

    name = "teacher_s2d"
    source = "exact; TResNet's stem, arXiv 2003.13630"
    exact = True

    def unsuited(self, spec: CandidateSpec, origin: Origin) -> str:
        """The region must begin with a strided convolution of few channels, and its input fall into blocks."""
        conv, node = _first(origin.whole)
        if conv is None or node is None:
            return "does not begin with one convolution"
        if conv.weight.dtype != torch.float32:
            return f"its weights are {str(conv.weight.dtype).removeprefix('torch.')}"
        s = conv.stride[0]
        if len(conv.stride) != 2 or s < 2 or set(conv.stride) != {s}:
            return "its first convolution has no stride in both directions alike"
        if conv.groups > 1 or set(conv.dilation) != {1}:
            return "its first convolution is grouped or dilated"
        c = conv.weight.shape[1]
        if c > _MOST_CHANNELS:
            return f"for stems: {c} channels are more than {_MOST_CHANNELS}"
        if any(pad >= k for pad, k in zip(conv.pads[:2], conv.kernel, strict=True)):
            return "its first convolution is padded by more than its kernel"
        shapes = _shapes(origin.whole)
        before, after = shapes[node.all_input_nodes[0].name][2:], shapes[node.name][2:]
        if any(a != s * b for a, b in zip(before, after, strict=True)):
            return f"{tuple(before)} does not fall into {s}×{s} blocks, one for each position"
        return ""

    def derive(self, spec: CandidateSpec, origin: Origin) -> fx.GraphModule:
        """The region with its first convolution written otherwise."""
        made = editable(origin.whole)
        conv, node = _first(made)
        assert conv is not None and node is not None
        blocks = "hantc_blocks"
        made.add_submodule(blocks, SpaceToDepth(conv.stride[0]))
        with made.graph.inserting_before(node):
            value = made.graph.call_module(blocks, (node.all_input_nodes[0],))
        node.replace_input_with(node.all_input_nodes[0], value)
        made.set_submodule(str(node.target), _dense(conv))
        made.recompile()
        return made


def _dense(conv: Conv) -> Conv:
    """The stride-1 convolution that does on blocks of pixels what `conv` does on pixels. Offset t of the old kernel
    reads pixel s·i + t − pad, which is row (t − pad) mod s of block i + ⌊(t − pad) / s⌋."""
    s, (kh, kw), (top, left) = conv.stride[0], conv.kernel, conv.pads[:2]
    out, c = conv.weight.shape[:2]
    first, last = [-p // s for p in (top, left)], [(k - 1 - p) // s for k, p in ((kh, top), (kw, left))]
    size = tuple(b - a + 1 for a, b in zip(first, last, strict=True))
    weight = torch.zeros(out, s * s * c, *size)
    for i in range(kh):
        for j in range(kw):
            (qi, ri), (qj, rj) = divmod(i - top, s), divmod(j - left, s)
            start = (ri * s + rj) * c
            weight[:, start : start + c, qi - first[0], qj - first[1]] = conv.weight.detach()[:, :, i, j]
    pads = (-first[0], -first[1], last[0], last[1])
    made = Conv(s * s * c, out, size, 1, bias=conv.bias is not None, pads=pads)
    made.weight = nn.Parameter(weight)
    if conv.bias is not None:
        made.bias = nn.Parameter(conv.bias.detach().clone())
    return made


def _first(block: fx.GraphModule) -> tuple[Conv | None, fx.Node | None]:
    """The convolution that alone reads the region's input, with its node."""
    entry = next(n for n in block.graph.nodes if n.op == "placeholder")
    readers = list(entry.users)
    leaf = block.get_submodule(str(readers[0].target)) if len(readers) == 1 and readers[0].op == "call_module" else None
    return (leaf, readers[0]) if isinstance(leaf, Conv) else (None, None)


def _shapes(block: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    shape = block.meta["info"].inputs[0].shape[1:]
    return dict(shapes_of(block, [torch.zeros(1, *shape)]))
