"""What a rewrite is, and what all rewrites need: looking at a graph's neighbourhoods and changing them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, fx, nn

from hantc.core.types import ModelInfo
from hantc.dialect.examples import example_inputs
from hantc.dialect.graph import leaf_of, tidy
from hantc.dialect.leaf import Leaf
from hantc.dialect.shape import Reshape, Slice

L = TypeVar("L", bound=nn.Module)

_TO_THE_END = 2**31 - 1  # a Slice's end as exporters write it, or more


@dataclass(frozen=True)
class Applied:
    """A rewrite that was done: fx nodes it concerned (as they were called before) and what became of them."""

    rewrite: str
    nodes: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class Missed:
    """A place that nearly matches a rewrite, and why it was left as it is."""

    rewrite: str
    nodes: tuple[str, ...]
    reason: str


Outcome = tuple[list[Applied], list[Missed]]


class Rewrite(Protocol):
    """An exact transformation. `apply` changes the given graph in place (callers pass a copy) wherever it
    can; values agree with the original's up to rounding. Leaves are replaced, never changed, so that the
    original, whose modules a shallow copy may share, stays whole."""

    @property
    def name(self) -> str:
        """Unique, as in `teacher_<name>`."""
        ...

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """What was done and what was nearly done."""
        ...


@dataclass
class Log:
    """Collects the outcome of one rewrite."""

    rewrite: str
    applied: list[Applied] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)

    def did(self, note: str, *nodes: fx.Node) -> None:
        """Record a change."""
        self.applied.append(Applied(self.rewrite, tuple(n.name for n in nodes), note))

    def miss(self, reason: str, *nodes: fx.Node) -> None:
        """Record a near-match."""
        self.missed.append(Missed(self.rewrite, tuple(n.name for n in nodes), reason))

    def finish(self, gm: fx.GraphModule) -> Outcome:
        """What `Rewrite.apply` returns; the graph, if changed, is cleaned and compiled."""
        if self.applied:
            tidy(gm)
        return self.applied, self.missed


def calls(gm: fx.GraphModule, kind: type[L]) -> Iterator[tuple[fx.Node, L]]:
    """Every node that calls a leaf of class `kind`, with the leaf, in order; nodes may vanish meanwhile."""
    for node in list(gm.graph.nodes):
        if not node._erased:
            leaf = leaf_of(gm, node)
            if isinstance(leaf, kind):
                yield node, leaf


def source(node: fx.Node) -> fx.Node:
    """The node's only (or first) operand."""
    return node.all_input_nodes[0]


def sole_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses this one's value; None if there are several (a graph output counts)."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def shared(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether other nodes call the same module."""
    return len([n for n in gm.graph.nodes if n.op == "call_module" and n.target == node.target]) > 1


def constant(gm: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The value of a constant node, None for other nodes."""
    return gm.get_buffer(str(node.target)).detach() if node.op == "get_attr" else None


def constant_operand(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, Tensor, bool] | None:
    """For a node of two operands one of which is constant: (the other operand, the constant, whether the
    constant is the right one)."""
    if len(node.args) != 2:
        return None
    left, right = node.args
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    for other, candidate, is_right in ((left, right, True), (right, left, False)):
        value = constant(gm, candidate)
        if value is not None and other.op != "get_attr":
            return other, value, is_right
    return None


def swap(gm: fx.GraphModule, node: fx.Node, leaf: Leaf) -> None:
    """Let `node` call `leaf` instead of its module; other callers of that module keep theirs."""
    target = str(node.target)
    if shared(gm, node):
        stem = target.replace(".", "_")
        target = next(t for n in itertools.count() if not hasattr(gm, t := f"{stem}_r{n}"))
    leaf.train(gm.training)
    gm.add_submodule(target, leaf)
    node.target = target


def bypass(node: fx.Node, value: fx.Node) -> None:
    """Replace every use of `node` by `value` and remove it."""
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


@dataclass(frozen=True)
class Known:
    """Shape (with the example's batch) and dtype of a node's value."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.known: dict[str, Known] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.known[n.name] = Known(tuple(result.shape), result.dtype)
        return result


def keeps_batch(leaf: nn.Module | None) -> bool:
    """Whether a node that reshapes does so image by image: (2, -1) looks like it at the example's batch of two, and
    only there."""
    return not isinstance(leaf, Reshape) or leaf.keep_batch or leaf.shape[0] in (0, -1)


def known_values(gm: fx.GraphModule, batch: int = 2) -> dict[str, Known]:
    """Shape and dtype of every node's value, found by running the graph once on a `batch` of images. Empty where
    that is impossible: no model information, sizes besides the batch that are open, or a graph that fails."""
    info = gm.meta.get("info")
    if (
        not isinstance(info, ModelInfo)
        or info.types
        or any(not isinstance(d, int) for s in info.inputs for d in s.shape[1:])
    ):
        return {}
    recorder = _Recorder(gm)
    try:
        with torch.no_grad():
            recorder.run(*example_inputs(info, batch))
    except Exception:  # whatever a foreign node raises: shapes stay unknown, and rewrites say so
        return {}
    return recorder.known


class Lazy:
    """`known_values`, computed when first asked for."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._values: dict[str, Known] | None = None
        self._others: dict[str, Known] | None = None  # at another batch

    def steady(self, node: fx.Node, dims: Sequence[int]) -> bool:
        """Whether these dims of the node's value are of one size whatever the batch is (which may have become part of
        another dim)."""
        if self._others is None:
            self._others = known_values(self._gm, 3)
        one, other = self.shape(node), self._others.get(node.name)
        return one is not None and other is not None and all(one[d] == other.shape[d] for d in dims)

    def __call__(self, node: fx.Node) -> Known | None:
        """What is known of the node's value."""
        if self._values is None:
            self._values = known_values(self._gm)
        return self._values.get(node.name)

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """Shape of the node's value, if known."""
        known = self(node)
        return known.shape if known else None


def sizes_are_fixed(gm: fx.GraphModule) -> bool:
    """Whether only the batch is free: what else is has an invented size in `Lazy`."""
    info = gm.meta.get("info")
    return info is not None and all(isinstance(d, int) for spec in info.inputs for d in spec.shape[1:])


def pixel_steps(leaf: Slice, shape: tuple[int, ...] | None, *, fixed: bool) -> tuple[int, int] | None:
    """Of both spatial axes, if the Slice takes every n-th pixel from the first one to the end and all else whole.
    `fixed`: whether all dims but the batch are."""
    steps = [1] * 4
    for start, end, axis, step in zip(leaf.starts, leaf.ends, leaf.axes, leaf.steps, strict=True):
        if shape is None or step < 1:
            return None
        known = fixed and axis % 4 != 0
        begins = start == 0 or (known and start == -shape[axis])
        if not begins or not (end >= _TO_THE_END or (known and end >= shape[axis])):
            return None
        steps[axis] = step
    return (steps[2], steps[3]) if steps[:2] == [1, 1] else None
