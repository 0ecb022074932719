"""A model run over data front to back, towards one node after another.

Each step starts from the tensors that the step before left: the whole walk computes every node about twice, however
many steps there are. What a node adds may be changed after its step, and the steps behind it see that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from hantc.core.backend_api import Feeds
from hantc.dialect.opaque import captured
from hantc.dialect.qdq_graph import opset_of

Array = np.ndarray[Any, Any]

_MEAN = "hantc_mean_"
_PLAIN = frozenset(f"tensor({t})" for t in ("float", "float16", "double", "bool", "string")) | frozenset(
    f"tensor({sign}int{bits})" for sign in ("", "u") for bits in (8, 16, 32, 64)
)


class FrontToBack:
    """Each image's channel means of some nodes' outputs.

    `nodes`: their names, in the order in which they will be asked for, that of the graph. Memory: those tensors of all
    feeds that the nodes not yet asked for still need.
    """

    def __init__(self, model: onnx.ModelProto, feeds: Sequence[Feeds], nodes: Iterable[str]) -> None:
        self._model, self._nodes = model, list(model.graph.node)
        self._reads = [[*filter(None, n.input), *captured(n)] for n in self._nodes]
        self._makers = {o: k for k, n in enumerate(self._nodes) for o in n.output if o}
        index = {n.name: k for k, n in enumerate(self._nodes)}
        self._ahead = [index[n] for n in nodes]
        self._values: list[dict[str, Array]] = [dict(f) for f in feeds]
        varying = {name for f in feeds for name in f}
        for node, reads in zip(self._nodes, self._reads, strict=True):
            if not varying.isdisjoint(reads):
                varying.update(node.output)
        # integers are held instead of the floats that they stand for
        self._holdable = varying - {o for n in self._nodes if n.op_type == "DequantizeLinear" for o in n.output}

    def next_means(self, rank: int) -> Array:
        """Means over positions of the next node's first output, (rows, C): rows are images, of all feeds, or parts of
        them where a node has such in its first dimension. `rank` is the output's, channels are in dimension 1.
        Whatever onnxruntime raises if that part of the model does not run.
        """
        target, mean = self._ahead.pop(0), f"{_MEAN}0"
        kept, session = self._session(target, mean, rank)
        outputs = [o.name for o in session.get_outputs()]
        taken = [i.name for i in session.get_inputs()]
        means = []
        for k, values in enumerate(self._values):
            found = dict(zip(outputs, session.run(outputs, {n: values[n] for n in taken}), strict=True))
            means.append(found.pop(mean))
            self._values[k] = {n: a for n, a in values.items() if n in kept} | found
        return np.concatenate(means)

    def _session(self, target: int, mean: str, rank: int) -> tuple[set[str], Any]:
        """What is to be held once `target` has been reached, and a session that makes `mean` and what of that is new.

        numpy has no arrays for some types (8-bit floats, sequences): what such a tensor is made of is held instead.
        """
        known = set(self._values[0])
        part = sorted(self._needed([target], known))
        added = mean_nodes(self._nodes[target].output[0], rank, opset_of(self._model), mean)
        while True:
            made = {o for k in part if k != target for o in self._nodes[k].output} & self._holdable
            kept = {r for k in self._needed(self._ahead, known | made) for r in self._reads[k]} & (known | made)
            session = start(self._submodel([*(self._nodes[k] for k in part), *added], [*sorted(kept & made), mean]))
            strange = {o.name for o in session.get_outputs() if o.type not in _PLAIN}
            if not strange:
                return kept, session
            self._holdable -= strange

    def _needed(self, targets: Iterable[int], known: set[str]) -> set[int]:
        """The nodes that make what `targets` read, as far as it is not known; those themselves too."""
        found, stack = set[int](), list(targets)
        while stack:
            k = stack.pop()
            if k not in found:
                found.add(k)
                stack += [self._makers[r] for r in self._reads[k] if r not in known and r in self._makers]
        return found

    def _submodel(self, nodes: Sequence[NodeProto], outputs: Sequence[str]) -> onnx.ModelProto:
        """A model of some nodes, with those of the tensors that are known as inputs."""
        read = {r for n in nodes for r in [*n.input, *captured(n)]}
        constants = [i for i in self._model.graph.initializer if i.name in read]
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), [None] * a.ndim)
            for name, a in self._values[0].items()
            if name in read
        ]
        made = [onnx.ValueInfoProto(name=name) for name in outputs]
        graph = helper.make_graph(list(nodes), "part", inputs, made, constants)
        opsets, functions = self._model.opset_import, self._model.functions
        ir = self._model.ir_version
        return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=ir)


def mean_nodes(tensor: str, rank: int, opset: int, out: str) -> list[NodeProto]:
    """Nodes that make `out`, (N, C), the means of a tensor (N, C, …) over all dimensions but the first two."""
    axes = list(range(2, rank))
    if not axes:
        return [helper.make_node("Identity", [tensor], [out])]
    if opset < 18:
        return [helper.make_node("ReduceMean", [tensor], [out], keepdims=0, axes=axes)]
    value = numpy_helper.from_array(np.asarray(axes, np.int64))
    return [
        helper.make_node("Constant", [], [f"{out}_axes"], value=value),
        helper.make_node("ReduceMean", [tensor, f"{out}_axes"], [out], keepdims=0),
    ]


def start(model: onnx.ModelProto) -> Any:
    """A session of onnxruntime on the CPU, silent. Whatever it raises if it cannot be had."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
