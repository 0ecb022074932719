"""The verbatim leaf: an ONNX node kept as the file has it, computed by torch, so that gradients pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from onnx import NodeProto
from torch import Tensor, nn

from hantc.core.errors import HantcError, UnsupportedError
from hantc.dialect.leaf import Array, Leaf, OnnxNode, array, attributes, has_torch_type, tensor
from hantc.dialect.opaque import Opaque

Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Function:
    """How torch computes an operator: `compute(node, *inputs)`, the inputs as ONNX numbers them, None for one that is
    left out, gives a tensor, or a tuple where there are several outputs. `weights`: which inputs are trained where
    they are constants."""

    compute: Callable[..., Result]
    weights: tuple[int, ...] = ()


class Verbatim(Opaque):
    """One node, computed by a `Function` and emitted as it is. Where torch cannot compute it after all (a type that
    it lacks, a mode that the function does not know), ONNX Runtime does, and `reason` says why."""

    def __init__(
        self,
        node: NodeProto,
        names: tuple[str, ...],
        constants: Mapping[str, Array],
        opsets: Mapping[str, int],
        function: Function,
    ) -> None:
        super().__init__(node, names, constants, opsets, "")
        self.function = function
        opset = opsets.get(node.domain, 0) or opsets.get("", 0)
        self.view = OnnxNode(node.op_type, attributes(node), opset, tuple(node.input), outputs=tuple(node.output))
        self.fixed: dict[str, Any] = {}  # tensors, or arrays of types that torch lacks
        self.trained = nn.ParameterDict()
        self._as_of: tuple[tuple[int, int], ...] = ()
        for k, name in enumerate(node.input):
            if name not in constants or name in self.fixed:
                continue
            value = tensor(constants[name]) if has_torch_type(constants[name]) else constants[name]
            if isinstance(value, Tensor) and k in function.weights and value.is_floating_point():
                self.trained[str(k)] = nn.Parameter(value)
            else:
                self.fixed[name] = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Verbatim:
        made = Verbatim(self.proto, self.names, self.held(), self.opsets, self.function)
        made.reason = self.reason
        for mine, theirs in zip(made.parameters(), self.parameters(), strict=True):
            mine.requires_grad_(theirs.requires_grad)
        return made.train(self.training)

    @property
    def foreign(self) -> bool:
        """Whether ONNX Runtime had to step in."""
        return bool(self.reason)

    def held(self) -> dict[str, Array]:
        """The node's constants, the trained ones as they are now."""
        return self.constants | {self.proto.input[int(k)]: array(v) for k, v in self.trained.items()}

    def forward(self, *xs: Any) -> Any:
        """As the operator; a tuple of the outputs that the file names where there are several."""
        if self.reason:
            return self._by_onnxruntime(xs)
        try:
            return self._named(self.function.compute(self.view, *self._inputs(xs)))
        except (UnsupportedError, RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            why = f"torch cannot compute it: {error}".splitlines()[0]
        try:
            result = self._by_onnxruntime(xs)
        except HantcError as error:  # then it is the input's fault, and another may do
            raise HantcError(f"{error.message} ({why})", where=error.where) from error
        self.reason = why
        return result

    def _by_onnxruntime(self, xs: tuple[Any, ...]) -> Any:
        now = tuple((id(p), p._version) for p in self.parameters())
        if now != self._as_of:  # sessions hold the weights as they were
            self._sessions.clear()
            self.constants, self._as_of = self.held(), now
        return super().forward(*xs)

    def _inputs(self, xs: tuple[Any, ...]) -> list[Any]:
        given = dict(zip(self.names, xs, strict=True))
        held = {self.proto.input[int(k)]: v for k, v in self.trained.items()}
        known = self.fixed | held | given
        return [known[name] if name else None for name in self.proto.input]

    def _named(self, result: Result) -> Result:
        if isinstance(result, Tensor):
            return result
        kept = tuple(r for r, name in zip(result, self.proto.output, strict=False) if name)
        return kept[0] if len(kept) == 1 else kept

    def extra_repr(self) -> str:
        return f"{self.proto.op_type}" + (f": {self.reason}" if self.reason else "")


class _Live(Mapping[str, Array]):
    """The values of a node's inputs, by name, as arrays when asked for."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Array:
        return array(self._values[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def through_leaf(leaf: type[Leaf]) -> Function:
    """An operator that has a leaf of its own, for where its arguments (a shape, bounds, a weight) are known only when
    it runs: the leaf is made then. Weights that the leaf takes over as they are get gradients."""

    def compute(node: OnnxNode, *xs: Any) -> Result:
        values = {name: x for name, x in zip(node.inputs, xs, strict=True) if isinstance(x, Tensor)}
        shapes = {name: tuple(x.shape) for name, x in values.items()}
        now = OnnxNode(node.op, node.attrs, node.opset, node.inputs, _Live(values), shapes, node.outputs)
        made = leaf.parse(now)
        live = {name: xs[k] for name, k in leaf.live.items() if k < len(xs) and xs[k] is not None}
        args = tuple(xs[k] for k in made.data)
        if not live:
            result: Result = made(*args)
            return result
        result = torch.func.functional_call(made.eval(), live, args)
        return result

    return Function(compute, weights=tuple(leaf.live.values()))
