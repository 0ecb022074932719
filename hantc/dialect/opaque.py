"""The opaque leaf: any ONNX node that the dialect does not know, run by ONNX Runtime, emitted verbatim."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import GraphProto, NodeProto
from torch import Tensor

from hantc.core.errors import HantcError
from hantc.dialect.leaf import Array, Leaf, array, has_torch_type, tensor

_LONGEST = 60.0  # seconds for one node, on one batch


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs held in a node's attributes (bodies of If, Loop, Scan)."""
    for attr in node.attribute:
        if attr.HasField("g"):
            yield attr.g
        yield from attr.graphs


def forks(graph: GraphProto) -> Iterator[NodeProto]:
    """Every If, in subgraphs too."""
    for node in graph.node:
        if node.op_type == "If":
            yield node
        for inner in subgraphs(node):
            yield from forks(inner)


def captured(node: NodeProto) -> list[str]:
    """Names that the node's subgraphs take from outside, in order of first use."""
    found: dict[str, None] = {}

    def walk(graph: GraphProto, outer: set[str]) -> None:
        known = outer | {i.name for i in graph.input} | {i.name for i in graph.initializer}
        for inner in graph.node:
            for name in inner.input:
                if name and name not in known:
                    found.setdefault(name)
            for sub in subgraphs(inner):
                walk(sub, known | set(inner.output))
            known |= set(inner.output)
        for out in graph.output:
            if out.name not in known:
                found.setdefault(out.name)

    for graph in subgraphs(node):
        walk(graph, set())
    return list(found)


def inner_names(node: NodeProto) -> set[str]:
    """Every tensor name that the node's subgraphs define."""
    found: set[str] = set()
    for graph in subgraphs(node):
        found |= {i.name for i in (*graph.input, *graph.initializer)}
        for inner in graph.node:
            found |= set(inner.output) | inner_names(inner)
    return found


def rename_captured(node: NodeProto, names: Mapping[str, str]) -> None:
    """Replace, in place, the outer names that the node's subgraphs use."""
    for graph in subgraphs(node):
        local = {i.name for i in graph.input} | {i.name for i in graph.initializer}
        visible = {k: v for k, v in names.items() if k not in local}
        for inner in graph.node:
            for i, name in enumerate(inner.input):
                if name in visible:
                    inner.input[i] = visible[name]
            rename_captured(inner, visible)


def _to_onnx(value: Any) -> Any:
    """Torch value → what ONNX Runtime takes; a list of tensors is an ONNX sequence."""
    if isinstance(value, list):
        return [_to_onnx(v) for v in value]
    return np.array(array(value), order="C") if isinstance(value, Tensor) else value  # scalars stay without dims


def _from_onnx(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_onnx(v) for v in value]
    if value is None or (isinstance(value, np.ndarray) and not has_torch_type(value)):
        return value  # an optional value that is none; strings, 4-bit integers: only other opaque leaves can use them
    return tensor(value)


def _value_info(name: str, value: Any, declared: bytes | None = None) -> onnx.ValueInfoProto:
    """Type of an input of a one-node model: as declared, or element type and rank, every size open."""
    if declared is not None:
        return onnx.helper.make_value_info(name, onnx.TypeProto.FromString(declared))
    if isinstance(value, list):
        kind = onnx.helper.np_dtype_to_tensor_dtype(value[0].dtype) if value else onnx.TensorProto.FLOAT
        return onnx.helper.make_tensor_sequence_value_info(name, kind, None)
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, [None] * value.ndim)


@contextmanager
def stopped(after: float) -> Iterator[ort.RunOptions]:
    """Options that end a run of ONNX Runtime after so many seconds, with an error: a Loop may have no end."""
    options = ort.RunOptions()
    timer = threading.Timer(after, setattr, (options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        yield options
    finally:
        timer.cancel()


def _in_time(node: NodeProto) -> AbstractContextManager[ort.RunOptions | None]:
    return stopped(_LONGEST) if any(subgraphs(node)) else nullcontext()


class Opaque(Leaf):
    """One foreign node. `forward` takes the tensors of `names` (its inputs, then captured ones)."""

    def __init__(
        self,
        node: NodeProto,
        names: tuple[str, ...],
        constants: Mapping[str, Array],
        opsets: Mapping[str, int],
        reason: str,
        types: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.proto, self.names, self.constants = node, names, dict(constants)
        self.opsets, self.reason = dict(opsets), reason
        self.types = dict(types)  # inputs' TypeProtos, where they do not follow from values: optional ones
        self.outputs = tuple(o for o in node.output if o)
        self._sessions: dict[tuple[Any, ...], ort.InferenceSession] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Opaque:
        # sessions cannot be copied and are rebuilt on use; node and constants are never changed
        return Opaque(self.proto, self.names, self.constants, self.opsets, self.reason, self.types)

    @property
    def foreign(self) -> bool:
        """Whether ONNX Runtime runs it, so that no gradient passes."""
        return True

    def held(self) -> dict[str, Array]:
        """The node's constants."""
        return self.constants

    def model(self, inputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        """The node as a model of its own, with inputs `names` of the given types."""
        outputs = [onnx.ValueInfoProto(name=o) for o in self.outputs]
        weights = [onnx.numpy_helper.from_array(v, k) for k, v in self.constants.items()]
        graph = onnx.helper.make_graph([self.proto], "opaque", inputs, outputs, weights)
        imports = [onnx.helper.make_opsetid(d, v) for d, v in self.opsets.items()]
        return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)

    def _session(self, arrays: list[Any]) -> ort.InferenceSession:
        infos = [_value_info(n, a, self.types.get(n)) for n, a in zip(self.names, arrays, strict=True)]
        key = tuple(i.SerializeToString() for i in infos)
        if key not in self._sessions:
            model = self.model(infos)
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.intra_op_num_threads = 1
            try:
                self._sessions[key] = ort.InferenceSession(
                    model.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # onnxruntime raises several unrelated types
                raise HantcError(
                    f"ONNX Runtime cannot run {self.proto.op_type}: {error}", where=self.proto.name
                ) from error
        return self._sessions[key]

    def forward(self, *xs: Any) -> Any:
        """Run the node; no gradient flows through. Tensors, or lists of tensors for ONNX sequences, in and
        out; a tuple where the node has several outputs. HantcError where ONNX Runtime refuses."""
        arrays = [_to_onnx(x) for x in xs]
        session = self._session(arrays)
        try:
            with _in_time(self.proto) as options:
                results = session.run(None, dict(zip(self.names, arrays, strict=True)), options)
        except Exception as error:  # onnxruntime raises several unrelated types
            raise HantcError(f"{self.proto.op_type} failed in ONNX Runtime: {error}", where=self.proto.name) from error
        tensors = tuple(_from_onnx(r) for r in results)
        return tensors[0] if len(tensors) == 1 else tensors

    def extra_repr(self) -> str:
        return f"{self.proto.op_type}: {self.reason}"
