"""Patterns over the dialect: a small graph, written as a Python function, that is looked for in networks.

    from hantc.dialect.pattern import pattern

    @pattern("fire")
    def fire(op, x):
        squeezed = op.Relu(op.Conv(x, kernel=1))
        return op.Concat(op.Relu(op.Conv(squeezed, kernel=1)), op.Relu(op.Conv(squeezed, kernel=3)))

`op.NAME(values..., check=...)` is an operation: NAME is that of a leaf (`Conv`, `Pool`, `Linear`, `Concat`, ...), of
an activation (`Relu`, `SiLU`, ...), of a sum or product (`Add`, `Mul`, ...) or of an ONNX operator that has no leaf.
Checks compare the leaf's attributes: with a value (3 is also (3, 3)), or by a function of it. `op.act` and `op.norm`
stand for any activation and a batch norm, or none; `op.any` for any one operation. Operands of sums, products and
concatenations may stand in any order. What fails says how far it came, and why (as onnxscript's rewriter does).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from torch import fx, nn

from hantc.core.errors import HantcError
from hantc.core.plugins import load_point
from hantc.dialect.activation import activation_name
from hantc.dialect.graph import leaf_of
from hantc.dialect.norm import BatchNorm
from hantc.dialect.opaque import Opaque
from hantc.dialect.verbatim import Verbatim

GROUP = "hantc.patterns"
_ANY_ORDER = frozenset({"add", "mul", "concat", "sum", "max", "min"})
_MOST_ORDERED = 4  # operands that are tried in every order
_MOST_STEPS = 20_000  # of the search at one node


@dataclass(frozen=True, eq=False)
class Value:
    """What an operation of a pattern gives; `op` is "" for the pattern's input."""

    op: str = ""
    inputs: tuple[Value, ...] = ()
    checks: Mapping[str, Any] = field(default_factory=dict)

    @property
    def optional(self) -> bool:
        """Whether the operation may be missing."""
        return self.op in ("act", "norm")


class Ops:
    """Makes a pattern's operations: `op.Conv(x, kernel=3)`."""

    def __getattr__(self, name: str) -> Callable[..., Value]:
        def make(*inputs: Value, **checks: Any) -> Value:
            return Value(name, inputs, checks)

        return make


@dataclass(frozen=True)
class Pattern:
    """A pattern by its name. `kind`: that of the regions found (DESIGN §5), by default what their shape tells."""

    name: str
    build: Callable[[Ops, Value], Value]
    kind: str = ""


def pattern(name: str, kind: str = "") -> Callable[[Callable[[Ops, Value], Value]], Pattern]:
    """Makes a function of `(op, x)` a pattern."""
    return lambda build: Pattern(name, build, kind)


def installed() -> tuple[Pattern, ...]:
    """The patterns of installed packages (entry points of the group `hantc.patterns`). HantcError if one does not
    load: leaving it out silently would change results."""
    found = []
    for point in entry_points(group=GROUP):
        made = load_point(point, "pattern")
        if not isinstance(made, Pattern):
            raise HantcError(f"the pattern {point.name!r} ({point.value}) is no hantc.dialect.pattern.Pattern")
        found.append(made)
    return tuple(found)


@dataclass(frozen=True)
class Found:
    """A part of a graph that a pattern describes: from the value of node `entry` to that of `exit`."""

    pattern: Pattern
    entry: str
    exit: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Miss:
    """Where a pattern nearly fits: its last operation at node `exit`, `matched` of `total` operations, and what the
    next one wanted."""

    pattern: Pattern
    exit: str
    matched: int
    total: int
    reason: str


def find(pattern: Pattern, module: fx.GraphModule) -> tuple[list[Found], list[Miss]]:
    """Every place where the pattern fits, in the graph's order, and where more than half of it does. HantcError if its
    function or one of its checks fails, or describes no part of a network."""
    source = Value()
    try:
        root = pattern.build(Ops(), source)
        needed = _checked(pattern, root, source)
        return _find(pattern, module, root, source, needed)
    except HantcError:
        raise
    except RecursionError as e:
        raise HantcError(f"the pattern {pattern.name!r} is too deep") from e
    except Exception as e:  # the function, and its checks, may raise anything
        raise HantcError(f"the pattern {pattern.name!r} fails: {type(e).__name__}: {e}") from e


def _checked(pattern: Pattern, root: Value, source: Value) -> int:
    """How many operations a part must have to fit. HantcError if the function does not describe a part."""
    values = list(_walk(root))
    wrong = [v for v in values if not isinstance(v, Value)]
    count = sum(isinstance(v, Value) and v is not source and not v.optional for v in values)
    reason = ""
    if wrong:
        reason = f"{wrong[0]!r} is no value of an operation"
    elif source not in values:
        reason = "it does not use its input"
    elif not count:
        reason = "it has no operation that must be there"
    elif any(v.optional and len(v.inputs) != 1 for v in values):
        reason = "op.act and op.norm read one value"
    if reason:
        raise HantcError(f"the pattern {pattern.name!r} describes no part of a network: {reason}")
    return count


def _find(
    pattern: Pattern, module: fx.GraphModule, root: Value, source: Value, total: int
) -> tuple[list[Found], list[Miss]]:
    found, misses = [], []
    for node in module.graph.nodes:
        if node.op != "call_module":
            continue
        search = _Search(module, source)
        bound = next(search.match(root, node, {}), None)
        if bound is None:
            if 2 * search.best > total:
                misses.append(Miss(pattern, node.name, search.best, total, search.reason))
        elif reason := search.leaks(bound, source, root):
            misses.append(Miss(pattern, node.name, total, total, reason))
        else:
            inside = {n for v, n in bound.items() if v is not source and n is not None} - {bound.get(source)}
            nodes = tuple(n.name for n in module.graph.nodes if n in inside)
            entry = bound[source]
            assert entry is not None
            found.append(Found(pattern, entry.name, node.name, nodes))
    return found, misses


