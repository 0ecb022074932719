"""ONNX → `torch.fx.GraphModule` of leaf operations."""

from __future__ import annotations

import itertools
import keyword
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import ModelProto, NodeProto, numpy_helper
from torch import fx, nn

from hantc.core.errors import HantcError, ModelError, UnsupportedError
from hantc.core.types import ModelInfo, TensorSpec
from hantc.dialect.fold_constants import fold_constants, type_constants
from hantc.dialect.fold_shapes import fold_shapes
from hantc.dialect.functions.registry import function_of
from hantc.dialect.graph import tidy
from hantc.dialect.guard import check_untrusted
from hantc.dialect.infer import without_claims
from hantc.dialect.leaf import Array, Dim, Leaf, OnnxNode, attributes, has_torch_type, tensor
from hantc.dialect.opaque import Opaque, captured, subgraphs
from hantc.dialect.registry import parse
from hantc.dialect.unfuse import unfused
from hantc.dialect.verbatim import Verbatim

_BLOCKED = "com.microsoft.nchwc"  # operators on channels in blocks of as many as the CPU's registers hold


def load_onnx(path: str | Path) -> ModelProto:
    """Read a model file. ModelError names the file where it is missing, truncated, no ONNX model, or not fit to be
    run (`check_untrusted`). External weights are read from the model's own folder alone."""
    path = Path(path)
    if not path.is_file():
        raise ModelError("no such file", where=str(path), hint="give the path of an .onnx file")
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf and onnx raise unrelated types on broken files
        told = str(error).strip().splitlines()[:1]
        if told and any(word in told[0] for word in ("xternal", "TensorProto (")):  # weights in files of their own
            hint = "external weights are read from the model's own folder alone, from plain files"
            raise ModelError(f"its weights cannot be read: {told[0][:300]}", where=str(path), hint=hint) from error
        raise ModelError(
            f"not a readable ONNX file ({type(error).__name__})", where=str(path), hint="is the file whole?"
        ) from error
    if not model.graph.node or not model.graph.output or not model.opset_import:
        raise ModelError("not an ONNX model: it has no graph", where=str(path), hint="is the file whole?")
    for node in model.graph.node:  # an input left out at the end says no more than none, and crashes ONNX Runtime 1.31
        while node.input and not node.input[-1]:
            del node.input[-1]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value == -1:  # how some exporters write an open size
                dim.Clear()
    try:
        check_untrusted(model)
    except ModelError as error:
        raise ModelError(error.message, where=str(path), hint=error.hint) from error
    return model


def _dims(value: onnx.ValueInfoProto) -> tuple[Dim, ...]:
    dims: list[Dim] = []
    for d in value.type.tensor_type.shape.dim:
        dims.append(d.dim_value if d.HasField("dim_value") else (d.dim_param or None))
    return tuple(dims)


def _ranked(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.HasField("shape"))


def _foreign(value: onnx.ValueInfoProto) -> str:
    """The kind of a value that is no tensor: "sequence_type", "optional_type", …; "" for tensors."""
    kind = value.type.WhichOneof("value") or "tensor_type"
    return "" if kind == "tensor_type" else str(kind)


def _elements(value: onnx.ValueInfoProto) -> bytes:
    """The type of a value that is no tensor, without the sizes that inference may have guessed."""
    kind = onnx.TypeProto()
    kind.CopyFrom(value.type)
    inner = kind
    while (held := inner.WhichOneof("value")) in ("sequence_type", "optional_type"):
        inner = getattr(inner, held).elem_type
    if held == "tensor_type":
        inner.tensor_type.ClearField("shape")
    made: bytes = kind.SerializeToString()
    return made


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    if foreign := _foreign(value):
        return TensorSpec(value.name, foreign, ())
    kind = value.type.tensor_type.elem_type
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind) if kind else np.dtype(np.float32)
    except KeyError as error:
        raise ModelError(f"{value.name!r} has the unknown type {kind}", hint="is the model file whole?") from error
    return TensorSpec(value.name, dtype.name, _dims(value))


def only_tensors(info: ModelInfo) -> ModelInfo:
    """`info` again. ModelError for inputs or outputs that are no tensors: what runs a network feeds and compares
    tensors."""
    for spec in (*info.inputs, *info.outputs):
        if spec.name in dict(info.types):
            raise ModelError(f"{spec.name!r} is a {spec.dtype}, not a tensor", hint="cut it off the exported graph")
    return info


