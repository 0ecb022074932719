"""Candidates made from the teacher's own region instead of from random weights."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from hantc.core.errors import HantcError
from hantc.core.types import CandidateSpec, Signature, digest
from hantc.dialect.conv import Conv
from hantc.dialect.emitter import opaque_leaves
from hantc.dialect.graph import count_params, module_macs, standalone_info
from hantc.ops.family import Family, unserved

_MIN_OPSET = 17


@dataclass(frozen=True)
class Origin:
    """What a candidate is derived from. `whole`: the region as the teacher has it; `blocks`: the same cut at
    the borders of the smallest regions (several for a span); `samples`: some of the teacher's activations,
    (N, *in_shape), or None where only the shape of the result matters."""

    whole: fx.GraphModule
    blocks: tuple[fx.GraphModule, ...]
    samples: Tensor | None = None


class DerivedFamily(Family):
    """A family that starts from the teacher's weights. Subclasses write `derive` and `unsuited`."""

    start: ClassVar[float] = 1 / 3
    """Share of the learning rate of candidates that start from random weights: what begins near its goal is
    thrown off by large steps. On nine regions of a CIFAR ResNet-56, 120 steps: `slim` ended at 0.0019 to 0.0221
    of the variance at 1/3 and 0.0019 to 0.0233 at 1; `merged` at 0.022 to 0.086 and 0.019 to 0.081."""

    exact: ClassVar[bool] = False
    """Whether the candidate computes what the region does: it is not trained, and needs no data."""

    @abstractmethod
    def derive(self, spec: CandidateSpec, origin: Origin) -> fx.GraphModule:
        """A graph of its own, (N, *in_shape) → (N, *out_shape); its shapes depend on `spec` and on the origin's
        structure alone, its weights on the origin's weights and samples as well."""

    @abstractmethod
    def unsuited(self, spec: CandidateSpec, origin: Origin) -> str:
        """Why this origin cannot be changed so; "" if it can."""

    def reject_origin(self, spec: CandidateSpec, signature: Signature, origin: Origin) -> str:
        """Why `spec` cannot be derived; "" if it can."""
        if reason := self._malformed(spec):
            return reason
        if reason := unserved(signature):
            return reason
        if opaque_leaves(origin.whole):
            return "the region holds an operation that only ONNX Runtime knows"
        return self.unsuited(spec, origin)

    def make(self, spec: CandidateSpec, signature: Signature, origin: Origin) -> fx.GraphModule:
        """The candidate, ready to be emitted, in evaluation mode. HantcError with the reason if rejected."""
        if reason := self.reject_origin(spec, signature, origin):
            raise HantcError(f"cannot be derived from the teacher: {reason}", where=f"candidate {spec.name}")
        return self._made(spec, signature, origin)

    def _made(self, spec: CandidateSpec, signature: Signature, origin: Origin) -> fx.GraphModule:
        with torch.no_grad():
            made = canonical(self.derive(spec, origin))
            for conv in made.modules():
                if isinstance(conv, Conv) and conv.bias is None:  # fits and training may need one
                    conv.bias = nn.Parameter(torch.zeros(conv.weight.shape[0]))
        made.meta["info"] = standalone_info(signature.in_shape, signature.out_shape, opset=_MIN_OPSET)
        made.eval()
        return made

    def size(self, spec: CandidateSpec, signature: Signature, origin: Origin) -> tuple[int, int]:
        """(multiply-accumulates per sample, weights) of what `make` gives, of a spec that `reject_origin` lets pass."""
        made = self._made(spec, signature, origin)
        return module_macs(made, signature.in_shape), count_params(made)

    def misfit(self, spec: CandidateSpec, signature: Signature) -> str:
        """Shapes alone never do."""
        return "made from the teacher's region, not from shapes"

    def build(self, spec: CandidateSpec, signature: Signature) -> nn.Module:
        """Never possible: see `make`."""
        raise HantcError("is derived from the teacher's region", where=f"candidate {spec.name}")


def canonical(module: fx.GraphModule) -> fx.GraphModule:
    """The same modules in a graph whose nodes and modules are named by position, so that weights of one derivation
    fit every other of the same structure, whichever block of the teacher it came from."""
    graph, modules = fx.Graph(), dict[str, Any]()
    env: dict[fx.Node, fx.Node] = {}
    taken: set[str] = set()
    for node in module.graph.nodes:
        if node.op == "call_module":
            leaf = module.get_submodule(str(node.target))
            leaf = copy.deepcopy(leaf) if str(node.target) in taken else leaf  # two calls of one module become two
            taken.add(str(node.target))
            name = f"{type(leaf).__name__.lower()}_{len(modules)}"
            modules[name] = leaf
            env[node] = graph.create_node("call_module", name, fx.node.map_arg(node.args, env.__getitem__), name=name)
        elif node.op == "get_attr":
            name = f"const_{len(modules)}"
            modules[name] = _attribute(module, str(node.target)).clone()
            env[node] = graph.create_node("get_attr", name, name=name)
        elif node.op == "placeholder":
            env[node] = graph.placeholder("x")
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
    return fx.GraphModule(modules, graph)


def structure(module: fx.GraphModule) -> str:
    """Digest of everything about a graph but its names and weights."""
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    rows: list[object] = []
    for node in module.graph.nodes:
        row: list[object] = [node.op, [order[n] for n in node.all_input_nodes]]
        if node.op == "call_module":
            leaf = module.get_submodule(str(node.target))
            settings = {k: v for k, v in vars(leaf).items() if k != "training" and not k.startswith("_")}
            plain = {k: repr(v) for k, v in settings.items() if isinstance(v, (int, float, str, tuple, list))}
            row += [type(leaf).__name__, plain, [tuple(p.shape) for p in leaf.parameters()]]
        elif node.op == "get_attr":
            value = _attribute(module, str(node.target))
            row += [tuple(value.shape), str(value.dtype), value.flatten().tolist() if value.numel() <= 16 else ""]
        rows.append(row)
    return digest(rows)


def editable(module: fx.GraphModule) -> fx.GraphModule:
    """A deep copy without the whole network's other modules."""
    made, memo = fx.GraphModule(module, copy.deepcopy(module.graph)), dict[int, Any]()  # what is shared stays so
    for kind, target in dict.fromkeys((n.op, str(n.target)) for n in made.graph.nodes):
        owner, _, name = target.rpartition(".")
        if kind in ("call_module", "get_attr"):
            setattr(made.get_submodule(owner), name, copy.deepcopy(getattr(made.get_submodule(owner), name), memo))
    made.meta.update(module.meta)
    return made


def leaves(module: fx.GraphModule, wanted: Callable[[nn.Module], bool]) -> list[tuple[fx.Node, nn.Module]]:
    """(node, leaf) of the leaves that `wanted` accepts, in order."""
    pairs = [(n, module.get_submodule(str(n.target))) for n in module.graph.nodes if n.op == "call_module"]
    return [(n, leaf) for n, leaf in pairs if wanted(leaf)]


def _attribute(module: fx.GraphModule, target: str) -> Tensor:
    owner, _, name = target.rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), name)
    return value
