"""Which leaf class reads which ONNX op."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hantc.core.errors import UnsupportedError
from hantc.dialect.activation import Clip, HardSigmoid, HardSwish, LeakyRelu, Softmax, Unary
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Binary
from hantc.dialect.leaf import Leaf, OnnxNode
from hantc.dialect.linear import Linear, MatMul
from hantc.dialect.norm import BatchNorm
from hantc.dialect.pool import GlobalPool, Pool, Reduce
from hantc.dialect.rearrange import DepthToSpace, SpaceToDepth
from hantc.dialect.shape import Cast, Concat, Flatten, Pad, Reshape, Slice, Squeeze, Transpose

_FAMILIES: tuple[type[Leaf], ...] = (
    Conv, BatchNorm, Linear, MatMul, Binary,
    Unary, Clip, HardSigmoid, HardSwish, LeakyRelu, Softmax,
    Pool, GlobalPool, Reduce,
    Reshape, Flatten, Transpose, Squeeze, Pad, Slice, Concat, Cast,
    SpaceToDepth, DepthToSpace,
)  # fmt: skip

LEAVES: Mapping[str, type[Leaf]] = MappingProxyType({op: family for family in _FAMILIES for op in family.ops})


def parse(node: OnnxNode) -> Leaf:
    """The leaf of an ONNX node of the default domain; UnsupportedError with the reason where there is none."""
    if node.op not in LEAVES:
        raise UnsupportedError(f"no leaf for {node.op}")
    leaf = LEAVES[node.op].parse(node)
    if all(node.inputs[i] in node.constants for i in leaf.data):
        raise UnsupportedError("only constant inputs")
    return leaf
