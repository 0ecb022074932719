"""Operators into which ONNX Runtime fuses others, taken apart again.

It writes them where it saves a file that it has optimised (`optimized_model_filepath`), and so do its tools for
transformers. Other engines do not know them, and no gradient passes them. What it computes by them is in its
`docs/ContribOperators.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from onnx import AttributeProto, ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from hantc.dialect.infer import infer, light
from hantc.dialect.opaque import inner_names
from hantc.dialect.unfuse_attention import attention, multi_head
from hantc.dialect.unfuse_parts import Known, Parts

_DOMAIN = "com.microsoft"
_BROADCASTS = 7  # the first opset whose Mul and Add do without being told
_ERF = 9
_CLIP_OF_INPUTS = 11  # the first opset whose Clip takes its ends as inputs
_LAYER_NORM = 17
# of FusedConv's and FusedGemm's activations: the attributes that their parameters become, in order
_PARAMETERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"Relu": (), "Sigmoid": (), "Tanh": (), "LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta")}
)


_Rule = Callable[[Parts], bool]  # whether it took the node apart


def _activation(p: Parts, x: str, kind: str, values: list[float]) -> bool:
    if kind == "Clip" and len(values) == 2 and p.opset < _CLIP_OF_INPUTS:
        p.add("Clip", x, min=values[0], max=values[1])
    elif kind == "Clip" and len(values) == 2:
        p.add("Clip", x, p.number(values[0]), p.number(values[1]))
    elif kind in _PARAMETERS:
        p.add(kind, x, **dict(zip(_PARAMETERS[kind], values, strict=False)))
    else:
        return False
    return p.end()


def _conv(p: Parts) -> bool:
    own = ("activation", "activation_params")
    plain = {k: v for k, v in p.attrs.items() if k not in own}
    kind = str(p.attrs.get("activation", ""))
    value = p.add("Conv", *filter(None, (p.input(i) for i in range(3))), **plain)
    if p.input(3):
        value = p.add("Add", value, p.input(3))
    return _activation(p, value, kind, list(p.attrs.get("activation_params", []))) if kind else p.end()


def _gemm(p: Parts) -> bool:
    plain = {k: v for k, v in p.attrs.items() if not k.startswith("activation")}
    names = ("activation_alpha", "activation_beta", "activation_gamma")
    value = p.add("Gemm", *p.node.input, **plain)
    values = [float(p.attrs[n]) for n in names if n in p.attrs]
    return _activation(p, value, str(p.attrs.get("activation", "")), values)


def _matmul(p: Parts) -> bool:
    turned = [bool(p.attrs.get(name, 0)) for name in ("transA", "transB")]
    if p.attrs.get("transBatchA", 0) or p.attrs.get("transBatchB", 0):
        return False
    if any(turn and not p.rank(i) for i, turn in enumerate(turned)):
        return False
    # vectors are left as they are, whatever the attribute says
    operands = [_turned(p, i, p.rank(i)) if turn and p.rank(i) > 1 else p.input(i) for i, turn in enumerate(turned)]
    value = p.add("MatMul", *operands)
    alpha = float(p.attrs.get("alpha", 1.0))
    if alpha != 1.0:
        p.add("Mul", value, p.number(alpha))
    return p.end()


def _turned(p: Parts, i: int, rank: int) -> str:
    return p.add("Transpose", p.input(i), perm=[*range(rank - 2), rank - 1, rank - 2])


def _sigmoid_gelu(p: Parts) -> bool:
    """QuickGelu: x · sigmoid(αx); with α = 1 SiLU."""
    if p.opset < _BROADCASTS:
        return False
    x, alpha = p.input(0), float(p.attrs.get("alpha", 1.702))
    gate = p.add("Sigmoid", x if alpha == 1.0 else p.add("Mul", x, p.number(alpha)))
    p.add("Mul", x, gate)
    return p.end()


def _gelu(p: Parts) -> bool:
    """Gelu, and BiasGelu, by the error function."""
    if p.opset < _ERF:
        return False
    x = p.add("Add", p.input(0), p.input(1)) if p.input(1) else p.input(0)
    erf = p.add("Erf", p.add("Div", x, p.number(math.sqrt(2.0))))
    p.add("Mul", p.add("Mul", x, p.add("Add", erf, p.number(1.0))), p.number(0.5))
    return p.end()


def _fast_gelu(p: Parts) -> bool:
    """x/2 · (1 + tanh(x · (0.7979 + 0.0357 x²)))."""
    if p.opset < _BROADCASTS:
        return False
    x = p.add("Add", p.input(0), p.input(1)) if p.input(1) else p.input(0)
    inner = p.add("Add", p.add("Mul", p.add("Mul", x, x), p.number(0.035677408136300125)), p.number(0.7978845608028654))
    tanh = p.add("Tanh", p.add("Mul", x, inner))
    p.add("Mul", p.add("Mul", x, p.number(0.5)), p.add("Add", tanh, p.number(1.0)))
    return p.end()


def _skip_norm(p: Parts) -> bool:
    if p.opset < _LAYER_NORM or any(p.node.output[1:3]):
        return False
    value = p.add("Add", p.input(0), p.input(1))
    if p.input(4):
        value = p.add("Add", value, p.input(4))
    if len(p.node.output) > 3 and p.node.output[3]:
        p.made[-1].output[0] = value = p.node.output[3]
    p.add("LayerNormalization", value, *filter(None, (p.input(2), p.input(3))), epsilon=p.attrs.get("epsilon", 1e-12))
    return p.end()


_RULES: Mapping[str, _Rule] = MappingProxyType(
    {
        "FusedConv": _conv,
        "FusedGemm": _gemm,
        "FusedMatMul": _matmul,
        "QuickGelu": _sigmoid_gelu,
        "Gelu": _gelu,
        "BiasGelu": _gelu,
        "FastGelu": _fast_gelu,
        "SkipLayerNormalization": _skip_norm,
        "Attention": attention,
        "MultiHeadAttention": multi_head,
    }
)


def _fused(model: ModelProto) -> bool:
    return any(n.domain == _DOMAIN and n.op_type in _RULES for n in model.graph.node)


def _known(model: ModelProto) -> Known:
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)
    ranks = {i.name: len(i.dims) for i in model.graph.initializer}
    widths = {i.name: int(i.dims[-1]) for i in model.graph.initializer if i.dims}
    types = {i.name: int(i.data_type) for i in model.graph.initializer}
    for v in (*model.graph.input, *model.graph.value_info, *_values(model)):
        kind = v.type.tensor_type
        if kind.elem_type:
            types.setdefault(v.name, int(kind.elem_type))
        if kind.HasField("shape"):
            ranks.setdefault(v.name, len(kind.shape.dim))
            if kind.shape.dim and kind.shape.dim[-1].dim_value > 0:
                widths.setdefault(v.name, int(kind.shape.dim[-1].dim_value))
    names = {n for node in model.graph.node for n in (*node.input, *node.output, *inner_names(node))} | ranks.keys()
    return Known(opset, ranks, widths, types, names | {v.name for v in (*model.graph.input, *model.graph.output)})


def _values(model: ModelProto) -> Sequence[ValueInfoProto]:
    """The inner tensors as inference has them. That of a Reshape has as many dims as its shape has numbers, even where
    those are computed."""
    small = light(model)
    told: set[str] = set()
    while True:
        values = infer(small)
        found = {v.name: v.type.tensor_type for v in values}
        more = []
        for node in small.graph.node:
            kind, size = (found.get(n) for n in (node.output[0], node.input[1])) if _reshapes(node) else (None, None)
            if kind is None or size is None or kind.HasField("shape") or node.output[0] in told:
                continue
            if len(size.shape.dim) == 1 and (n := size.shape.dim[0].dim_value):
                more.append(helper.make_tensor_value_info(node.output[0], kind.elem_type, [None] * n))
        if not more:
            return values
        told |= {v.name for v in more}
        small.graph.value_info.extend(more)


def _reshapes(node: NodeProto) -> bool:
    return node.op_type == "Reshape" and len(node.input) > 1 and len(node.output) == 1


def unfused(model: ModelProto) -> ModelProto:
    """`model` in ONNX's own operators, as far as its main graph's fused ones are known; itself where there are none.
    Others stay as they are, and ONNX Runtime runs them."""
    while _fused(model):
        made = _once(model)
        if made.graph.node == model.graph.node:
            break
        model = made  # of more tensors the ranks may be known now
    return model


def _once(model: ModelProto) -> ModelProto:
    made = ModelProto()
    made.CopyFrom(model)
    known = _known(model)
    constants: dict[str, Any] = {}
    del made.graph.node[:]
    for node in model.graph.node:
        made.graph.node.extend(_apart(node, known, constants))
    made.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    return made


def _apart(node: NodeProto, known: Known, constants: dict[str, Any]) -> Iterator[NodeProto]:
    rule = _RULES.get(node.op_type) if node.domain == _DOMAIN else None
    parts = Parts(node, known)
    symbolic = any(a.type == AttributeProto.UNDEFINED or a.ref_attr_name for a in node.attribute)
    try:
        done = rule is not None and not symbolic and len(node.output) > 0 and rule(parts)
    except (KeyError, IndexError, ValueError, TypeError):  # attributes that are none; ONNX Runtime will tell
        done = False
    if not done:
        yield node
        return
    constants.update(parts.constants)
    yield from parts.made
