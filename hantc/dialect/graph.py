"""Work on graphs of leaves: tracing, shapes, cutting out subgraphs, counting."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from hantc.core.errors import HantcError
from hantc.core.types import ModelInfo, Shape, TensorSpec
from hantc.dialect.conv import Conv
from hantc.dialect.leaf import Leaf
from hantc.dialect.linear import Linear, MatMul


class _LeafTracer(fx.Tracer):
    """Traces through plain modules and stops at leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Leaf)


def trace(module: nn.Module, in_shape: Shape | None = None, out_shape: Shape | None = None) -> fx.GraphModule:
    """A module written with leaves → graph module. With shapes (without batch) it can be emitted alone."""
    graph = _LeafTracer().trace(module)
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_module", "output", "get_attr"):
            raise HantcError(f"candidate uses {node.op} {node.target}: write it with dialect leaves")
    traced = fx.GraphModule(module, graph)
    if in_shape is not None and out_shape is not None:
        traced.meta["info"] = standalone_info(in_shape, out_shape)
    return traced


def standalone_info(in_shape: Shape, out_shape: Shape, *, opset: int = 17) -> ModelInfo:
    """Model information of a subgraph emitted on its own: one float input "x", one output "y"."""
    return ModelInfo(
        inputs=(TensorSpec("x", "float32", ("N", *in_shape)),),
        outputs=(TensorSpec("y", "float32", ("N", *out_shape)),),
        opset=opset,
        ir_version=8,
    )


def leaf_of(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module a call_module node calls; None for other nodes."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def node_named(module: fx.GraphModule, name: str) -> fx.Node:
    """The node called `name`; KeyError if none."""
    node: fx.Node
    for node in module.graph.nodes:
        if node.name == name:
            return node
    raise KeyError(name)


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n.name] = tuple(result.shape)
        return result


def shapes_of(module: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape (with batch) of every tensor-valued node, found by running the graph once."""
    recorder = _ShapeRecorder(module)
    with torch.no_grad():
        recorder.run(*inputs)
    return recorder.shapes


def subgraph(
    module: fx.GraphModule,
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> fx.GraphModule:
    """The part of a graph that computes nodes `outputs` from nodes `inputs`, sharing the modules.

    Placeholders of the whole graph that are needed besides `inputs` are an error (HantcError): then
    `inputs` is no cut.
    """
    wanted = {n.name: n for n in module.graph.nodes}
    needed: set[fx.Node] = set()
    stack = [wanted[o] for o in outputs if o not in inputs]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        if node.op == "placeholder":
            raise HantcError(f"{list(inputs)} do not cut the graph: {node.name} is needed too")
        needed.add(node)
        stack += [a for a in node.all_input_nodes if a.name not in inputs]
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {wanted[i]: graph.placeholder(i) for i in inputs}
    for node in module.graph.nodes:
        if node in needed and node not in env:
            env[node] = graph.node_copy(node, lambda n: env[n])
    results = tuple(env[wanted[o]] for o in outputs)
    graph.output(results[0] if len(results) == 1 else results)
    return fx.GraphModule(module, graph)


def read_beside(module: fx.GraphModule, name: str, output: str) -> list[str]:
    """The other values, in order, that the nodes between `name` and `output` read: none where `name` cuts the graph.
    What follows from constants alone is not among them."""
    behind, fed, towards = {name}, set[str](), {output}
    for node in module.graph.nodes:
        sources = {a.name for a in node.all_input_nodes}
        if node.op == "placeholder" or sources & fed:
            fed.add(node.name)
        if sources & behind:
            behind.add(node.name)
    for node in reversed(module.graph.nodes):
        if node.name in towards:
            towards |= {a.name for a in node.all_input_nodes}
    inner = (behind & towards) - {name}
    read = {a.name for n in module.graph.nodes if n.name in inner for a in n.all_input_nodes}
    return [n.name for n in module.graph.nodes if n.name in (read & fed) - inner - {name}]


def with_taps(module: fx.GraphModule, taps: Sequence[str], *, output: bool = True) -> fx.GraphModule:
    """The same graph returning (output, [values of nodes `taps`]), sharing the modules. Without `output`, None in its
    place, and what lies behind the last tap is not computed."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    result: Any = None
    for node in module.graph.nodes:
        if node.op == "output":
            result = fx.node.map_arg(node.args[0], lambda n: env[n])
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
    by_name = {n.name: env[n] for n in env}
    graph.output((result if output else None, [by_name[t] for t in taps]))
    tapped = fx.GraphModule(module, graph)
    if not output:
        tapped.graph.eliminate_dead_code()
        tapped.recompile()
    return tapped


def tidy(module: fx.GraphModule) -> None:
    """Drop, in place, the nodes, modules and constants that nothing needs; recompile."""
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in module.named_buffers(recurse=False) if n not in used]:
        delattr(module, name)
    module.graph.lint()
    module.recompile()


