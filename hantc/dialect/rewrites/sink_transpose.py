"""Transposes of channels-last exports, moved past what does not mind until they meet their inverse."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from hantc.dialect.activation import Clip, HardSigmoid, HardSwish, LeakyRelu, Silu, Softmax, Unary
from hantc.dialect.elementwise import Binary
from hantc.dialect.graph import leaf_of
from hantc.dialect.leaf import Leaf
from hantc.dialect.pool import Reduce
from hantc.dialect.rewrites.base import Log, Outcome, calls, constant, shared, source, swap
from hantc.dialect.shape import Concat, Pad, Slice, Transpose

_POINTWISE = (Unary, Silu, HardSwish, HardSigmoid, LeakyRelu, Clip, Binary)
_ALONG = (Concat, Pad, Reduce, Softmax, Slice)  # which know axes
_MOVABLE = (*_POINTWISE, *_ALONG)
_SOFTMAX = 13  # the first opset whose Softmax is over one dim
Perm = tuple[int, ...]


class SinkTranspose:
    """Transpose → activation, sum, concatenation, padding, reduction, cut → its inverse: the Transpose moves down, and
    both cancel. A reduction that drops what lay in another order ends it by itself.

    As graphs look that were channels-last (TensorFlow's): between two convolutions everything is computed with the
    channels at the end. Engines cannot keep their own layout across such pairs."""

    name = "sink_transpose"

    def apply(self, gm: fx.GraphModule) -> Outcome:
        """Move every Transpose that an inverse waits for one step; normalizing repeats until they have met."""
        log = Log(self.name)
        for node, leaf in calls(gm, nn.Module):
            if not isinstance(leaf, _MOVABLE):
                continue
            above = [(n, t) for n in node.all_input_nodes if isinstance(t := leaf_of(gm, n), Transpose)]
            if not above:
                continue
            perm = above[0][1].perm
            if not (_ends_it(leaf, perm) or _awaited(gm, node, perm)):
                continue
            if reason := _why_not(gm, node, leaf, perm):
                log.miss(reason, above[0][0], node)
                continue
            log.did(f"moved below {node.name}", *(n for n, _ in above))
            _sink(gm, node, leaf, perm)
        return log.finish(gm)


def _inverse(perm: Perm) -> Perm:
    return tuple(perm.index(i) for i in range(len(perm)))


def _ends_it(leaf: nn.Module | None, perm: Perm) -> bool:
    """Whether a reduction leaves nothing behind that a Transpose had put into another order."""
    if not isinstance(leaf, Reduce) or leaf.keepdims:
        return False
    reduced = {axis % len(perm) for axis in leaf.axes}
    kept = [p for i, p in enumerate(perm) if i not in reduced]
    return kept == sorted(kept)


def _awaited(gm: fx.GraphModule, node: fx.Node, perm: Perm) -> bool:
    """Whether something that undoes a Transpose lies below `node`, behind nothing but what Transposes can move past."""
    queue, seen = [node], {node}
    while queue:
        for user in queue.pop().users:
            leaf = leaf_of(gm, user)
            if _undoes(gm, user, perm) or _ends_it(leaf, perm):
                return True
            if (
                isinstance(leaf, _MOVABLE)
                and _same_rank(leaf)
                and user not in seen
                and all(_open(gm, n, seen) for n in user.all_input_nodes)
            ):
                seen.add(user)
                queue.append(user)
    return False


def _same_rank(leaf: nn.Module) -> bool:
    return not isinstance(leaf, Reduce) or leaf.keepdims


def _open(gm: fx.GraphModule, operand: fx.Node, seen: set[fx.Node]) -> bool:
    """Whether an operand lets a Transpose of the others pass: it is one of them, transposed itself, or constant."""
    return operand in seen or operand.op == "get_attr" or isinstance(leaf_of(gm, operand), Transpose)


def _why_not(gm: fx.GraphModule, node: fx.Node, leaf: nn.Module, perm: Perm) -> str:
    if shared(gm, node):
        return "its module is used elsewhere too"
    if not (_same_rank(leaf) or _ends_it(leaf, perm)):
        return "what it leaves would have to be transposed otherwise"
    if isinstance(leaf, Softmax) and gm.meta["info"].opset < _SOFTMAX and perm[leaf.axis] != len(perm) - 1:
        return "before opset 13 there is no softmax over an inner dim alone"
    if isinstance(leaf, Pad) and leaf.mode != "constant":
        return f"it pads with {leaf.mode}, which is for the last dims alone"
    for operand in node.all_input_nodes:
        above, value = leaf_of(gm, operand), constant(gm, operand)
        if isinstance(above, Transpose):
            if above.perm != perm:
                return "its operands are transposed in different ways"
            if any(u is not node and not _goes_too(gm, u, perm) for u in operand.users):
                return f"the value of {operand.name} is used elsewhere too"
        elif value is None or isinstance(leaf, Concat):
            return f"{operand.name} is not transposed"
        elif value.dim() > len(perm):
            return f"the constant {operand.name} has more dims"
    return ""


def _goes_too(gm: fx.GraphModule, user: fx.Node, perm: Perm) -> bool:
    """Whether a Transpose need not stay for `user`."""
    leaf = leaf_of(gm, user)
    return _undoes(gm, user, perm) or (
        isinstance(leaf, _MOVABLE) and (_ends_it(leaf, perm) or (_same_rank(leaf) and _awaited(gm, user, perm)))
    )


def _undoes(gm: fx.GraphModule, user: fx.Node, perm: Perm) -> bool:
    leaf = leaf_of(gm, user)
    return isinstance(leaf, Transpose) and leaf.perm == _inverse(perm)


def _sink(gm: fx.GraphModule, node: fx.Node, leaf: nn.Module, perm: Perm) -> None:
    """op(Transpose(x), …) → Transpose(op(x, …))."""
    new: dict[fx.Node, fx.Node] = {}
    for operand in node.all_input_nodes:
        if isinstance(leaf_of(gm, operand), Transpose):
            new[operand] = source(operand)
        else:
            value = constant(gm, operand)
            assert value is not None
            new[operand] = _held(gm, operand, _untransposed(value, perm)) if value.numel() > 1 else operand
    for old, operand in new.items():
        node.replace_input_with(old, operand)
        if not old.users:
            gm.graph.erase_node(old)
    if isinstance(leaf, _ALONG):
        swap(gm, node, _turned(leaf, perm, len(node.args)))
    if _ends_it(leaf, perm):
        return
    name = _free(gm, f"{node.name}_transposed")
    gm.add_submodule(name, Transpose(perm).train(gm.training))
    with gm.graph.inserting_after(node):
        below = gm.graph.create_node("call_module", name, (node,), name=name)
    node.replace_all_uses_with(below, delete_user_cb=lambda user: user is not below)


def _untransposed(value: Tensor, perm: Perm) -> Tensor:
    """The constant that does to a value what `value` does to the transposed one."""
    full = value.reshape((1,) * (len(perm) - value.dim()) + tuple(value.shape))
    return full.permute(_inverse(perm)).contiguous()


def _turned(leaf: Leaf, perm: Perm, operands: int) -> Leaf:
    """What does to a value what `leaf` does to the transposed one."""
    if isinstance(leaf, Concat):
        return Concat(perm[leaf.axis], operands)
    if isinstance(leaf, Reduce):
        return Reduce(leaf.op, [perm[a] for a in leaf.axes], leaf.keepdims)
    if isinstance(leaf, Softmax):
        return Softmax(perm[leaf.axis], len(perm))
    if isinstance(leaf, Slice):
        return Slice(leaf.starts, leaf.ends, [perm[a] for a in leaf.axes], leaf.steps)
    assert isinstance(leaf, Pad)
    return _padded(leaf, perm)


def _padded(pad: Pad, perm: Perm) -> Pad:
    n, back = len(perm), _inverse(perm)
    ends: Sequence[int] = [*(pad.pads[back[i]] for i in range(n)), *(pad.pads[n + back[i]] for i in range(n))]
    made = Pad(ends, pad.mode, pad.value)
    made.dtype = pad.dtype
    return made


def _held(gm: fx.GraphModule, beside: fx.Node, value: Tensor) -> fx.Node:
    """A constant of the graph, made where `beside` stands."""
    name = _free(gm, f"{beside.name}_transposed")
    gm.register_buffer(name, torch.as_tensor(value))
    with gm.graph.inserting_after(beside):
        return gm.graph.get_attr(name)


def _free(gm: fx.GraphModule, stem: str) -> str:
    taken = {n.name for n in gm.graph.nodes}
    return next(t for i in itertools.count() if not hasattr(gm, t := f"{stem}{i or ''}") and t not in taken)
