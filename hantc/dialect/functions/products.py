"""Sums of products: Gemm in full, Einsum, attention as exporters write it today."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hantc.core.errors import UnsupportedError
from hantc.dialect.leaf import OnnxNode
from hantc.dialect.shape import torch_dtype
from hantc.dialect.verbatim import Function


def _gemm(n: OnnxNode, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    left = a.T if n.attrs.get("transA", 0) else a
    right = b.T if n.attrs.get("transB", 0) else b
    out = n.attrs.get("alpha", 1.0) * (left @ right)
    result: Tensor = out if c is None else out + n.attrs.get("beta", 1.0) * c
    return result.to(a.dtype)


def _matmul(n: OnnxNode, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


def _einsum(n: OnnxNode, *xs: Tensor) -> Tensor:
    return torch.einsum(n.attrs["equation"].replace(" ", ""), *xs)


def _heads(x: Tensor, count: int | None) -> Tensor:
    """(N, length, heads · size) → (N, heads, length, size); four dims stay as they are."""
    if x.dim() == 4:
        return x
    if not count:
        raise UnsupportedError("Attention on three dims without the number of heads")
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def _allowed(n: OnnxNode, queries: int, keys: int, offset: Tensor) -> Tensor:
    """(…, queries, keys): what causality and the windows let see; `offset`: each batch's first query's position."""
    left, right = n.attrs.get("left_window_size", -1), n.attrs.get("right_window_size", -1)
    ahead = torch.arange(keys) - (torch.arange(queries)[:, None] + offset)
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if n.attrs.get("is_causal", 0):
        seen &= ahead <= 0
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen


def _bias(n: OnnxNode, q: Tensor, keys: int, mask: Tensor | None, past: int | None, lengths: Tensor | None) -> Tensor:
    """What is added to the scores: the mask, and minus infinity where causality, windows or padding forbid."""
    forbidden = torch.tensor(float("-inf"), dtype=q.dtype)
    bias = torch.zeros(q.shape[2], keys, dtype=q.dtype)
    if mask is not None:
        short = keys - mask.shape[-1]
        if short > 0:
            fill = torch.full((*mask.shape[:-1], short), 0 if mask.dtype == torch.bool else float("-inf"))
            mask = torch.cat([mask, fill.to(mask.dtype)], -1)
        bias = bias + (
            torch.where(mask, torch.zeros((), dtype=q.dtype), forbidden) if mask.dtype == torch.bool else mask
        )
    restricted = (
        n.attrs.get("is_causal", 0)
        or max(n.attrs.get("left_window_size", -1), n.attrs.get("right_window_size", -1)) >= 0
    )
    if restricted:
        per_batch = past is None and lengths is not None
        offset = (
            (lengths.reshape(-1, 1, 1, 1) - q.shape[2])
            if per_batch and lengths is not None
            else torch.tensor(past or 0)
        )
        bias = torch.where(_allowed(n, q.shape[2], keys, offset), bias, forbidden)
    if lengths is not None:
        inside = torch.arange(keys) < lengths.reshape(-1, 1, 1, 1)
        bias = torch.where(inside, bias, forbidden)
    return bias


def _softmax(scores: Tensor, bias: Tensor, kind: torch.dtype) -> Tensor:
    """Over the last dim; rows that may see nothing are zero."""
    nothing = torch.isneginf(bias.amax(-1, keepdim=True))
    # before the softmax too: where all is minus infinity its gradient is no number
    weights = torch.softmax(torch.where(nothing, torch.zeros((), dtype=kind), scores.to(kind)), -1)
    return torch.where(nothing, torch.zeros((), dtype=kind), weights)


def _attention(
    n: OnnxNode,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled dot-product attention (ONNX Attention, opset 23 on), grouped heads, caches and masks included."""
    flat, kind = q.dim() == 3, q.dtype
    q, k, v = (_heads(x, n.attrs.get(f"{who}_num_heads")) for x, who in ((q, "q"), (k, "kv"), (v, "kv")))
    scale = math.sqrt(n.attrs.get("scale") or 1 / math.sqrt(q.shape[3]))
    past = past_key.shape[2] if past_key is not None else None
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    present = k, v
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q * scale) @ (k.transpose(2, 3) * scale)
    out, mode = scores, n.attrs.get("qk_matmul_output_mode", 0)
    cap = n.attrs.get("softcap", 0.0)
    if cap > 0:
        scores = torch.tanh(scores / cap) * cap
        out = scores if mode == 1 else out
    out = scores if mode == 1 or cap > 0 else out
    bias = _bias(n, q, k.shape[2], mask, past, lengths)
    biased = scores + bias
    precision = n.attrs.get("softmax_precision")
    weights = _softmax(biased, bias, kind if not precision else torch_dtype(precision))
    out = {2: biased, 3: weights}.get(mode, out)
    result = weights.to(kind) @ v
    if flat:
        result = result.transpose(1, 2).flatten(2)
    return result, *present, out.to(kind)


def _rotary(n: OnnxNode, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """Rotary position embedding of (N, heads, length, size) or (N, length, heads · size)."""
    flat = x.dim() == 3
    value = x.reshape(x.shape[0], x.shape[1], int(n.attrs["num_heads"]), -1) if flat else x.transpose(1, 2)
    size = int(n.attrs.get("rotary_embedding_dim", 0)) or value.shape[3]
    turned, kept = value[..., :size], value[..., size:]
    c, s = (t[positions] if positions is not None else t for t in (cos, sin))
    c, s = (t[..., : size // 2].unsqueeze(2) for t in (c, s))
    even = bool(n.attrs.get("interleaved", 0))
    a, b = (turned[..., 0::2], turned[..., 1::2]) if even else turned.chunk(2, -1)
    real, imaginary = c * a - s * b, s * a + c * b
    joined = torch.stack([real, imaginary], -1).flatten(-2) if even else torch.cat([real, imaginary], -1)
    out = torch.cat([joined, kept], -1)
    return out.reshape(x.shape) if flat else out.transpose(1, 2)


FUNCTIONS: dict[str, Any] = {
    "Gemm": Function(_gemm, weights=(1, 2)),
    "MatMul": Function(_matmul),
    "Einsum": Function(_einsum, weights=(0, 1, 2)),
    "Attention": Function(_attention),
    "RotaryEmbedding": Function(_rotary),
}
