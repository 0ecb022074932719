"""`torch.fx.GraphModule` of leaf operations → ONNX, in milliseconds."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnx_graphsurgeon as gs
from onnx import ModelProto, NodeProto
from torch import Tensor, fx

from hantc.core.errors import HantcError, UnsupportedError
from hantc.core.types import ModelInfo
from hantc.dialect.leaf import Array, Leaf, array, has_torch_type
from hantc.dialect.opaque import Opaque, captured, inner_names, rename_captured

_PLACEHOLDER = "HantcOpaque"  # stands for an opaque node until the graph is exported


@dataclass(frozen=True)
class Emitted:
    """An emitted model, and which ONNX nodes each fx node became."""

    model: ModelProto
    nodes: Mapping[str, tuple[str, ...]]


class _Emitter:
    """Collects gs nodes; hands leaves fresh names that begin with their fx node's name."""

    def __init__(self, opset: int, base_opset: int) -> None:
        self.opset, self.base_opset = opset, base_opset
        self.gs_nodes: list[gs.Node] = []
        self.opaque: dict[str, tuple[NodeProto, dict[str, gs.Tensor]]] = {}
        self.made: dict[str, list[str]] = {}
        self.apart: dict[
            str, Array
        ] = {}  # constants of types that graphsurgeon does not write: strings, integers below 8 bits
        self.used: set[str] = set()
        self.scope = ""
        self.owner = ""

    def unique(self, stem: str) -> str:
        name, n = stem, 1
        while name in self.used:
            name, n = f"{stem}.{n}", n + 1
        self.used.add(name)
        return name

    def const(self, value: Array | Tensor, hint: str) -> gs.Constant:
        data = array(value) if isinstance(value, Tensor) else value
        if not has_torch_type(data):
            made = gs.Variable(self.unique(f"{self.scope}.{hint}"))
            self.apart[made.name] = data
            return made
        return gs.Constant(self.unique(f"{self.scope}.{hint}"), np.array(data, order="C"))

    def node(self, op: str, inputs: Sequence[gs.Tensor], attrs: Mapping[str, Any] | None = None) -> gs.Variable:
        out = gs.Variable(self.unique(f"{self.scope}:{op}"))
        self._append(gs.Node(op, self.unique(f"{self.scope}/{op}"), dict(attrs or {}), list(inputs), [out]))
        return out

    def opaque_node(self, leaf: Opaque, xs: list[gs.Tensor]) -> list[gs.Variable]:
        held = leaf.held()
        constants = [self.const(v, "const") for v in held.values()]
        outs = [gs.Variable(self.unique(f"{self.scope}:{o}")) for o in leaf.outputs]
        name = self.unique(f"{self.scope}/{leaf.proto.op_type}")
        feeds = dict(zip([*leaf.names, *held], [*xs, *constants], strict=True))
        self._append(gs.Node(_PLACEHOLDER, name, {}, list(feeds.values()), outs))
        proto = leaf.proto if self.opset == self.base_opset else upgraded(leaf, self.opset)
        self.opaque[name] = (proto, feeds)
        return outs

    def _append(self, node: gs.Node) -> None:
        self.gs_nodes.append(node)
        self.made.setdefault(self.owner, []).append(node.name)

    def inline(self, module: fx.GraphModule, inputs: Sequence[gs.Tensor], prefix: str) -> list[Any]:
        """Emit a (possibly nested) graph module; returns its output tensors."""
        env: dict[fx.Node, Any] = {}
        feed = iter(inputs)
        for node in module.graph.nodes:
            scope = f"{prefix}{node.name}"
            if not prefix:
                self.owner = node.name
            self.scope = scope
            if node.op == "placeholder":
                env[node] = next(feed)
            elif node.op == "get_attr":
                env[node] = self.const(_attribute(module, str(node.target)), "value")
            elif node.op == "call_function" and node.target is operator.getitem:
                env[node] = env[node.args[0]][node.args[1]]
            elif node.op == "call_module":
                env[node] = self._call(module, node, [env[a] for a in node.args if isinstance(a, fx.Node)], scope)
            elif node.op == "output":
                result = node.args[0]
                return [env[r] for r in result] if isinstance(result, (tuple, list)) else [env[result]]
            else:
                raise HantcError(f"graph holds {node.op} {node.target}, which is no leaf", where=node.name)
        raise HantcError("graph has no output")

    def _call(self, module: fx.GraphModule, node: fx.Node, xs: list[Any], scope: str) -> Any:
        leaf = module.get_submodule(str(node.target))
        if isinstance(leaf, fx.GraphModule):
            outs = self.inline(leaf, xs, scope + "/")
            return outs[0] if len(outs) == 1 else outs
        if isinstance(leaf, Opaque):
            made = self.opaque_node(leaf, xs)
            return made[0] if len(made) == 1 else made
        if not isinstance(leaf, Leaf):
            raise HantcError(f"module {node.target} ({type(leaf).__name__}) is no leaf", where=node.name)
        return leaf.emit(self, xs)


def _attribute(module: fx.GraphModule, target: str) -> Tensor:
    owner, _, name = target.rpartition(".")
    value = getattr(module.get_submodule(owner), name)
    if not isinstance(value, Tensor):
        raise HantcError(f"attribute {target} is no tensor")
    return value


