"""Pixels that are computed and then skipped, or skipped and then convolved, as one strided step.

Detectors and shift-invariant networks take every n-th pixel by a Slice behind a convolution or blur of stride 1, which
computes n² times what is kept; shortcuts take it before a pointwise convolution, where the Slice costs a copy and
breaks the engines' layout of activations.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from hantc.dialect.activation import Clip, HardSigmoid, HardSwish, LeakyRelu, Silu, Unary
from hantc.dialect.conv import Conv
from hantc.dialect.graph import leaf_of
from hantc.dialect.norm import BatchNorm
from hantc.dialect.pool import Pool
from hantc.dialect.rewrites.base import (
    Lazy,
    Log,
    Outcome,
    bypass,
    calls,
    pixel_steps,
    shared,
    sizes_are_fixed,
    sole_user,
    source,
    swap,
)
from hantc.dialect.rewrites.fold_norm import rebuilt
from hantc.dialect.shape import Slice

_POINTWISE = (Unary, Clip, Silu, HardSwish, HardSigmoid, LeakyRelu, BatchNorm)  # the same for every pixel


class StrideSlice:
    """Slice of every n-th pixel behind a convolution or pooling, or before 1×1 convolutions → their stride."""

    name = "stride_slice"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Fold every such Slice, into what is before it where that is possible."""
        log, lazy = Log(self.name), Lazy(gm)
        fixed = sizes_are_fixed(gm)
        for node, cut in calls(gm, Slice):
            shape = lazy.shape(source(node)) if max(cut.steps, default=1) > 1 else None
            steps = pixel_steps(cut, shape, fixed=fixed) if shape is not None and len(shape) == 4 else None
            if steps is None or steps == (1, 1) or not lazy.steady(source(node), (1, 2, 3)):
                continue
            window, reason = _window(gm, source(node))
            if window is not None:
                takers = [window]
            else:
                takers = list(node.users)
                ahead = next((r for u in takers if (r := _why_not_ahead(gm, u))), "")
                if ahead or not takers:
                    log.miss(reason if reason else ahead, node)
                    continue
            for taker in takers:
                swap(gm, taker, _strided(leaf_of(gm, taker), steps))
            log.did(f"became the stride of {', '.join(t.name for t in takers)}", node, *takers)
            bypass(node, source(node))
        return log.finish(gm)


def _window(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node | None, str]:
    """The convolution or pooling that computes what is skipped, through activations; None with the reason."""
    while isinstance(leaf := leaf_of(gm, node), _POINTWISE) and sole_user(node) is not None:
        node = source(node)
    if not isinstance(leaf, (Conv, Pool, *_POINTWISE)):
        return None, "what it skips is computed by neither convolution nor pooling"
    if sole_user(node) is None:
        return None, f"the value of {node.name} is used elsewhere too"
    if shared(gm, node):
        return None, f"the module of {node.name} is used elsewhere too"
    if isinstance(leaf, Pool) and leaf.ceil_mode:
        return None, "the pooling rounds its size up, which a larger stride would change"
    return node, ""


def _why_not_ahead(gm: fx.GraphModule, user: fx.Node) -> str:
    leaf = leaf_of(gm, user)
    if not isinstance(leaf, Conv) or any(k != 1 for k in leaf.kernel) or any(leaf.pads):
        return "its value goes into something other than a 1×1 convolution"
    return f"the weights of {user.name} are used elsewhere too" if shared(gm, user) else ""


def _strided(leaf: nn.Module | None, steps: Sequence[int]) -> Conv | Pool:
    """The leaf with its stride times `steps`: outputs are those of every such pixel, whatever the padding."""
    assert isinstance(leaf, Conv | Pool)
    stride = tuple(s * n for s, n in zip(leaf.stride, steps, strict=True))
    if isinstance(leaf, Pool):
        return Pool(
            leaf.op, leaf.kernel, stride, leaf.pads, dilation=leaf.dilation, count_include_pad=leaf.count_include_pad
        )
    made = rebuilt(leaf, leaf.weight.detach(), leaf.bias, stride=stride)
    assert isinstance(made, Conv)
    return made
