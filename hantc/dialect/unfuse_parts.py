"""What the rules that take a fused node apart look at and write down."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from hantc.dialect.leaf import attributes

_FLOATS: Mapping[int, Any] = MappingProxyType(
    {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.DOUBLE: np.float64}
)


@dataclass(frozen=True)
class Known:
    """Of a graph: its tensors' ranks, last dims and element types where they are known, and every name in it."""

    opset: int
    ranks: Mapping[str, int]
    widths: Mapping[str, int]
    types: Mapping[str, int]
    names: set[str]

    def fresh(self, stem: str) -> str:
        """A name that nothing has yet."""
        name = next(n for i in itertools.count() if (n := f"{stem}_{i}") not in self.names)
        self.names.add(name)
        return name


@dataclass
class Parts:
    """What one fused node becomes."""

    node: NodeProto
    graph: Known
    made: list[NodeProto] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)

    @property
    def attrs(self) -> Mapping[str, Any]:
        return attributes(self.node)

    def input(self, i: int) -> str:
        return self.node.input[i] if i < len(self.node.input) else ""

    @property
    def opset(self) -> int:
        return self.graph.opset

    def rank(self, i: int) -> int:
        """Of an input; 0 where it is not known."""
        return self.graph.ranks.get(self.input(i), 0)

    def width(self, i: int) -> int:
        """Of an input's last dim. ValueError where it is not known."""
        if self.input(i) not in self.graph.widths:
            raise ValueError("its width is not known")
        return self.graph.widths[self.input(i)]

    def add(self, op: str, *inputs: str, **attrs: Any) -> str:
        """A node of one output, by whose name it returns."""
        return self.several(op, 1, *inputs, **attrs)[0]

    def several(self, op: str, count: int, *inputs: str, **attrs: Any) -> list[str]:
        """A node of so many outputs, by whose names it returns."""
        names = [self.graph.fresh(f"{self.node.output[0]}/{op}") for _ in range(count)]
        self.made.append(helper.make_node(op, list(inputs), names, name=names[0], **attrs))
        return names

    def number(self, value: float) -> str:
        """A constant of the type that the node computes in. ValueError where that is not known."""
        kinds = {self.graph.types[i] for i in self.node.input if i in self.graph.types} & _FLOATS.keys()
        if len(kinds) != 1:
            raise ValueError("its type is not known")
        name = self.graph.fresh(f"{self.node.output[0]}/number")
        self.constants[name] = np.array(value, _FLOATS[kinds.pop()])
        return name

    def integers(self, *values: int) -> str:
        """A constant list of them."""
        name = self.graph.fresh(f"{self.node.output[0]}/integers")
        self.constants[name] = np.array(values, np.int64)
        return name

    def end(self) -> bool:
        """The last node's output is the fused one's."""
        self.made[-1].output[0] = self.node.output[0]
        return True
