"""The structure that regions are made of: parts of a graph between two values that everything in between passes.

The main line is a chain of them; a part of it with several paths inside holds chains of its own (the program structure
tree of Johnson, Pearson, Pingali, "The Program Structure Tree", PLDI 1994, on values instead of jumps).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx

SOURCE, SINK = "<source>", "<sink>"


@dataclass(frozen=True)
class Element:
    """A part of the graph: what lies strictly between the values `entry` and `exit`, and `exit`."""

    entry: str
    exit: str
    nodes: tuple[str, ...]

    @property
    def simple(self) -> bool:
        return self.nodes == (self.exit,)  # what leads to the sink has no leaf at its exit


def flow(module: fx.GraphModule) -> Any:
    """Data flow from a virtual source (the inputs) to a virtual sink (the outputs), an `nx.DiGraph`."""
    g: Any = nx.DiGraph()
    g.add_nodes_from((SOURCE, SINK))
    for node in module.graph.nodes:
        if node.op == "placeholder":
            g.add_edge(SOURCE, node.name)
        for source in node.all_input_nodes:
            g.add_edge(source.name, SINK if node.op == "output" else node.name)
    live = nx.descendants(g, SOURCE) & nx.ancestors(g, SINK)
    return g.subgraph(live | {SOURCE, SINK})


def main_line(module: fx.GraphModule, tensors: Collection[str]) -> list[Element]:
    """The parts between the values that every path from input to output passes; `tensors`: names of nodes that give
    one (what gives several goes with what follows it)."""
    g = flow(module)
    order = {n.name: i for i, n in enumerate(module.graph.nodes)}
    inputs = {n.name for n in module.graph.nodes if n.op == "placeholder"}
    dominator = nx.immediate_dominators(g.reverse(copy=False), SINK)
    if SOURCE not in dominator:
        return []  # no output depends on an input
    chain = [SOURCE]
    while chain[-1] != SINK:
        after = dominator[chain[-1]]
        while after != SINK and after not in tensors:
            after = dominator[after]
        chain.append(after)
    found = []
    for entry, exit_ in itertools.pairwise(chain):
        inside = _between(g, entry, exit_)
        names = tuple(sorted(inside - {SINK}, key=order.__getitem__))
        if entry == SOURCE and names and names[-1] in inputs:
            continue
        found.append(Element(entry, exit_, names))
    return found


def _between(g: Any, entry: str, exit_: str) -> set[str]:
    """`exit_`, and what lies between it and `entry`, which every path to it passes: so nothing else needs a look, and
    a long graph takes no longer than its parts."""
    found, stack = {exit_}, [exit_]
    while stack:
        for node in g.predecessors(stack.pop()):
            if node != entry and node not in found:
                found.add(node)
                stack.append(node)
    return found


def inner_lines(module: fx.GraphModule, whole: Element, tensors: Collection[str]) -> list[list[Element]]:
    """The chains inside a part with several paths, in the graph's order: of the parts within it those that lie in no
    other, each followed by the one that alone reads it."""
    order = {n.name: i for i, n in enumerate(module.graph.nodes)}
    g = flow(module).subgraph({whole.entry, *whole.nodes, whole.exit})
    before, after = nx.immediate_dominators(g, whole.entry), nx.immediate_dominators(g.reverse(), whole.exit)
    parts = [p for exit_ in whole.nodes if (p := _part(g, exit_, before, after, tensors, order))]
    taken: set[str] = set()
    found: list[Element] = []
    for part in sorted(parts, key=lambda p: (-len(p.nodes), order[p.exit])):
        if part.nodes != whole.nodes and taken.isdisjoint(part.nodes):
            taken.update(part.nodes)
            found.append(part)
    return _chains(sorted(found, key=lambda p: order[p.exit]), after)


def _part(
    g: Any,
    exit_: str,
    before: Mapping[str, str | None],
    after: Mapping[str, str | None],
    tensors: Collection[str],
    order: Mapping[str, int],
) -> Element | None:
    """The smallest part that ends in `exit_`; None if something in it is read from outside."""
    entry = before.get(exit_)
    while entry is not None and entry not in tensors:
        entry = before.get(entry) if before.get(entry) != entry else None
    if entry is None or entry == exit_ or exit_ not in tensors:
        return None
    inside = _between(g, entry, exit_)
    if any(not _passes(n, exit_, after) for n in inside):
        return None
    return Element(entry, exit_, tuple(sorted(inside, key=order.__getitem__)))


def _passes(node: str, through: str, after: Mapping[str, str | None]) -> bool:
    """Whether every path onwards from `node` passes `through`."""
    at: str | None = node
    while at is not None and at != through:
        at = after.get(at) if after.get(at) != at else None
    return at == through


def _chains(parts: Sequence[Element], after: Mapping[str, str | None]) -> list[list[Element]]:
    """Parts in rows: one stands behind another if it alone reads what that one gives."""
    rows: list[list[Element]] = []
    for part in parts:
        row = next((r for r in rows if r[-1].exit == part.entry and _passes(part.entry, part.exit, after)), None)
        if row is None:
            rows.append([part])
        else:
            row.append(part)
    return rows