def count_params(module: nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in module.parameters())


def count_macs(
    module: fx.GraphModule, shapes: Mapping[str, tuple[int, ...]], nodes: Collection[str] | None = None
) -> int:
    """Multiply-accumulates for one sample of the convolutions and matrix products among `nodes` (None: all).
    `shapes` as from `shapes_of`, at any batch."""
    total = 0
    for node in module.graph.nodes:
        if node.op != "call_module" or (nodes is not None and node.name not in nodes):
            continue
        leaf, out = leaf_of(module, node), shapes.get(node.name)
        if out is None:
            continue
        if isinstance(leaf, Conv):
            total += math.prod(out[2:]) * leaf.weight.numel()
        elif isinstance(leaf, Linear):
            total += math.prod(out[1:-1]) * leaf.weight.numel()
        elif isinstance(leaf, MatMul):
            inner = shapes[node.all_input_nodes[0].name][-1]
            total += math.prod(out[1:]) * inner
    return total


def peak_activations(
    module: fx.GraphModule, shapes: Mapping[str, tuple[int, ...]], passing: Collection[str] = ()
) -> int:
    """Largest number of elements alive at once, in the graph's order, each from when it is made to when it is last
    read; weights and constants not counted. At nodes of `passing` nothing is looked at. A graph inside the graph counts
    by what is alive in it. `shapes` as from `shapes_of`."""
    last = {source: k for k, node in enumerate(module.graph.nodes) for source in node.all_input_nodes}
    alive: dict[fx.Node, int] = {}
    peak = 0
    for k, node in enumerate(module.graph.nodes):
        if node.op != "get_attr" and node.name in shapes:
            alive[node] = math.prod(shapes[node.name])
        if node.name not in passing:
            peak = max(peak, sum(alive.values()) + _inside(module, node, shapes))
        alive = {n: size for n, size in alive.items() if last.get(n, -1) > k}
    return peak


def _inside(module: fx.GraphModule, node: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many more elements are alive within a node that is a graph itself than its inputs and its output have."""
    inner = leaf_of(module, node) if node.op == "call_module" else None
    if not isinstance(inner, fx.GraphModule) or node.name not in shapes:
        return 0
    given = [shapes[n.name] for n in node.all_input_nodes]
    most = peak_activations(inner, shapes_of(inner, [torch.zeros(shape) for shape in given]))
    return most - sum(map(math.prod, [*given, shapes[node.name]]))


def module_macs(module: fx.GraphModule, in_shape: Shape) -> int:
    """Multiply-accumulates of a standalone graph on one sample of `in_shape`."""
    shapes = shapes_of(module, [torch.zeros(1, *in_shape)])
    return count_macs(module, shapes)


def cut(module: fx.GraphModule, entry: str, exit_: str, in_shape: Shape, out_shape: Shape) -> fx.GraphModule:
    """A region as a standalone graph that can be emitted (modules shared with the whole)."""
    part = subgraph(module, [entry], [exit_])
    opset = max(13, module.meta["info"].opset)
    part.meta["info"] = replace(standalone_info(in_shape, out_shape), opset=opset)
    return part
