"""Weights fitted in closed form: what a convolution must be so that a changed graph still computes what the
teacher computes, in the least-squares sense, on real activations."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hantc.dialect.conv import Conv, torch_pads
from hantc.ops.channels import is_depthwise

_ROWS = 12288  # positions that a fit looks at, at most
_ROWS_EACH = 64  # for each weight of a channel, where channels are fitted one by one
_ROWS_LEAST = 512  # for a channel
_RIDGE = 3e-3  # of the mean energy of the inputs: keeps weights near where they start


class Recorder(fx.Interpreter):
    """Runs a graph and keeps tensors by node name: all, or those of the nodes in `wanted`."""

    def __init__(self, module: fx.GraphModule, wanted: Collection[str] | None = None) -> None:
        super().__init__(module)
        self.values, self.wanted = dict[str, Tensor](), wanted

    def run_node(self, n: fx.Node) -> Any:
        """As fx, and remembers."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and (self.wanted is None or n.name in self.wanted):
            self.values[n.name] = result
        return result


def activations(module: fx.GraphModule, x: Tensor, wanted: Collection[str] | None = None) -> dict[str, Tensor]:
    """Every node's value on `x`, or that of the nodes in `wanted`."""
    recorder = Recorder(module, wanted)
    with torch.no_grad():
        recorder.run(x)
    return recorder.values


class _Refit(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, targets: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self.targets = targets

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and n.name in self.targets:
            conv = self.module.get_submodule(str(n.target))
            x = self.env[n.all_input_nodes[0]]
            if isinstance(conv, Conv) and len(conv.kernel) == 2:
                fit_conv(conv, x, self.targets[n.name])
        return super().run_node(n)


def refit(module: fx.GraphModule, targets: Mapping[str, Tensor], x: Tensor) -> None:
    """Fit the convolutions named in `targets` one after the other, in place, each on what the ones before it
    now give: (N, C, H, W) values that they should produce."""
    with torch.no_grad():
        _Refit(module, targets).run(x)


def fit_conv(conv: Conv, x: Tensor, target: Tensor) -> None:
    """Ridge regression of `target` on the patches of `x`, drawn towards the present weights; in place. Leaves
    the convolution alone if it is grouped (but not depthwise) or the system cannot be solved."""
    if conv.groups > 1 and not is_depthwise(conv):
        return
    solved = solve_conv(conv, x, target, start=conv.weight.detach())
    if solved is None:
        return
    conv.weight.data.copy_(solved[0])
    conv.bias = torch.nn.Parameter(solved[1])


def solve_conv(
    conv: Conv, x: Tensor, target: Tensor, *, start: Tensor, rows: int = _ROWS
) -> tuple[Tensor, Tensor] | None:
    """(weight, bias) of an ungrouped or depthwise convolution that lead from `x` to `target`, (N, C', H', W'), by
    ridge regression drawn towards the weights `start`, on at most `rows` positions. None where it has no solution."""
    if is_depthwise(conv):
        # few unknowns each: more positions would hardly change them, and take memory traffic
        patches, wanted = _rows(conv, x, target, min(rows, max(_ROWS_LEAST, _ROWS_EACH * math.prod(conv.kernel))))
        design = patches.transpose(0, 1).contiguous()  # (C, P, k²)
        origin = start.flatten(1).unsqueeze(2)  # (C, k², 1)
        goal = wanted.t().unsqueeze(2)  # (C, P, 1)
    else:
        patches, wanted = _rows(conv, x, target, rows)
        design = patches.flatten(1).unsqueeze(0)  # (1, P, C·k²)
        origin = start.flatten(1).t().unsqueeze(0)  # (1, C·k², C')
        goal = wanted.unsqueeze(0)
    solved = _ridge(design, goal, origin)
    if solved is None:
        return None
    weight, bias = solved
    flat = weight.squeeze(2) if is_depthwise(conv) else weight.squeeze(0).t()
    return flat.reshape(conv.weight.shape), bias.flatten()


def _ridge(design: Tensor, goal: Tensor, start: Tensor) -> tuple[Tensor, Tensor] | None:
    """(weights, bias) minimising ‖design·w + b − goal‖² + λ‖w − start‖², batched over dim 0; λ is _RIDGE
    times the mean energy of the inputs."""
    centre, level = design.mean(1, keepdim=True), goal.mean(1, keepdim=True)
    a, y = design - centre, goal - level
    gram = (a.transpose(1, 2) @ a).double()
    n = gram.shape[-1]
    strength = _RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    gram = gram + strength[:, None, None] * torch.eye(n, dtype=gram.dtype)
    right = (a.transpose(1, 2) @ y).double() + strength[:, None, None] * start.double()
    factor, info = torch.linalg.cholesky_ex(gram)
    if bool(info.any()):
        return None
    weight = torch.cholesky_solve(right, factor).float()
    if not bool(torch.isfinite(weight).all()):
        return None
    return weight, level - centre @ weight


def _spread(count: int, most: int) -> Tensor:
    """`most` of the numbers below `count`: one at random, but the same each time, in each of as many equal parts. Even
    steps may be multiples of a map's width, and see its corners alone."""
    part = count / most
    jitter = torch.rand(most, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return ((torch.arange(most, dtype=torch.float64) + jitter) * part).long().clamp_max(count - 1)


def _rows(conv: Conv, x: Tensor, target: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Up to `most` positions spread over all images: what the kernel sees there, (P, C, k²), and what it should
    give, (P, C')."""
    padded = F.pad(x, torch_pads(conv.pads)) if any(conv.pads) else x
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel, conv.stride, conv.dilation
    n, _, height, width = target.shape
    count = n * height * width
    at = _spread(count, min(count, most))
    image, row, column = at // (height * width), at // width % height, at % width
    rows = row[:, None] * sh + torch.arange(kh).repeat_interleave(kw) * dh  # (P, k²)
    columns = column[:, None] * sw + torch.arange(kw).repeat(kh) * dw
    patches = padded.permute(0, 2, 3, 1)[image[:, None], rows, columns]  # (P, k², C)
    return patches.transpose(1, 2), target.permute(0, 2, 3, 1)[image, row, column]