def model_info(model: ModelProto) -> ModelInfo:
    """What must survive the round trip beside the nodes."""
    weights = {i.name for i in model.graph.initializer}
    opsets = {i.domain: i.version for i in model.opset_import}
    versions = [v for v in (opsets.pop("", 0), opsets.pop("ai.onnx", 0)) if v]
    return ModelInfo(
        inputs=tuple(_spec(i) for i in model.graph.input if i.name not in weights),
        outputs=tuple(_spec(o) for o in model.graph.output),
        opset=max(versions, default=13),
        ir_version=model.ir_version,
        graph_name=model.graph.name or "graph",
        producer=model.producer_name,
        metadata=tuple((p.key, p.value) for p in model.metadata_props),
        domains=tuple(sorted(opsets.items())),
        types=tuple(
            (v.name, v.type.SerializeToString()) for v in (*model.graph.input, *model.graph.output) if _foreign(v)
        ),
    )


@dataclass
class _Build:
    """State of one import."""

    graph: fx.Graph
    root: nn.Module
    constants: dict[str, Array]
    shapes: dict[str, tuple[Dim, ...]]
    used: frozenset[str]  # tensors that a node or the outside needs
    opset: int
    opsets: Mapping[str, int]
    types: Mapping[str, bytes]  # of values that are no tensors, where the file declares them
    env: dict[str, fx.Node] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def fresh(self, stem: str) -> str:
        n = self.counts.get(stem, 0)
        self.counts[stem] = n + 1
        return f"{stem}_{n}"

    def placeholder(self, name: str) -> None:
        """A graph input, under a name that Python takes as a parameter's and that no other input has."""
        stem = re.sub(r"\W", "_", name).strip("_")
        if not stem.isidentifier() or keyword.iskeyword(stem) or stem == "self":
            stem = f"input_{stem}".strip("_")
        taken = {n.target for n in self.env.values()}
        self.env[name] = self.graph.placeholder(next(s for s in _numbered(stem) if s not in taken))

    def value(self, name: str) -> fx.Node:
        """The fx node holding ONNX tensor `name`; constants become buffers."""
        if name not in self.env:
            if name not in self.constants:
                raise ModelError(f"tensor {name!r} is used but never made", hint="is the model file whole?")
            if not has_torch_type(self.constants[name]):
                raise UnsupportedError(
                    f"constant {name!r} has the type {self.constants[name].dtype}, which torch lacks"
                )
            target = self.fresh("const")
            self.root.register_buffer(target, tensor(self.constants[name]))
            self.env[name] = self.graph.create_node("get_attr", target, name=target)
        return self.env[name]

    def alias(self, name: str, source: str) -> None:
        """Make ONNX tensor `name` another name of `source`."""
        if source in self.constants:
            self.constants[name] = self.constants[source]
        if source in self.env or source not in self.constants:
            self.env[name] = self.value(source)


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    yield from (f"{stem}_{n}" for n in itertools.count(1))


def _constant(node: NodeProto) -> Array | None:
    """The value of a Constant node (graphsurgeon folds most of them); None where it is of a rare kind."""
    values = attributes(node)
    return numpy_helper.to_array(values["value"]) if "value" in values else None


def _passes_through(b: _Build, node: NodeProto) -> bool:
    """Whether the node returns its first input as it is: Identity, or Dropout outside training."""
    if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
        training = b.constants.get(node.input[2])
        return training is not None and not training.any()
    return node.op_type in ("Identity", "Dropout")


def _native(b: _Build, node: NodeProto, outputs: tuple[str, ...]) -> tuple[Leaf, list[fx.Node]]:
    if node.domain not in ("", "ai.onnx"):
        why = "; ONNX Runtime saved the file for one kind of CPU: at ORT_ENABLE_EXTENDED it would not"
        raise UnsupportedError(f"operator of domain {node.domain}{why if node.domain == _BLOCKED else ''}")
    view = OnnxNode(node.op_type, attributes(node), b.opset, tuple(node.input), b.constants, b.shapes, outputs)
    leaf = parse(view)
    return leaf, [b.value(node.input[i]) for i in leaf.data]


def _kept(b: _Build, node: NodeProto, error: Exception) -> tuple[Leaf, list[fx.Node]]:
    names = [n for n in dict.fromkeys([*node.input, *captured(node)]) if n]
    data = tuple(n for n in names if n not in b.constants)
    fixed = {n: b.constants[n] for n in names if n in b.constants}
    args = [b.value(n) for n in data]
    function = function_of(node.domain, node.op_type)
    if function is not None and not any(subgraphs(node)):
        return Verbatim(node, data, fixed, b.opsets, function), args
    types = {n: b.types[n] for n in data if n in b.types}
    reason = error.message if isinstance(error, HantcError) else f"{type(error).__name__}: {error}"
    return Opaque(node, data, fixed, b.opsets, reason, types), args


