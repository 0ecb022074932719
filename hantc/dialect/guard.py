"""Checks of a model file, which is untrusted input, before anything of it is run: a graph that is none, sizes that no
machine has, nesting and functions that grow without end. Nothing here runs a node or allocates by what the file says.
"""

from __future__ import annotations

import graphlib
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from hantc.core.errors import ModelError
from hantc.core.memory import total_memory
from hantc.dialect import probe
from hantc.dialect.infer import infer, light, without_claims
from hantc.dialect.opaque import captured, subgraphs

LARGEST = 1 << 30  # elements of a tensor: 4 GiB in float32
_DEEPEST = 16  # subgraphs within subgraphs; protobuf itself reads no more than 33
_MOST_SUBGRAPHS = 4096  # reading each takes milliseconds
_MOST_NODES = 1 << 20  # functions expanded
_MOST_DIMS = 64  # of a tensor; an axis beyond them is none
_PROBE_S = 180  # for ONNX Runtime to load the model and to run it once
_PROBE_SPARE = 4 << 30  # bytes of addresses, not of memory, that its threads and libraries take
_MOST_TURNS = 1 << 20  # of a Loop whose number of turns is a constant


def check_untrusted(model: ModelProto) -> None:
    """ModelError, with the node, tensor or function at fault, for what could not be imported or would take the
    machine down: cycles, tensors made twice or never, more than `LARGEST` elements, functions that call themselves or
    expand to a million nodes, subgraphs without number, loops with a million turns."""
    _check_nodes(model.graph)
    _check_functions(model)
    if model.graph.sparse_initializer:
        raise ModelError("it holds sparse weights", hint="write them densely: hantc reads no others")
    _check_held(model)
    whole = _inlined(model)
    names = {i.name for i in whole.graph.initializer}
    _check_graph(whole.graph, names | {i.name for i in whole.graph.input}, 0)
    if (held := _subgraphs(whole.graph)) > _MOST_SUBGRAPHS:
        raise ModelError(f"it holds {held:,} subgraphs, more than {_MOST_SUBGRAPHS:,}", hint="is this a model?")
    _check_turns(whole.graph, {}, 1)
    _check_sizes(model)


def _subgraphs(graph: GraphProto) -> int:
    """How many there are, in all depths (which have been checked)."""
    return sum(1 + _subgraphs(inner) for node in graph.node for inner in subgraphs(node))


def _inlined(model: ModelProto) -> ModelProto:
    try:
        whole: ModelProto = onnx.inliner.inline_local_functions(model) if model.functions else model
    except Exception as error:  # onnx raises many types on broken functions
        raise ModelError(f"its functions cannot be expanded: {error}", hint="is the model file whole?") from error
    return whole