def upgraded(leaf: Opaque, opset: int) -> NodeProto:
    """The foreign node as a newer opset writes it. UnsupportedError where that is not one node with the same
    inputs (a Softmax over several dims, say)."""
    proto = leaf.proto
    if proto.domain not in ("", "ai.onnx"):
        return proto
    if proto.op_type == "Upsample" and len(proto.input) == 2 and opset >= 13:
        return _resize(proto)
    inputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in leaf.names]
    try:
        if captured(proto):
            raise ValueError("its subgraphs use outer values")
        nodes = list(onnx.version_converter.convert_version(leaf.model(inputs), opset).graph.node)
        if len(nodes) != 1 or list(nodes[0].input) != list(proto.input):
            raise ValueError("it takes several nodes there")
    except Exception as error:  # the converter raises several unrelated types
        raise UnsupportedError(
            f"{proto.op_type} of opset {leaf.opsets.get('', 0)} cannot be written in opset {opset} ({error})",
            where=proto.name,
            hint="keep the model's opset, or export it with a newer one",
        ) from error
    made: NodeProto = nodes[0]
    return made


def _resize(upsample: NodeProto) -> NodeProto:
    """Upsample of opset 9 as the Resize that took its place; ONNX's own converter leaves out how it counts pixels."""
    mode = next((a.s.decode() for a in upsample.attribute if a.name == "mode"), "nearest")
    x, scales = upsample.input
    asymmetric = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    made: NodeProto = onnx.helper.make_node("Resize", [x, "", scales], list(upsample.output), mode=mode, **asymmetric)
    return made


def _restore(model: ModelProto, opaque: Mapping[str, tuple[NodeProto, dict[str, gs.Tensor]]]) -> None:
    """Put the foreign nodes, verbatim but for their tensor names, in their placeholders' stead."""
    for node in model.graph.node:
        if node.op_type != _PLACEHOLDER:
            continue
        proto, feeds = opaque[node.name]
        names = {k: v.name for k, v in feeds.items()}  # read now: outputs have got their names since
        copy = onnx.NodeProto()
        copy.CopyFrom(proto)
        copy.name = node.name
        outputs = iter(node.output)
        copy.input[:] = [names.get(i, i) for i in proto.input]
        copy.output[:] = [next(outputs) if o else "" for o in proto.output]
        rename_captured(copy, names)
        node.CopyFrom(copy)


def _outputs(
    e: _Emitter, results: list[Any], info: ModelInfo, inputs: list[gs.Variable], unranked: Collection[str]
) -> list[gs.Variable]:
    """Give the result tensors the model's output names; a copy where a tensor cannot be renamed. Outputs
    named in `unranked` are declared without a shape."""
    taken: set[int] = {id(i) for i in inputs}
    named = []
    reserved = {o.name for o in info.outputs}
    for tensor, spec in zip(results, info.outputs, strict=True):
        if any(tensor is i for i in inputs) and tensor.name == spec.name:
            named.append(tensor)  # an input handed through under its own name
            continue
        if isinstance(tensor, gs.Constant) or id(tensor) in taken:
            e.scope = "output"
            tensor = e.node("Identity", [tensor])
        taken.add(id(tensor))
        tensor.name = spec.name
        if spec.name not in dict(info.types):
            tensor.dtype = np.dtype(spec.dtype)
            tensor.shape = None if spec.name in unranked else list(spec.shape)
        named.append(tensor)
    for node in e.gs_nodes:  # an inner tensor may not share an output's name
        for out in node.outputs:
            if out.name in reserved and not any(out is n for n in named):
                out.name = e.unique(out.name + ".inner")
    return named


def emit(module: fx.GraphModule, *, opset: int | None = None) -> Emitted:
    """Emit a graph module made by `import_model` (or rewritten since). The model's own opset is kept unless
    a newer one is asked for. HantcError if the graph holds anything but leaves; UnsupportedError if an
    opaque node cannot be written in the newer opset."""
    info = module.meta["info"]
    assert isinstance(info, ModelInfo)
    e = _Emitter(max(opset or 0, info.opset), info.opset)
    foreign = dict(info.types)
    inputs = [
        gs.Variable(s.name) if s.name in foreign else gs.Variable(s.name, np.dtype(s.dtype), list(s.shape))
        for s in info.inputs
    ]
    e.used.update(s.name for s in (*info.inputs, *info.outputs))
    for leaf in module.modules():  # names inside foreign subgraphs must stay free
        e.used |= inner_names(leaf.proto) if isinstance(leaf, Opaque) else set()
    results = e.inline(module, inputs, "")
    outputs = _outputs(e, results, info, inputs, module.meta.get("unranked", ()))
    domains = [onnx.helper.make_opsetid(d, v) for d, v in info.domains]
    graph = gs.Graph(e.gs_nodes, inputs, outputs, name=info.graph_name, opset=e.opset, import_domains=None)
    model = gs.export_onnx(graph, do_type_check=False)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in e.apart.items())
    del model.opset_import[:]
    model.opset_import.extend([onnx.helper.make_opsetid("", e.opset), *domains])
    model.ir_version = max(info.ir_version, 8 if e.opset >= 15 else 7) if e.opset > info.opset else info.ir_version
    model.ir_version = max(model.ir_version, 4)  # from IR 4 on, weights need not be graph inputs
    model.producer_name = "hantc"
    del model.metadata_props[:]
    for key, value in info.metadata:
        model.metadata_props.add(key=key, value=value)
    _restore(model, e.opaque)
    for value in (*model.graph.input, *model.graph.output):
        if value.name in foreign:
            value.type.ParseFromString(foreign[value.name])
    return Emitted(model, {k: tuple(v) for k, v in e.made.items()})


def opaque_leaves(module: fx.GraphModule) -> list[tuple[str, Opaque]]:
    """(fx node name, leaf) of every node that ONNX Runtime runs."""
    found = []
    for node in module.graph.nodes:
        if node.op == "call_module":
            leaf = module.get_submodule(str(node.target))
            if isinstance(leaf, Opaque) and leaf.foreign:
                found.append((node.name, leaf))
    return found
