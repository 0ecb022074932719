"""Layers that mix positions by what they hold: self-attention and the lambda layer, made of dialect leaves.

Norms are batch norms behind 1×1 convolutions (as in LeViT, arXiv 2104.01136), so that they fold away; there is
no position encoding: the convolutions around these layers know where they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hantc.dialect.activation import Softmax
from hantc.dialect.elementwise import Add
from hantc.dialect.linear import MatMul
from hantc.dialect.norm import BatchNorm
from hantc.dialect.shape import Reshape, Transpose
from hantc.ops.geometry import Misfit
from hantc.ops.layers import SKIP_GAMMA, ConvBN

MAX_POSITIONS = 256
"""More than 16×16 positions and the products of all with all outweigh what a convolution would cost."""


@dataclass(frozen=True)
class SelfAttention:
    """Multi-head self-attention over all positions, (N, C, H, W) → same, plus its input."""

    channels: int
    size: tuple[int, int]
    heads: int

    @property
    def weights(self) -> int:
        """Query, key, value and output projections, each with norm."""
        return 4 * (self.channels**2 + 2 * self.channels)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample: projections, and both products of all positions with all."""
        n = math.prod(self.size)
        return 4 * n * self.channels**2 + 2 * n * n * self.channels

    def check(self) -> None:
        """Misfit where channels do not divide, or positions are too many."""
        if self.channels % self.heads:
            raise Misfit(f"{self.channels} channels do not divide by {self.heads} heads")
        if math.prod(self.size) > MAX_POSITIONS:
            raise Misfit(f"{math.prod(self.size)} positions are too many for attention (at most {MAX_POSITIONS})")

    def module(self) -> nn.Module:
        """The layer itself."""
        return _Attention(self)


def _projection(channels: int, out: int, size: tuple[int, int]) -> nn.Module:
    return ConvBN((channels, out), size, size).module()


def _set_scale(module: nn.Module, scale: float) -> None:
    """The scale of a projection's norm."""
    with torch.no_grad():
        for norm in (m for m in module.modules() if isinstance(m, BatchNorm)):
            norm.weight.fill_(scale)


class _Attention(nn.Module):
    def __init__(self, plan: SelfAttention) -> None:
        super().__init__()
        c, n, depth = plan.channels, math.prod(plan.size), plan.channels // plan.heads
        self.query, self.key, self.value, self.out = (_projection(c, c, plan.size) for _ in range(4))
        _set_scale(self.query, depth**-0.5)  # stands for the usual division by √depth
        _set_scale(self.out, SKIP_GAMMA)
        self.split_q, self.split_k, self.split_v = (Reshape((plan.heads, depth, n), keep_batch=True) for _ in range(3))
        self.turn_q, self.turn_v, self.turn_back = (Transpose((0, 1, 3, 2)) for _ in range(3))
        self.scores, self.soft, self.mix = MatMul(), Softmax(-1, 4), MatMul()
        self.join = Reshape((c, *plan.size), keep_batch=True)
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → same."""
        q = self.turn_q(self.split_q(self.query(x)))  # (N, heads, positions, depth)
        k = self.split_k(self.key(x))
        v = self.turn_v(self.split_v(self.value(x)))
        y = self.mix(self.soft(self.scores(q, k)), v)
        out: Tensor = self.add(self.out(self.join(self.turn_back(y))), x)
        return out


@dataclass(frozen=True)
class Lambda:
    """The lambda layer's content part (Bello 2021, arXiv 2102.08602): the context is summed up, linearly in the
    number of positions, into one small matrix, which every position's queries are multiplied by."""

    channels: int
    size: tuple[int, int]
    heads: int
    depth: int = 16  # of keys and queries

    @property
    def _inner(self) -> tuple[int, int, int]:
        return self.heads * self.depth, self.depth, self.channels // self.heads

    @property
    def weights(self) -> int:
        """Query, key and value projections, each with norm."""
        return sum(self.channels * out + 2 * out for out in self._inner)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample."""
        n, (q, k, v) = math.prod(self.size), self._inner
        return n * self.channels * (q + k + v) + n * k * v + n * q * v

    def check(self) -> None:
        """Misfit where channels do not divide."""
        if self.channels % self.heads:
            raise Misfit(f"{self.channels} channels do not divide by {self.heads} heads")

    def module(self) -> nn.Module:
        """The layer itself."""
        return _Lambda(self)


class _Lambda(nn.Module):
    def __init__(self, plan: Lambda) -> None:
        super().__init__()
        n, (q, k, v) = math.prod(plan.size), plan._inner
        self.query, self.key, self.value = (_projection(plan.channels, out, plan.size) for out in (q, k, v))
        self.split_q = Reshape((plan.heads, k, n), keep_batch=True)
        self.split_k, self.split_v = Reshape((1, k, n), keep_batch=True), Reshape((1, v, n), keep_batch=True)
        self.turn_k = Transpose((0, 1, 3, 2))
        self.soft, self.context, self.apply_ = Softmax(-1, 4), MatMul(), MatMul()
        self.join = Reshape((plan.channels, *plan.size), keep_batch=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → same."""
        k = self.turn_k(self.soft(self.split_k(self.key(x))))  # (N, 1, positions, depth), sums to one over positions
        summed = self.context(self.split_v(self.value(x)), k)  # (N, 1, C / heads, depth)
        y = self.apply_(summed, self.split_q(self.query(x)))  # (N, heads, C / heads, positions)
        out: Tensor = self.join(y)
        return out


@dataclass(frozen=True)
class FeedForward:
    """Two 1×1 convolutions with `factor` times the channels between, plus the input."""

    channels: int
    size: tuple[int, int]
    act: str
    factor: int = 2

    @property
    def _parts(self) -> tuple[ConvBN, ConvBN]:
        wide = self.factor * self.channels
        return (
            ConvBN((self.channels, wide), self.size, self.size, act=self.act),
            ConvBN((wide, self.channels), self.size, self.size),
        )

    @property
    def weights(self) -> int:
        """Trainable values."""
        return sum(p.weights for p in self._parts)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample."""
        return sum(p.macs for p in self._parts)

    def check(self) -> None:
        """Always fits."""

    def module(self) -> nn.Module:
        """The layer itself."""
        return _FeedForward(self)


class _FeedForward(nn.Module):
    def __init__(self, plan: FeedForward) -> None:
        super().__init__()
        self.widen, self.narrow = (p.module() for p in plan._parts)
        _set_scale(self.narrow, SKIP_GAMMA)
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → same."""
        out: Tensor = self.add(self.narrow(self.widen(x)), x)
        return out
