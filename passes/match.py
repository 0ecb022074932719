"""Match: normalized teacher -> regions that can be replaced, and reasons for the rest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from torch import fx, nn

from hantc.core.errors import UsageError
from hantc.core.types import MatchResult, Region, Rejection
from hantc.dialect.activation import activation_name
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Binary
from hantc.dialect.examples import example_inputs
from hantc.dialect.graph import count_macs, leaf_of, shapes_of
from hantc.dialect.linear import Linear, MatMul
from hantc.dialect.norm import BatchNorm
from hantc.dialect.pattern import Pattern, find, installed
from hantc.dialect.pool import GlobalPool, Pool
from hantc.dialect.shape import Concat
from hantc.dialect.verbatim import Verbatim
from hantc.passes.asked import asked_for
from hantc.passes.elements import SINK, Element, inner_lines, main_line
from hantc.passes.state import Context, State

_DEEP = 20  # atoms
_LARGE = 12  # convolutions, or twice as many products with attention among them: what has more is looked into
_WHOLE = ("", "dense_layer")  # kinds that are not
_TAILS = frozenset(  # activations and norms that have no leaf of their own
    {"Gelu", "Mish", "Elu", "Celu", "Selu", "PRelu", "ThresholdedRelu", "Swish",
     "InstanceNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization", "LRN"}
)  # fmt: skip
_BATCH = 2  # shapes are inferred at this batch, so that a dim that follows the batch shows


class Matcher:
    """Finds regions of one graph with dominators and post-dominators."""

    def __init__(
        self,
        module: fx.GraphModule,
        *,
        max_span: int | None = None,
        named: Sequence[str] = (),
        patterns: Sequence[Pattern] = (),
        nested: bool = True,
    ) -> None:
        self.nested = nested
        self.module, self.max_span, self.named, self.patterns = module, max_span, named, patterns
        self.shapes = shapes_of(module, example_inputs(module.meta["info"], _BATCH))
        self.order = {n.name: i for i, n in enumerate(module.graph.nodes)}
        self.nodes = {n.name: n for n in module.graph.nodes}
        self.rejections: list[Rejection] = []
        self.misses: list[Rejection] = []  # what nearly was a region of some kind, and is one of another or none
        self.asked: set[str] = set()  # last nodes of the regions of `named`

    # -- structure -----------------------------------------------------------------------------------------
    def elements(self) -> list[Element]:
        """The main line."""
        return main_line(self.module, self.shapes)

    def inside(self, kind: str, es: list[Element]) -> list[tuple[str, list[Element]]]:
        """The blocks within a block that is too large for one operation to stand in for, or that leads to several
        outputs; none of others."""
        last = es[-1].exit == SINK
        if not self.nested:
            return []
        size = self._count(es, (Conv, Linear, MatMul)) / 2 if kind == "attention" else self._count(es, (Conv,))
        if not last and (kind in _WHOLE or (size <= _LARGE and kind != "dense_block")):
            return []
        found: list[tuple[str, list[Element]]] = []
        for e in es:
            for line in inner_lines(self.module, e, self.shapes) if not e.simple else []:
                layer = kind == "dense_block" and self._count(line, (Conv,)) > 1
                for inner, part in [("dense_layer", line)] if layer else self.group(line, seen_conv=True):
                    found += self.inside(inner, part) or [(inner, part)]
        judged = self._judged()  # nothing would tell what a change does to the other outputs
        kept = [(k, part) for k, part in found if k and part[-1].exit in judged and self._fits(k, part)]
        return kept if last or sum(self._count(part, (Conv, Linear, MatMul)) > 1 for _, part in kept) > 1 else []

    def _fits(self, kind: str, es: list[Element]) -> bool:
        return isinstance(self.region(kind, es, "", ()), Region)

    def _judged(self) -> set[str]:
        """What the first output depends on."""
        last = next(n for n in self.module.graph.nodes if n.op == "output")
        seen: set[str] = set()
        stack = last.all_input_nodes[:1]
        while stack:
            node = stack.pop()
            if node.name not in seen:
                seen.add(node.name)
                stack += node.all_input_nodes
        return seen

    def _count(self, es: list[Element], kinds: tuple[type[nn.Module], ...]) -> int:
        return sum(isinstance(m, kinds) for e in es for m in self.leaves(e.nodes))

    def leaf(self, name: str) -> nn.Module | None:
        return leaf_of(self.module, self.nodes[name]) if name in self.nodes else None  # None: source or sink

    def leaves(self, names: Sequence[str]) -> list[nn.Module]:
        return [m for m in (self.leaf(n) for n in names) if m is not None]

    # -- classification ------------------------------------------------------------------------------------
    def _is_conv(self, e: Element) -> bool:
        return e.simple and isinstance(self.leaf(e.exit), Conv)

    def _conv(self, e: Element) -> Conv | None:
        leaf = self.leaf(e.exit) if e.simple else None
        return leaf if isinstance(leaf, Conv) else None

    def _is_tail(self, e: Element) -> bool:
        """Norms and activations belong to the operation before them."""
        if not e.simple:
            return False
        leaf = self.leaf(e.exit)
        if isinstance(leaf, Verbatim):
            return leaf.proto.op_type in _TAILS
        return isinstance(leaf, BatchNorm) or bool(activation_name(leaf))

    def _is_gate(self, e: Element) -> bool:
        """Squeeze-and-excite: x times something pooled from x."""
        if e.simple:
            return False
        join = self.leaf(e.exit)
        return (
            isinstance(join, Binary)
            and join.op == "Mul"
            and any(isinstance(m, GlobalPool) or type(m).__name__ == "Reduce" for m in self.leaves(e.nodes))
        )

    def _skip_tail(self, es: list[Element], i: int) -> int:
        while i < len(es) and self._is_tail(es[i]):
            i += 1
        return i

    def _inverted(self, es: list[Element], i: int) -> int:
        """End (exclusive) of [1×1] depthwise [gate] 1×1 beginning at i; i if there is none."""
        first = self._conv(es[i])
        if first is None:
            return i
        j = i
        if first.groups == 1 and set(first.kernel) == {1} and set(first.stride) == {1}:
            j = self._skip_tail(es, i + 1)
        depthwise = self._conv(es[j]) if j < len(es) else None
        if depthwise is None or depthwise.groups == 1 or depthwise.groups != depthwise.weight.shape[0]:
            return i
        j = self._skip_tail(es, j + 1)
        if j < len(es) and self._is_gate(es[j]):
            j = self._skip_tail(es, j + 1)
        project = self._conv(es[j]) if j < len(es) else None
        if project is None or project.groups != 1 or set(project.kernel) != {1}:
            what = "several paths" if j < len(es) and not es[j].simple else es[j].exit if j < len(es) else "the end"
            where = next(e.exit for e in es[i:] if self._conv(e) is depthwise)
            self._miss("inverted_residual", where, f"it wants a 1×1 convolution behind the depthwise one, finds {what}")
            return i
        return self._skip_tail(es, j + 1)

    def _composite_kind(self, e: Element) -> str:
        leaves = self.leaves(e.nodes)
        join = leaves[-1] if leaves else None
        if any(isinstance(m, MatMul) for m in leaves) and any(type(m).__name__ == "Softmax" for m in leaves):
            return "attention"
        if isinstance(join, Concat):
            entry = self.nodes.get(e.entry, None)
            joined = self.nodes[e.exit].all_input_nodes
            if entry not in joined:
                return "plain_conv"
            # exporters write a whole block as one concatenation of its input and all its layers
            return "dense_layer" if len(joined) == 2 else "dense_block"
        if any(isinstance(m, Conv) and m.groups > 1 and m.groups == m.weight.shape[0] for m in leaves):
            return "inverted_residual"
        return "residual"

    def blocks(self, es: list[Element]) -> list[tuple[str, list[Element]]]:
        """`group`, but for the regions that were asked for, by name or by a pattern, which stay as they are."""
        asked = asked_for(self.named, self.module, [(e.entry, e.exit) for e in es])
        ranges = self._patterned(es, [(begin, end, "") for begin, end in asked])
        found: list[tuple[str, list[Element]]] = []
        at, self.asked = 0, {es[end - 1].exit for _, end in asked}
        for begin, end, kind in ranges:
            whole = Element(es[begin].entry, es[end - 1].exit, tuple(n for e in es[begin:end] for n in e.nodes))
            kind = kind or self._composite_kind(whole)
            found += [*self.group(es[at:begin], self._has_conv(es[:at])), (kind, es[begin:end])]
            at = end
        return found + self.group(es[at:], self._has_conv(es[:at]))

    def _patterned(self, es: list[Element], taken: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
        """What is `taken`, and where the patterns fit besides, in order."""
        begins, ends = {e.entry: i for i, e in enumerate(es)}, {e.exit: i + 1 for i, e in enumerate(es)}
        for p in self.patterns:
            found, misses = find(p, self.module)
            for m in misses:
                self._miss(p.name, m.exit, f"{m.matched} of {m.total} operations fit; {m.reason}")
            for f in found:
                begin, end = begins.get(f.entry, -1), ends.get(f.exit, -1)
                loose = [n for n, place in ((f.entry, begin), (f.exit, end)) if place < 0]
                if loose:
                    self._miss(p.name, f.exit, f"it fits, but not every path from input to output passes {loose[0]}")
                elif any(begin < e and b < end for b, e, _ in taken):
                    self._miss(p.name, f.exit, "it fits, but overlaps with what was asked for or found before")
                else:
                    taken.append((begin, end, p.kind))
        return sorted(taken)

    def _miss(self, what: str, where: str, why: str) -> None:
        self.misses.append(Rejection(f"{what} at {where}", why, (where,)))

    def _has_conv(self, es: list[Element]) -> bool:
        return any(isinstance(m, Conv) for e in es for m in self.leaves(e.nodes))

    def group(self, es: list[Element], seen_conv: bool = False) -> list[tuple[str, list[Element]]]:
        """Elements → (kind, elements) blocks in order; kind "" for what is no region. `seen_conv`: whether there is
        a convolution before them."""
        blocks: list[tuple[str, list[Element]]] = []
        i = 0
        while i < len(es):
            e = es[i]
            has_product = any(isinstance(m, (Conv, Linear, MatMul)) for m in self.leaves(e.nodes))
            end, kind = i + 1, ""
            if not e.simple and has_product and e.exit != SINK:
                kind, end = self._composite_kind(e), self._skip_tail(es, i + 1)
            elif self._is_conv(e):
                end, kind = self._inverted(es, i), "inverted_residual"
                if end == i:
                    end, kind = self._skip_tail(es, i + 1), "plain_conv" if seen_conv else "stem"
                    conv = self._conv(e)
                    if not seen_conv and end < len(es) and es[end].simple and isinstance(self.leaf(es[end].exit), Pool):
                        end += 1  # a stem's pooling goes with it
                    elif seen_conv and conv is not None and max(conv.stride) > 1:
                        kind = "downsample"
            seen_conv = seen_conv or self._has_conv([e])
            blocks.append((kind, es[i:end]))
            i = end
        return blocks

    # -- regions -------------------------------------------------------------------------------------------
    def _reject(self, es: list[Element], reason: str) -> None:
        names = tuple(n for e in es for n in e.nodes)
        if names:
            self.rejections.append(
                Rejection(names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}", reason, names)
            )

    def _why_not(self, es: list[Element]) -> str:
        leaves = self.leaves([n for e in es for n in e.nodes])
        if es[-1].exit == SINK:
            return "feeds the graph's outputs by several paths, so it has no single exit (the first output is judged)"
        if any(isinstance(m, Linear) for m in leaves):
            return "matrix product outside a block (head): no candidate family for it"
        return "no convolution or matrix product: nothing to gain"

    def region(self, kind: str, es: list[Element], name: str, atoms: tuple[int, ...]) -> Region | str:
        """The region made of `es`, or the reason why it cannot be one."""
        entry, exit_ = es[0].entry, es[-1].exit
        nodes = tuple(n for e in es for n in e.nodes)
        if entry not in self.shapes or exit_ not in self.shapes:
            return "its input or output is not a tensor"
        a, b = self.shapes[entry], self.shapes[exit_]
        if len(a) < 2 or len(b) < 2 or a[0] != b[0] or a[0] != self.shapes[self.first_input()][0]:
            return f"the batch is not the first dim of its input {a} or output {b}"
        params = sum(p.numel() for m in self.leaves(nodes) for p in m.parameters())
        return Region(
            name=name,
            kind=kind,
            input=entry,
            output=exit_,
            nodes=nodes,
            in_shape=a[1:],
            out_shape=b[1:],
            macs=count_macs(self.module, self.shapes, set(nodes)),
            params=params,
            atoms=atoms,
            final_act=activation_name(self.leaf(exit_)),
        )

    def first_input(self) -> str:
        name: str = next(n.name for n in self.module.graph.nodes if n.op == "placeholder")
        return name

    def match(self) -> MatchResult:
        """All regions: atoms in order, then what joins neighbouring atoms."""
        atoms: list[tuple[Region, list[Element]]] = []
        wholes: list[Region] = []
        for kind, es in self.blocks(self.elements()):
            asked = es[-1].exit in self.asked
            begin, inner = len(atoms), [] if asked else self.inside(kind, es)
            for k, part in inner or [(kind, es)]:
                made = self.region(k, part, f"r{len(atoms):02d}", (len(atoms),)) if k else self._why_not(part)
                if isinstance(made, Region):
                    atoms.append((made, part))
                elif asked:
                    raise UsageError(f"cannot be a region: {made}", where=f"--region ...:{es[-1].exit}")
                else:
                    self._reject(part, made)
            if not inner:
                continue
            whole = self.region(kind, es, f"r{begin:02d}_r{len(atoms) - 1:02d}_whole", tuple(range(begin, len(atoms))))
            if kind and isinstance(whole, Region):
                wholes.append(whole)
            else:
                taken = {n for _, part in inner for e in part for n in e.nodes}
                rest = tuple(n for e in es for n in e.nodes if n not in taken)
                self._reject([Element(es[0].entry, SINK, rest)], self._why_not(es))
        joined = (
            self._dense_blocks(atoms) + self._spans(atoms, self.max_span or (2 if len(atoms) > _DEEP else 3)) + wholes
        )
        regions = [self._with_parent(r, joined) for r, _ in atoms] + joined
        misses = tuple({m.where: m for m in self.misses}.values())
        return MatchResult(tuple(regions), tuple(self._merged()), len(atoms), misses)

    def _with_parent(self, region: Region, joined: list[Region]) -> Region:
        holders = [j for j in joined if set(region.atoms) < set(j.atoms)]
        return replace(region, parent=max(holders, key=lambda j: len(j.atoms)).name) if holders else region

    def _join(self, kind: str, run: list[tuple[Region, list[Element]]]) -> Region | None:
        es = [e for _, part in run for e in part]
        name = f"{run[0][0].name}_{run[-1][0].name}"
        made = self.region(kind, es, name, tuple(i for r, _ in run for i in r.atoms))
        return None if isinstance(made, str) else made

    def _adjacent(self, a: Region, b: Region) -> bool:
        """Whether `b` alone reads what `a` gives."""
        return a.output == b.input and {u.name for u in self.nodes[a.output].users} <= set(b.nodes)

    def _dense_blocks(self, atoms: list[tuple[Region, list[Element]]]) -> list[Region]:
        found: list[Region | None] = []
        run: list[tuple[Region, list[Element]]] = []
        for item in [*atoms, None]:
            if item is not None and item[0].kind == "dense_layer" and (not run or self._adjacent(run[-1][0], item[0])):
                run.append(item)
                continue
            if len(run) > 1:
                found.append(self._join("dense_block", run))
            run = [item] if item is not None and item[0].kind == "dense_layer" else []
        return [r for r in found if r is not None]

    def _spans(self, atoms: list[tuple[Region, list[Element]]], longest: int) -> list[Region]:
        spannable = {"residual", "inverted_residual", "plain_conv", "downsample"}
        found = []
        for length in range(2, longest + 1):
            for i in range(len(atoms) - length + 1):
                run = atoms[i : i + length]
                regions = [r for r, _ in run]
                adjacent = all(self._adjacent(a, b) for a, b in itertools.pairwise(regions))
                if not adjacent or any(r.kind not in spannable or r.output in self.asked for r in regions):
                    continue
                spatial = len(regions[0].in_shape) == 3 and len(regions[-1].out_shape) == 3
                if spatial and regions[0].in_shape[1] <= 2 * regions[-1].out_shape[1]:
                    found.append(self._join("span", run))
        return [r for r in found if r is not None]

    def _merged(self) -> list[Rejection]:
        """Neighbouring rejections with one reason become one."""
        merged: list[Rejection] = []
        for r in self.rejections:
            if merged and merged[-1].reason == r.reason:
                nodes = merged[-1].nodes + r.nodes
                merged[-1] = Rejection(f"{nodes[0]} … {nodes[-1]}", r.reason, nodes)
            else:
                merged.append(r)
        return merged


def match_regions(
    module: fx.GraphModule,
    *,
    max_span: int | None = None,
    named: Sequence[str] = (),
    patterns: Sequence[Pattern] = (),
    nested: bool = True,
) -> MatchResult:
    """Regions of a graph module of leaves (DESIGN §5); spans join up to `max_span` neighbouring blocks (by
    default three, in deep networks two: their pairs alone double the candidates). `named`: regions that are wanted
    just so, as "FROM:TO" (see `asked_for`, which also raises UsageError); `patterns`: where they fit, and nothing of
    `named` is in the way, is a region. Without `nested` parts with several paths are not looked into."""
    return Matcher(module, max_span=max_span, named=named, patterns=patterns, nested=nested).match()


class Match:
    """Normalized teacher -> regions, nested, with kinds, and reasons for what is no region."""

    name: ClassVar[str] = "match"
    requires: ClassVar[tuple[str, ...]] = ("network",)
    ensures: ClassVar[tuple[str, ...]] = ("match",)

    def call(self, state: State, ctx: Context) -> State:
        """Find the regions of the normalized network."""
        assert state.network is not None
        # beside a block in one of several paths more is alive than it knows of
        nested = ctx.config.budget_memory is None
        found = match_regions(state.network, named=ctx.config.region, patterns=installed(), nested=nested)
        ctx.reporter.event("match", regions=len(found.regions), atoms=found.n_atoms, rejected=len(found.rejections))
        return replace(state, match=found)