_Bound = dict[Value, fx.Node | None]  # None: an optional operation that is missing


class _Search:
    """Matching backwards from one node; remembers how far the best attempt came."""

    def __init__(self, module: fx.GraphModule, source: Value) -> None:
        self.module, self.source = module, source
        self.best, self.reason, self.steps = 0, "", 0

    def match(self, value: Value, node: fx.Node, bound: _Bound) -> Iterator[_Bound]:
        """Every way in which `value` is what `node` gives."""
        self.steps += 1
        if self.steps > _MOST_STEPS:
            self._missed(bound, "there are too many ways in which it may fit")
            return
        if value in bound and bound[value] is None:  # an optional one that is missing
            yield from self.match(value.inputs[0], node, bound)
            return
        if value in bound:
            if bound[value] is node:
                yield bound
            else:
                self._missed(bound, f"{_label(value)} is read twice by the pattern, and is {bound[value]} and {node}")
            return
        if value is self.source:
            yield {**bound, value: node}
            return
        if why := self._differs(value, node):
            if value.optional:
                yield from self.match(value.inputs[0], node, {**bound, value: None})
            else:
                self._missed(bound, f"at {node.name} it wants {why}")
            return
        operands = _operands_of(node)
        if len(operands) != len(value.inputs):
            self._missed(bound, f"{node.name} reads {len(operands)} values, {_label(value)} {len(value.inputs)}")
            return
        for order in _orders(value, operands):
            yield from self._operands(list(zip(value.inputs, order, strict=True)), {**bound, value: node})

    def _operands(self, pairs: Sequence[tuple[Value, fx.Node]], bound: _Bound) -> Iterator[_Bound]:
        if not pairs:
            yield bound
            return
        for deeper in self.match(*pairs[0], bound):
            yield from self._operands(pairs[1:], deeper)

    def _differs(self, value: Value, node: fx.Node) -> str:
        """What `value` wants, if `node` is something else; "" if it fits."""
        leaf = leaf_of(self.module, node) if node.op == "call_module" else None
        if leaf is None or not _is(leaf, value.op):
            return f"{_label(value)}, and finds {_called(leaf) if leaf is not None else node.op}"
        for name, wanted in value.checks.items():
            if not hasattr(leaf, name):
                return f"{_label(value)} with {name}, which {_called(leaf)} has not"
            has = getattr(leaf, name)
            fits = wanted(has) if callable(wanted) else _same(has, wanted)
            if not fits:
                asked = "another" if callable(wanted) else wanted
                return f"{name} {asked}, and finds {has}"
        return ""

    def _missed(self, bound: _Bound, reason: str) -> None:
        matched = sum(n is not None and v is not self.source and not v.optional for v, n in bound.items())
        if matched > self.best or not self.reason:
            self.best, self.reason = matched, reason

    def leaks(self, bound: _Bound, source: Value, root: Value) -> str:
        """Which value inside is read outside, if any: then the part cannot be replaced."""
        inside = {n for v, n in bound.items() if v is not source and n is not None}
        for node in inside - {bound[root]}:
            for reader in node.users:
                if reader not in inside:
                    return f"{node.name}, inside it, is also read by {reader.name}"
        return ""


def _walk(root: Value) -> Iterator[Value]:
    """Every value of a pattern, once."""
    stack, seen = [root], set[int]()
    while stack:
        value = stack.pop()
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            stack += value.inputs if isinstance(value, Value) else ()


def _operands_of(node: fx.Node) -> list[fx.Node]:
    """What a node reads, a value that it reads twice twice."""
    found: list[fx.Node] = []

    def note(n: fx.Node) -> fx.Node:
        found.append(n)
        return n

    fx.node.map_arg(node.args, note)
    return found


def _orders(value: Value, operands: Sequence[fx.Node]) -> Iterator[Sequence[fx.Node]]:
    if value.op.lower() in _ANY_ORDER and len(operands) <= _MOST_ORDERED:
        return itertools.permutations(operands)
    return iter([operands])


def _names(leaf: nn.Module) -> set[str]:
    names = {type(leaf).__name__, str(getattr(leaf, "op", "")), activation_name(leaf)}
    if isinstance(leaf, (Verbatim, Opaque)):
        names.add(leaf.proto.op_type)
    return {n.lower() for n in names if n}


def _is(leaf: nn.Module, op: str) -> bool:
    if op == "any":
        return True
    if op == "act":
        return bool(activation_name(leaf))
    if op == "norm":
        return isinstance(leaf, BatchNorm)
    return op.lower() in _names(leaf)


def _called(leaf: nn.Module) -> str:
    if isinstance(leaf, (Verbatim, Opaque)):
        return str(leaf.proto.op_type)
    return activation_name(leaf) or str(getattr(leaf, "op", "")) or type(leaf).__name__


def _label(value: Value) -> str:
    return {"any": "any operation", "act": "an activation", "norm": "a norm", "": "its input"}.get(value.op, value.op)


def _same(has: Any, wanted: Any) -> bool:
    if isinstance(has, (tuple, list)):
        return list(has) == (list(wanted) if isinstance(wanted, (tuple, list)) else [wanted] * len(has))
    return bool(has == wanted)