def _add(b: _Build, node: NodeProto) -> None:
    used = tuple(o for o in node.output if o in b.used)
    if not used:
        return
    if node.domain in ("", "ai.onnx"):
        if used == (node.output[0],) and _passes_through(b, node):
            b.alias(used[0], node.input[0])
            return
        value = _constant(node) if node.op_type == "Constant" else None
        if value is not None:
            b.constants[used[0]] = value
            return
    try:
        leaf, args = _native(b, node, used)
        outputs = used
    except (
        UnsupportedError,
        LookupError,
        ArithmeticError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
    ) as error:
        leaf, args = _kept(b, node, error)
        outputs = tuple(o for o in node.output if o)
    target = b.fresh(re.sub(r"\W", "_", node.op_type).lower())
    b.root.add_module(target, leaf)
    made = b.graph.create_node("call_module", target, tuple(args), name=target)
    made.meta["onnx_name"] = node.name
    if len(outputs) == 1:
        b.env[outputs[0]] = made
    else:
        for i, out in enumerate(outputs):
            b.env[out] = b.graph.call_function(operator.getitem, (made, i))


def _begin(cleaned: ModelProto, info: ModelInfo) -> _Build:
    values = [*cleaned.graph.value_info, *cleaned.graph.input, *cleaned.graph.output]
    needed = {o.name for o in cleaned.graph.output}
    for node in cleaned.graph.node:
        needed.update(node.input, captured(node))
    constants: dict[str, Array] = {}
    for weight in cleaned.graph.initializer:
        try:
            constants[weight.name] = numpy_helper.to_array(weight)
        except Exception as error:  # wrong length, unknown type: numpy and onnx raise unrelated types
            raise ModelError(
                f"weight {weight.name!r} cannot be read: {error}", hint="is the model file whole?"
            ) from error
    shapes: dict[str, tuple[Dim, ...]] = {v.name: _dims(v) for v in values if _ranked(v)}
    return _Build(
        graph=fx.Graph(),
        root=nn.Module(),
        constants=constants,
        shapes=shapes | {k: tuple(v.shape) for k, v in constants.items()},
        used=frozenset(needed - {""}),
        opset=info.opset,
        opsets={"": info.opset, **dict(info.domains)},
        types={v.name: _elements(v) for v in cleaned.graph.value_info if _foreign(v)} | dict(info.types),
    )


def _with_shapes(model: ModelProto, info: ModelInfo, b: _Build) -> tuple[ModelInfo, tuple[str, ...]]:
    """Outputs that the file declares without a shape get the inferred one; the second result names those
    whose rank stays unknown."""
    bare = {o.name for o in model.graph.output if not _ranked(o)}
    outputs = tuple(replace(o, shape=b.shapes.get(o.name, ())) if o.name in bare else o for o in info.outputs)
    return replace(info, outputs=outputs), tuple(sorted(n for n in bare if n not in b.shapes))


def _build(model: ModelProto) -> fx.GraphModule:
    model = without_claims(model)
    type_constants(model.graph)
    info = model_info(model)
    for spec in info.inputs:
        if any(isinstance(d, int) and d < 0 for d in spec.shape):
            raise ModelError(f"input {spec.name!r} declares a negative size")
        if spec.name in dict(info.types):
            continue
        kind = np.dtype(spec.dtype)
        if kind.kind not in "OSU" and not has_torch_type(
            np.zeros(0, kind)
        ):  # strings go from one foreign node to another
            raise ModelError(f"input {spec.name!r} has the type {spec.dtype}, which torch lacks")
    cleaned = unfused(fold_constants(model))  # which knows more ranks now
    b = _begin(cleaned, info)
    info, unranked = _with_shapes(model, info, b)
    for spec in info.inputs:
        b.placeholder(spec.name)
    for node in cleaned.graph.node:
        _add(b, node)
    results = tuple(b.value(o.name) for o in info.outputs)
    b.graph.output(results[0] if len(results) == 1 else results)
    module = fx.GraphModule(b.root, b.graph)
    module.meta["info"] = info
    if unranked:
        module.meta["unranked"] = unranked
    return module


def import_model(model: ModelProto, *, where: str = "model") -> fx.GraphModule:
    """Build the fx graph of a model. Never gives up on an operator: what the dialect does not know becomes
    an opaque leaf. ModelError where the graph itself is broken."""
    try:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        module = _build(unfused(model))
    except ModelError as error:
        raise ModelError(error.message, where=where, hint=error.hint) from error
    module.eval()
    fold_shapes(module)
    tidy(module)
    return module


def import_file(path: str | Path) -> fx.GraphModule:
    """`import_model` of a file."""
    return import_model(load_onnx(path), where=str(path))
