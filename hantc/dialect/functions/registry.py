"""Which function computes which operator that has no leaf of its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hantc.dialect.functions import (
    activations,
    arithmetic,
    movement,
    norms,
    products,
    quantized,
    reductions,
    sampling,
    windows,
)
from hantc.dialect.registry import LEAVES
from hantc.dialect.verbatim import Function, through_leaf

_FAMILIES = (activations, arithmetic, reductions, movement, norms, windows, sampling, products, quantized)
_OWN = MappingProxyType({op: f for family in _FAMILIES for op, f in family.FUNCTIONS.items()})
_THROUGH_LEAF: Mapping[str, Function] = MappingProxyType(
    {op: through_leaf(leaf) for op, leaf in LEAVES.items() if op not in _OWN}
)


def function_of(domain: str, op: str) -> Function | None:
    """How torch computes an operator; None if it cannot."""
    if domain not in ("", "ai.onnx"):
        return None
    return _OWN.get(op) or _THROUGH_LEAF.get(op)