def check_survives(model: ModelProto) -> None:
    """ModelError if ONNX Runtime does not come back from loading the model and running it once, or wants more memory
    than the machine has, all of which has been seen, and would leave nothing in this process to report it. An error of
    its own is for the backend to report."""
    with tempfile.TemporaryDirectory(prefix="hantc-probe-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        limit = total_memory() + _PROBE_SPARE
        try:
            done = subprocess.run(
                # -P: the modules beside the probe are none of its business
                [sys.executable, "-P", probe.__file__, path, str(limit)],
                capture_output=True,
                timeout=_PROBE_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ModelError(
                f"ONNX Runtime is still at it {_PROBE_S} s after it began to load and run it once",
                hint="has it a Loop that does not end on every image?",
            ) from error
    if done.returncode in (probe.NO_MEMORY, -signal.SIGKILL):  # which is what the system does where memory ends
        raise ModelError(
            f"it needs more than this machine's {total_memory() / (1 << 30):.0f} GiB of memory", hint="is this a model?"
        )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ModelError(f"ONNX Runtime crashes on it ({name})", hint="report it to its makers, with the file")


def _check_nodes(graph: GraphProto) -> None:
    """protobuf hands out what is no UTF-8 as bytes."""
    for node in graph.node:
        if not all(isinstance(t, str) for t in (node.op_type, node.domain, node.name, *node.input, *node.output)):
            raise ModelError("a node's names are no text", hint="is the model file whole?")
        for attribute in node.attribute:
            if attribute.name == "axis" and abs(attribute.i) > _MOST_DIMS:
                raise ModelError(f"its axis is {attribute.i}", where=node.name or node.op_type)
    values = [v.name for v in (*graph.input, *graph.output, *graph.initializer, *graph.value_info)]
    if not all(isinstance(t, str) for t in (graph.name, *values)):
        raise ModelError("a tensor's name is no text", hint="is the model file whole?")
    dims = [d for v in (*graph.input, *graph.output, *graph.value_info) for d in v.type.tensor_type.shape.dim]
    if not all(isinstance(d.dim_param, str) for d in dims):
        raise ModelError("a dim's name is no text", hint="is the model file whole?")


def _called(
    nodes: Iterable[NodeProto], known: Mapping[tuple[str, str], FunctionProto], depth: int = 0
) -> list[tuple[str, str]]:
    """The functions that nodes call, as often as they do, those in subgraphs among them."""
    found: list[tuple[str, str]] = []
    if depth > _DEEPEST:
        raise ModelError(f"subgraphs lie more than {_DEEPEST} deep", hint="is this a model?")
    for node in nodes:
        if (node.domain, node.op_type) in known:
            found.append((node.domain, node.op_type))
        for graph in subgraphs(node):
            found += _called(graph.node, known, depth + 1)
    return found


def _check_functions(model: ModelProto) -> None:
    known = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(key: tuple[str, str], path: tuple[tuple[str, str], ...]) -> int:
        if key in path:
            raise ModelError(f"function {key[1]!r} calls itself", hint="ONNX has no recursion")
        if key not in sizes:
            if len(path) > _DEEPEST:
                raise ModelError(f"functions call each other more than {_DEEPEST} deep", hint="is this a model?")
            calls = _called(known[key].node, known)
            sizes[key] = len(known[key].node) + sum(size(c, (*path, key)) for c in calls)
        return sizes[key]

    total = sum(size(c, ()) for c in _called(model.graph.node, known))
    if total > _MOST_NODES:
        raise ModelError(f"its functions expand to {total} nodes", hint="is this a model?")


def _check_graph(graph: GraphProto, known: set[str], depth: int) -> None:
    """Every tensor is made once, before it is used or after it, but not by itself."""
    if depth > _DEEPEST:
        raise ModelError(f"subgraphs lie more than {_DEEPEST} deep", hint="is this a model?")
    made: dict[str, NodeProto] = {}
    for node in graph.node:
        for name in filter(None, node.output):
            if name in made or name in known:
                raise ModelError(f"tensor {name!r} is made twice", hint="is the model file whole?")
            made[name] = node
    needs = [{n for n in (*node.input, *captured(node)) if n in made} for node in graph.node]
    missing = next((n for node in graph.node for n in node.input if n and n not in made and n not in known), "")
    missing = missing or next((o.name for o in graph.output if o.name not in made and o.name not in known), "")
    if missing and depth == 0:
        raise ModelError(f"tensor {missing!r} is used but never made", hint="is the model file whole?")
    places = {name: k for k, node in enumerate(graph.node) for name in node.output}
    order = graphlib.TopologicalSorter({k: {places[n] for n in need} for k, need in enumerate(needs)})
    try:
        order.prepare()
    except graphlib.CycleError as error:
        node = graph.node[error.args[1][0]]
        raise ModelError(
            f"the graph has a cycle: {node.name or node.op_type!r} waits for its own result", hint="is the file whole?"
        ) from error
    for node in graph.node:
        for inner in subgraphs(node):
            names = {i.name for i in inner.input} | {i.name for i in inner.initializer}
            _check_graph(inner, names, depth + 1)


def _check_turns(graph: GraphProto, known: Mapping[str, TensorProto], turns: int) -> None:
    """A Loop with a constant number of turns, and nothing else to end it, might be folded, that is run. `known`:
    constants of the graphs around; `turns`: how often all this is run."""
    known = {**known, **_constants(graph)}
    for node in graph.node:
        times = turns
        if node.op_type == "Loop" and _never_ends(node):
            times *= _turns(node, known)
        if times > _MOST_TURNS:
            raise ModelError("a Loop turns over a million times", where=node.name, hint="is this a model?")
        for inner in subgraphs(node):
            _check_turns(inner, known, times)


def _constants(graph: GraphProto) -> dict[str, TensorProto]:
    """Initialisers, and what Constant nodes hold."""
    found = {i.name: i for i in graph.initializer}
    for node in graph.node:
        if (
            node.op_type in ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze")
            and node.input
            and node.input[0] in found
        ):
            found[node.output[0]] = found[node.input[0]]
        for a in node.attribute:
            if node.op_type == "Constant" and node.output and a.name in ("value", "value_int", "value_ints"):
                ints = [a.i] if a.name == "value_int" else list(a.ints)
                found[node.output[0]] = a.t if a.name == "value" else numpy_helper.from_array(np.array(ints, np.int64))
    return found


def _turns(loop: NodeProto, known: Mapping[str, TensorProto]) -> int:
    """How often a Loop turns that no condition ends; 1 where that is computed."""
    if not loop.input or not loop.input[0]:
        return _MOST_TURNS + 1
    return _integer(known[loop.input[0]]) if loop.input[0] in known else 1


def _integer(tensor: TensorProto) -> int:
    """The one number of a tensor, at least 1; 1 where it has more, or is broken, which is for others to tell."""
    try:
        value = numpy_helper.to_array(tensor)
        return max(1, int(value.reshape(()))) if value.dtype.kind in "iu" and value.size == 1 else 1
    except Exception:  # numpy and onnx raise many types
        return 1


def _never_ends(loop: NodeProto) -> bool:
    """Whether the body hands the condition on as it came, or as a constant."""
    for body in subgraphs(loop):
        made = {o: n for n in body.node for o in n.output}
        name = body.output[0].name if body.output else ""
        while name in made and made[name].op_type == "Identity":
            name = made[name].input[0]
        if name in made and made[name].op_type != "Constant":
            return False
    return True


def _check_held(model: ModelProto) -> None:
    """onnx reads external weights of graphs, not those that lie deep in functions; ONNX Runtime might."""
    for tensor in _tensors(model.graph.initializer, [*model.graph.node, *(n for f in model.functions for n in f.node)]):
        if tensor.data_location == TensorProto.EXTERNAL:
            raise ModelError(
                f"tensor {tensor.name!r} has its values in another file, and lies where those are not read",
                hint="save the model with its weights inside",
            )


def _tensors(weights: Iterable[TensorProto], nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    """All of them, in attributes and subgraphs too (whose depth was checked)."""
    yield from weights
    for node in nodes:
        for a in node.attribute:
            yield from (a.t, *a.tensors)
            for sparse in (a.sparse_tensor, *a.sparse_tensors):
                yield from (sparse.values, sparse.indices)
        for graph in subgraphs(node):
            yield from _tensors(graph.initializer, graph.node)


def _elements(tensor: TensorProto) -> int:
    return math.prod(tensor.dims)


def _check_sizes(model: ModelProto) -> None:
    """No weight that the file does not hold, no tensor that no machine does, as far as inference can tell."""
    for weight in model.graph.initializer:
        if any(d < 0 for d in weight.dims) or _elements(weight) > LARGEST:
            raise ModelError(
                f"weight {weight.name!r} declares the shape {list(weight.dims)}", hint="is the file whole?"
            )
    for value in _typed(model):
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim if d.HasField("dim_value")]
        if any(d < 0 for d in dims) or math.prod(dims) > LARGEST:
            raise ModelError(
                f"tensor {value.name!r} would have {math.prod(dims):.3g} elements (its shape is {dims})",
                hint=f"hantc takes tensors of up to {LARGEST} elements",
            )


def _typed(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """Every tensor whose shape the file declares or inference finds, with what it declares and without."""
    declared = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    return [*declared, *infer(light(model)), *without_claims(light(model)).graph.value_info]
