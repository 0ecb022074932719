"""Fold shape computations away: exporters write `x.view(x.size(0), -1)` as a dozen nodes.

Values that depend on nothing but the input's shape are found by walking from the Shape nodes, and evaluated
by running the graph at two batch sizes: what stays the same is a constant, and a Reshape that only carries
the batch along becomes a native one. Sound because all dims but the batch are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hantc.core.errors import UnsupportedError
from hantc.core.types import ModelInfo
from hantc.dialect.elementwise import Binary
from hantc.dialect.examples import example_inputs
from hantc.dialect.graph import leaf_of, tidy
from hantc.dialect.leaf import Dim, OnnxNode, array, attributes, tensor
from hantc.dialect.opaque import Opaque
from hantc.dialect.registry import parse
from hantc.dialect.shape import Reshape

Values = dict[fx.Node, Any]


def _op(module: fx.GraphModule, node: fx.Node) -> str:
    leaf = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return leaf.proto.op_type if isinstance(leaf, Opaque) else type(leaf).__name__


# operators whose result's size hangs on the values of their inputs after the first, or on all
_SIZED_BY_VALUES = frozenset(
    {"Reshape", "Expand", "Pad", "Slice", "Tile", "Resize", "Upsample", "TopK", "OneHot", "CenterCropPad", "AffineGrid",
     "Split", "MaxUnpool", "Col2Im"}
)  # fmt: skip
_SIZED_BY_ALL = frozenset({"NonZero", "Compress", "Unique", "ConstantOfShape", "Range", "If", "Loop", "Scan"})


def shape_only(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose value is decided by the input's shape and constants alone."""
    found: set[fx.Node] = set()
    loose: set[fx.Node] = set()  # whose size is decided by values
    for node in module.graph.nodes:
        fed, op = (node.all_input_nodes, _op(module, node)) if node.op in ("call_module", "call_function") else ([], "")
        decisive = fed[1:] if op in _SIZED_BY_VALUES else fed if op in _SIZED_BY_ALL else []
        if any(n in loose for n in fed) or any(n not in found for n in decisive):
            loose.add(node)
        starts = node.op == "get_attr" or (op == "Shape" and node not in loose)
        follows = bool(fed) and all(n in found for n in fed) and not op.startswith("Random")
        if starts or follows:
            found.add(node)
    return found


class _Values(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: Values = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def _run(module: fx.GraphModule, info: ModelInfo, batch: int) -> Values:
    interpreter = _Values(module)
    with torch.no_grad():
        interpreter.run(*example_inputs(info, batch))
    return interpreter.values


def _carries_batch(x: Tensor, y: Tensor) -> bool:
    return x.dim() > 0 and y.dim() > 1 and x.shape[0] == y.shape[0] and math.prod(x.shape[1:]) == math.prod(y.shape[1:])


def _batches(info: ModelInfo) -> list[int]:
    """Batch sizes to run at: one if the file fixes the batch of all inputs, else two, to see what varies."""
    first = [s.shape[0] for s in info.inputs if s.shape]
    return [2, 3] if not first or any(not isinstance(d, int) for d in first) else [1]


def _carry_batch(module: fx.GraphModule, runs: Sequence[Values]) -> None:
    """Make native the Reshapes that leave the batch alone."""
    for node in [n for n in module.graph.nodes if _op(module, n) == "Reshape"]:
        source = node.all_input_nodes[0]
        pairs = [(r[source], r[node]) for r in runs]
        carried = all(isinstance(x, Tensor) and isinstance(y, Tensor) and _carries_batch(x, y) for x, y in pairs)
        if carried and len({tuple(y.shape[1:]) for _, y in pairs}) == 1:
            setattr(module, str(node.target), Reshape(pairs[0][1].shape[1:], keep_batch=True))
            node.args = (source,)


def _fold_constants(module: fx.GraphModule, runs: list[Values], candidates: set[fx.Node]) -> None:
    """Replace what shapes alone decide, and what does not vary with the batch, by constants. Only the last
    nodes of such a computation: the others die with it."""

    def same(node: fx.Node) -> bool:
        values = [v for r in runs if isinstance(v := r.get(node), Tensor)]
        return len(values) == len(runs) and all(torch.equal(v, values[0]) for v in values)

    constant = {n for n in module.graph.nodes if n in candidates and same(n)}
    for i, node in enumerate([n for n in module.graph.nodes if n in constant and n.op != "get_attr"]):
        outside = [u for u in node.users if u not in constant]
        if not outside:
            continue
        first = runs[0][node]
        target = f"folded_shape_{i}"  # "shape_0" is what a Shape node's own module is called
        module.register_buffer(target, first.clone())
        with module.graph.inserting_before(node):
            folded = module.graph.create_node("get_attr", target, name=target)
        for run in runs:
            run[folded] = first
        for user in outside:
            user.replace_input_with(node, folded)


# operators that only move values, their further inputs saying how
_PICKS = frozenset({"Gather", "GatherElements", "GatherND"})
_MOVES = _PICKS | {"Reshape", "Slice", "Expand", "Transpose", "Squeeze"}


def _skip_detours(module: fx.GraphModule, runs: Sequence[Values], shaped: set[fx.Node]) -> None:
    """Take out moves that lead back to where they began: exporters write torch's `as_strided` as a Gather from the
    flat value by indices computed from the batch, which hides from the matcher that all goes through one node.

    Sound as far as the batches looked at go: nothing but moves lies between, where they lead is decided by shapes
    alone, and no two elements of the value are equal, so that each is where it was.
    """
    for node in list(module.graph.nodes):
        source, picked = node, False  # a Reshape alone is for the rewrites to drop
        while (
            _op(module, source) in _MOVES
            and source.all_input_nodes
            and all(n in shaped for n in source.all_input_nodes[1:])
        ):
            picked = picked or _op(module, source) in _PICKS
            source = source.all_input_nodes[0]
            if picked and all(_nothing_moved(run.get(source), run.get(node)) for run in runs):
                node.replace_all_uses_with(source)
                break


def _skip_expands(module: fx.GraphModule, runs: Sequence[Values]) -> None:
    """Take out an Expand whose readers would broadcast just so (`y.expand_as(x) * x`): its shape follows the batch,
    which ties the network's beginning to each of them."""
    for node in [n for n in module.graph.nodes if _op(module, n) == "Expand"]:
        readers = [(leaf_of(module, user), user) for user in node.users]
        if all(isinstance(leaf, Binary) and _as_large(node, user, runs) for leaf, user in readers):
            node.replace_all_uses_with(node.all_input_nodes[0])


def _as_large(node: fx.Node, reader: fx.Node, runs: Sequence[Values]) -> bool:
    """Whether the reader's other operand has the shape that `node` has."""
    others = [n for n in reader.all_input_nodes if n is not node]
    values = [(run.get(node), run.get(other)) for run in runs for other in others]
    return bool(values) and all(
        isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape for a, b in values
    )


def _nothing_moved(before: Any, after: Any) -> bool:
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)) or before.shape != after.shape:
        return False
    return torch.equal(before, after) and before.unique().numel() == before.numel() > 1


