"""Activations that exporters write as several nodes, made one."""

from __future__ import annotations

import math

from torch import fx

from hantc.dialect.activation import Clip, HardSigmoid, HardSwish, Silu, Unary
from hantc.dialect.elementwise import Binary
from hantc.dialect.graph import leaf_of
from hantc.dialect.leaf import Leaf
from hantc.dialect.rewrites.base import Log, Outcome, calls, constant_operand, sole_user, source, swap


def _become(gm: fx.GraphModule, node: fx.Node, leaf: Leaf, x: fx.Node) -> None:
    """Let `node` compute `leaf` of `x`; what fed it dies if nothing else needs it."""
    swap(gm, node, leaf)
    node.args = (x,)
    gm.graph.eliminate_dead_code()


def _pairs(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The operands of a product, both ways round."""
    if len(node.args) != 2:
        return []
    left, right = node.args
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    return [(right, left), (left, right)]


def _gates(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(gate, x) of a product where `gate` is computed from x in one step."""
    return [(g, x) for g, x in _pairs(node) if g.op == "call_module" and g.all_input_nodes == [x]]


def _products(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node, binary in calls(gm, Binary) if binary.op == "Mul"]


class FuseSilu:
    """x·σ(x) → Silu."""

    name = "fuse_silu"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Fuse every product of a value and its own sigmoid."""
        log = Log(self.name)
        for node in _products(gm):
            for gate, x in _gates(node):
                leaf = leaf_of(gm, gate)
                if not isinstance(leaf, Unary) or leaf.op != "Sigmoid":
                    continue
                if sole_user(gate) is None:
                    log.miss(f"{gate.name} is used elsewhere too", node)
                    break
                log.did(f"with {gate.name} became Silu", node, gate)
                _become(gm, node, Silu(), x)
                break
        return log.finish(gm)


def _scaled_by_sixth(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """u of u/6 or u·(1/6)."""
    leaf, operand = leaf_of(gm, node), constant_operand(gm, node)
    if not isinstance(leaf, Binary) or operand is None:
        return None
    value, c, is_right = operand
    if c.numel() != 1:
        return None
    exact = 1 / 6 if c.element_size() > 2 else c.new_tensor(1 / 6).item()
    divided = leaf.op == "Div" and is_right and c.item() == 6
    return value if divided or (leaf.op == "Mul" and math.isclose(c.item(), exact, rel_tol=1e-6)) else None


def _clipped(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, inner node) of clip(x + 3, 0, 6)."""
    leaf = leaf_of(gm, node)
    if not isinstance(leaf, Clip) or (leaf.low, leaf.high) != (0, 6):
        return None
    inner = source(node)
    add, operand = leaf_of(gm, inner), constant_operand(gm, inner)
    if not isinstance(add, Binary) or add.op != "Add" or operand is None:
        return None
    x, c, _ = operand
    return (x, inner) if c.numel() == 1 and c.item() == 3 else None


class FuseHardSwish:
    """x·HardSigmoid(x), x·clip(x + 3, 0, 6)/6 → HardSwish; clip(x + 3, 0, 6)/6 → HardSigmoid."""

    name = "fuse_hardswish"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Fuse every such group of nodes."""
        log = Log(self.name)
        for node, _ in calls(gm, Binary):
            if not node._erased:
                self._sixth(gm, log, node)
        for node in _products(gm):
            if not node._erased:
                self._gate(gm, log, node)
        return log.finish(gm)

    def _sixth(self, gm: fx.GraphModule, log: Log, node: fx.Node) -> None:
        inner = _scaled_by_sixth(gm, node)
        if inner is None:
            return
        found = _clipped(gm, inner)
        if found is not None:
            x, add = found
            if sole_user(inner) is None or sole_user(add) is None:
                log.miss(f"{inner.name} or {add.name} is used elsewhere too", node)
                return
            log.did(f"with {inner.name} and {add.name} became HardSigmoid", node, inner, add)
            _become(gm, node, HardSigmoid(), x)
            return
        product = leaf_of(gm, inner)
        if not isinstance(product, Binary) or product.op != "Mul":
            return
        for clip, x in _pairs(inner):
            found = _clipped(gm, clip)
            if found is None or found[0] is not x:
                continue
            if any(sole_user(n) is None for n in (inner, clip, found[1])):
                log.miss("a value inside it is used elsewhere too", node, inner, clip)
                return
            log.did("became HardSwish", node, inner, clip, found[1])
            _become(gm, node, HardSwish(), x)
            return

    def _gate(self, gm: fx.GraphModule, log: Log, node: fx.Node) -> None:
        for gate, x in _gates(node):
            leaf = leaf_of(gm, gate)
            if not isinstance(leaf, HardSigmoid):
                continue
            if not math.isclose(leaf.alpha, 1 / 6, rel_tol=1e-6) or leaf.beta != 0.5:
                log.miss(f"its HardSigmoid is clip({leaf.alpha:.4g}·x + {leaf.beta:.4g}), not clip(x/6 + 1/2)", node)
            elif sole_user(gate) is None:
                log.miss(f"{gate.name} is used elsewhere too", node)
            else:
                log.did(f"with {gate.name} became HardSwish", node, gate)
                _become(gm, node, HardSwish(), x)
            return


class ClipToRelu:
    """Clip(0, ∞) → Relu."""

    name = "clip_to_relu"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Rename every Clip that is a Relu."""
        log = Log(self.name)
        for node, clip in calls(gm, Clip):
            if clip.low == 0 and clip.high == math.inf:
                swap(gm, node, Unary("Relu"))
                log.did("became Relu", node)
        return log.finish(gm)
