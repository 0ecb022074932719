"""ONNX Runtime's fused attention, taken apart into products, a Softmax and what moves values between.

Without masks, past states, rotary positions and causality: what vision transformers have none of. With one of these
the node stays, and ONNX Runtime runs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hantc.dialect.unfuse_parts import Parts

_SINCE = 13  # the first opset whose Softmax and Split are today's
_HEADS_FIRST, _TURNED = (0, 2, 1, 3), (0, 2, 3, 1)


def _heads(p: Parts, x: str, width: int, perm: tuple[int, ...]) -> str:
    """(N, tokens, heads · features) → (N, heads, tokens, features), or its last two the other way round."""
    count = int(p.attrs["num_heads"])
    return p.add("Transpose", p.add("Reshape", x, p.integers(0, 0, count, width // count)), perm=list(perm))


def _attend(p: Parts, parts: Sequence[str], widths: Sequence[int], bias: str) -> bool:
    """softmax(scale · q kᵀ + bias) v, of `parts` q, k and v: values (N, tokens, width)."""
    q, k, v = parts
    scale = float(p.attrs.get("scale", 0.0)) or 1.0 / math.sqrt(widths[0] // int(p.attrs["num_heads"]))
    scores = p.add("MatMul", _heads(p, q, widths[0], _HEADS_FIRST), _heads(p, k, widths[1], _TURNED))
    scores = p.add("Mul", scores, p.number(scale))
    if bias:
        scores = p.add("Add", scores, bias)
    mixed = p.add("MatMul", p.add("Softmax", scores, axis=-1), _heads(p, v, widths[2], _HEADS_FIRST))
    p.add("Reshape", p.add("Transpose", mixed, perm=list(_HEADS_FIRST)), p.integers(0, 0, widths[2]))
    return p.end()


def _plain(p: Parts, *unused: int) -> bool:
    """Whether it has one output, none of these inputs and nothing that depends on the tokens' order."""
    asked = any(int(p.attrs.get(name, 0)) for name in ("unidirectional", "do_rotary", "past_present_share_buffer"))
    return p.opset >= _SINCE and not asked and not any(p.node.output[1:]) and not any(p.input(i) for i in unused)


def attention(p: Parts) -> bool:
    """Attention: input, weights, bias, mask, past, bias of the scores, length of the past. The weights of queries,
    keys and values lie side by side."""
    if not _plain(p, 3, 4, 6) or int(p.attrs["num_heads"]) < 1:
        return False
    total = p.width(1)
    sizes = [int(n) for n in p.attrs.get("qkv_hidden_sizes", [])] or [total // 3] * 3
    if sum(sizes) != total or len(sizes) != 3 or sizes[0] != sizes[1]:
        return False
    value = p.add("MatMul", p.input(0), p.input(1))
    if p.input(2):
        value = p.add("Add", value, p.input(2))
    return _attend(p, p.several("Split", 3, value, p.integers(*sizes), axis=-1), sizes, p.input(5))


def multi_head(p: Parts) -> bool:
    """MultiHeadAttention: query, key, value, their biases side by side, mask, bias of the scores, past states."""
    if not _plain(p, 4, 6, 7, 8, 9) or int(p.attrs["num_heads"]) < 1:
        return False
    if [p.rank(i) for i in range(3)] != [3, 3, 3]:  # packed ones have more dims, or no key
        return False
    parts, widths = [p.input(i) for i in range(3)], [p.width(i) for i in range(3)]
    if p.input(3):
        biases = p.several("Split", 3, p.input(3), p.integers(*widths), axis=0)
        parts = [p.add("Add", part, bias) for part, bias in zip(parts, biases, strict=True)]
    return _attend(p, parts, widths, p.input(5))