def _concrete(node: fx.Node, runs: Sequence[Values]) -> tuple[Dim, ...] | None:
    """Shape of a node's value; dims that differ between the runs are None."""
    values = [r.get(node) for r in runs]
    shapes = [tuple(v.shape) for v in values if isinstance(v, Tensor)]
    if len(shapes) < len(runs) or len({len(s) for s in shapes}) > 1:
        return None
    return tuple(dims[0] if len(set(dims)) == 1 else None for dims in zip(*shapes, strict=True))


def _parse_again(module: fx.GraphModule, node: fx.Node, leaf: Opaque, runs: Sequence[Values]) -> None:
    """Make an opaque node native if it was opaque only for want of shapes or constants known by now."""
    known = dict(zip(leaf.names, node.all_input_nodes, strict=True))
    constants = dict(leaf.constants)
    for name, arg in known.items():
        if arg.op == "get_attr":
            constants[name] = array(module.get_buffer(str(arg.target)))
    shapes = {name: shape for name, arg in known.items() if (shape := _concrete(arg, runs)) is not None}
    out = _concrete(node, runs)
    shapes |= {k: tuple(v.shape) for k, v in constants.items()} | ({leaf.outputs[0]: out} if out is not None else {})
    view = OnnxNode(
        leaf.proto.op_type,
        attributes(leaf.proto),
        leaf.opsets[""],
        tuple(leaf.proto.input),
        constants,
        shapes,
        leaf.outputs,
    )
    try:
        native = parse(view)
        wanted = [view.inputs[i] for i in native.data]
    except (UnsupportedError, KeyError, IndexError, ValueError, TypeError, AttributeError):
        return
    for name in [n for n in wanted if n not in known]:
        target = f"{node.name}_{len(known)}"
        module.register_buffer(target, tensor(constants[name]))
        with module.graph.inserting_before(node):
            known[name] = module.graph.create_node("get_attr", target, name=target)
    setattr(module, str(node.target), native)
    node.args = tuple(known[n] for n in wanted)


def fold_shapes(module: fx.GraphModule) -> None:
    """Rewrite `module` in place. Does nothing where the graph cannot be run (several symbolic dims, say)."""
    info = module.meta["info"]
    candidates = shape_only(module)
    opaque = [n for n in module.graph.nodes if isinstance(leaf_of(module, n), Opaque)]
    reshapes = any(_op(module, n) == "Reshape" for n in module.graph.nodes)
    if not reshapes and not opaque and all(n.op == "get_attr" for n in candidates):
        return
    if info.types or any(not isinstance(d, int) for s in info.inputs for d in s.shape[1:]):
        return
    try:
        runs = [_run(module, info, b) for b in _batches(info)]
    except Exception:  # a graph that this input cannot run stays as it is; nothing is lost but native shapes
        return
    _skip_detours(module, runs, candidates)
    _skip_expands(module, runs)
    _carry_batch(module, runs)
    _fold_constants(module, runs, candidates)
    for node in opaque:
        leaf = leaf_of(module, node)
        if isinstance(leaf, Opaque) and leaf.proto.domain in ("", "ai.onnx") and len(leaf.outputs) == 1:
            _parse_again(module, node, leaf, runs)
    tidy(module)
