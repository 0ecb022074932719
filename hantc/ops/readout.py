"""A candidate's last convolution fitted in closed form: before its first step, on what the random layers before it
give (the least-squares readout of random features: Huang et al. 2006, "Extreme learning machine"); and in a student,
on what the replaced regions before it make of the images."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hantc.dialect.activation import activation_name
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Add
from hantc.dialect.norm import BatchNorm
from hantc.dialect.spread import image_variance, ordinary, per_image
from hantc.ops.refit import activations, solve_conv

_COLUMNS = 1152  # weights of one output channel, at most: solving for more takes longer than learning them
_ROWS = (6144, 6)  # positions that a fit looks at: so many, or for each of those so many, whichever is more
_LEAST_ROWS = 1.5  # positions for each, below which it would learn them by heart
_HELD = 4  # one image in so many judges the fit, and is not fitted to
_RECTIFIERS = ("relu", "relu6", "leakyrelu")  # what should come out of them can be asked for before them
_SMOOTH = ("silu", "hardswish")  # these have an inverse from their minimum on
_LINEAR, _POINTS = 12.0, 8192  # where they are the identity at the latest; how finely they are inverted


@dataclass(frozen=True)
class _Ending:
    """How a candidate ends: `conv`, `norm` (`conv` again where it is folded), perhaps an activation, which makes
    `arm`; perhaps further arms added to it, which makes `total`; perhaps an activation, which makes `last`."""

    conv: fx.Node
    norm: fx.Node
    arm: fx.Node
    total: fx.Node
    last: fx.Node


def fit_readout(candidate: fx.GraphModule, source: Tensor, target: Tensor) -> bool:
    """Fit the last convolution of a candidate so that (N, *in_shape) gives (N, *out_shape), in place: with a norm
    behind it, in training mode, from nothing, and of large kernels the middle alone; with the norm folded into it,
    drawn towards the weights that it has. Left as it was, and False, where it ends in something else, would have too
    much to fit, or was nearer on images held back."""
    usual = ordinary(image_variance(source)) & ordinary(image_variance(target))
    source, target = source[usual], target[usual]
    held = torch.arange(len(source)) % _HELD == 0
    ending = _ending(candidate)
    if ending is None or len(source) < 2 * _HELD:
        return False
    conv, norm = _leaf(candidate, ending.conv), _leaf(candidate, ending.norm)
    assert isinstance(conv, Conv) and isinstance(norm, (Conv, BatchNorm))
    available = int((~held).sum()) * target[0, 0].numel()
    margin = _margin(conv, available)
    if margin is None or (margin and conv is norm):
        return False
    inner = _inner(conv, margin)
    rows = min(max(_ROWS[0], _ROWS[1] * inner.weight[0].numel()), available)
    with torch.no_grad():
        places = (ending.conv.all_input_nodes[0], ending.arm, ending.total, ending.last)
        values = activations(candidate, source, {n.name for n in places})
        seen, arm, total, last = (values[n.name] for n in places)
        if not total.shape == arm.shape == target.shape:
            return False  # an arm that is spread over all positions
        before = _error(last[held], target[held])
        whole = target if ending.last is ending.total else _before(candidate, ending.last, target)
        goal = whole - (total - arm)
        goal = goal if ending.arm is ending.norm else _before(candidate, ending.arm, goal)
        start = conv.weight if conv is norm else torch.zeros_like(inner.weight)
        solved = solve_conv(inner, seen[~held], goal[~held], start=start, rows=rows)
        if solved is None:
            return False
        states = [(leaf, copy.deepcopy(leaf.state_dict())) for leaf in (conv, norm)]
        conv.weight.copy_(F.pad(solved[0], (margin,) * 4))
        if isinstance(norm, BatchNorm):
            _neutral(norm, conv(seen), solved[1])
        elif conv.bias is not None:
            conv.bias.copy_(solved[1])
        if not _error(candidate(source)[held], target[held]) < before:
            for leaf, state in states:
                leaf.load_state_dict(state)
            return False
    return True


def _margin(conv: Conv, available: int) -> int | None:
    """How much to leave out at each side of a kernel, so that what is left can be fitted on so many positions; the
    rest starts at zero. None where not even the middle can."""
    for margin in range(min(conv.kernel) // 2 + 1):
        columns = conv.weight.shape[1] * (conv.kernel[0] - 2 * margin) * (conv.kernel[1] - 2 * margin)
        if 0 < columns <= _COLUMNS and _LEAST_ROWS * columns <= available and margin <= min(conv.pads):
            return margin
    return None


def _inner(conv: Conv, margin: int) -> Conv:
    """The convolution with the middle of the kernel alone; it gives as many positions."""
    c_out, c_in = conv.weight.shape[:2]
    kernel, pads = [k - 2 * margin for k in conv.kernel], [p - margin for p in conv.pads]
    return Conv(c_in, c_out, kernel, conv.stride, bias=False, pads=pads)


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((per_image((found - wanted).square()) / image_variance(wanted)).mean())


def _neutral(norm: BatchNorm, y: Tensor, bias: Tensor) -> None:
    """Set a norm so that it adds `bias` to `y`, whose statistics it takes, and does nothing else."""
    dims = (0, 2, 3)
    mean, variance = y.mean(dims), y.var(dims, correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_((variance + norm.eps).sqrt())
    norm.bias.copy_(mean + bias)


def _leaf(candidate: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return candidate.get_submodule(str(node.target)) if node.op == "call_module" else None


def _ending(candidate: fx.GraphModule) -> _Ending | None:
    """The end of a candidate, if it can be fitted; of several arms that could be, that with the largest kernel."""
    last = next(n for n in candidate.graph.nodes if n.op == "output").all_input_nodes[0]
    total = _behind(candidate, last)
    found: list[tuple[int, _Ending]] = []
    arms = [total] if total is not None else []
    while arms:
        arm = arms.pop(0)
        if isinstance(_leaf(candidate, arm), Add):
            arms += arm.all_input_nodes
            continue
        norm = _behind(candidate, arm)
        if norm is None:
            continue
        folded = not isinstance(_leaf(candidate, norm), BatchNorm)
        at = norm if folded else norm.all_input_nodes[0]
        conv = _leaf(candidate, at)
        if (
            isinstance(conv, Conv)
            and conv.groups == 1
            and conv.dilation == (1, 1)
            and (conv.bias is not None) == folded
        ):
            assert total is not None
            found.append((conv.weight.numel(), _Ending(at, norm, arm, total, last)))
    return max(found, key=lambda f: f[0])[1] if found else None


def _behind(candidate: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """`node`, or what an activation there reads; None where that cannot be told from what the activation gives."""
    name = activation_name(_leaf(candidate, node))
    if name in (*_RECTIFIERS, *_SMOOTH):
        return node.all_input_nodes[0]
    return None if name else node


def _before(candidate: fx.GraphModule, node: fx.Node, wanted: Tensor) -> Tensor:
    """What to ask for before an activation at `node` (if there is one) so that `wanted` comes out of it."""
    leaf = _leaf(candidate, node)
    if leaf is None or activation_name(leaf) not in _SMOOTH:
        return wanted  # a rectifier makes of it what it can
    x = torch.linspace(-2.0, _LINEAR, _POINTS)
    y = leaf(x)
    x, y = x[int(y.argmin()) :], y[int(y.argmin()) :]  # rises from there
    right = torch.searchsorted(y, wanted.clamp(float(y[0]), float(y[-1])).contiguous()).clamp(1, len(y) - 1)
    share = (wanted.clamp_min(float(y[0])) - y[right - 1]) / (y[right] - y[right - 1]).clamp_min(1e-12)
    return torch.where(wanted > y[-1], wanted, x[right - 1] + share.clamp(0, 1) * (x[right] - x[right - 1]))
