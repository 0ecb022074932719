"""Fold constants and shape computations of a file's graph, before it is imported."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from onnx import ModelProto, numpy_helper
from onnx_graphsurgeon.logger import G_LOGGER

from hantc.dialect.infer import with_inferred
from hantc.dialect.opaque import forks, subgraphs

# forms of a Constant node that hold numbers without their type
_NUMBERS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
_MOST_IFS = 100  # whose branches are folded, too


def type_constants(graph: onnx.GraphProto) -> None:
    """Write Constant nodes' numbers as tensors: graphsurgeon takes `value_float` for a double."""
    for node in graph.node:
        for a in node.attribute:
            form = _NUMBERS.get(a.name) if node.op_type == "Constant" else None
            if form is not None:
                values = np.array(onnx.helper.get_attribute_value(a), form)
                a.CopyFrom(onnx.helper.make_attribute("value", numpy_helper.from_array(values)))
        for inner in subgraphs(node):
            type_constants(inner)


def _turns(node: gs.Node) -> bool:
    """Whether a node runs others in turns, and may go on for ever: it is never folded, that is run. (graphsurgeon drops
    unused inputs of Loops' bodies, too, which makes them invalid.)"""
    return node.op in ("Loop", "Scan") or any(_turns(n) for g in node.subgraphs() for n in g.nodes)


def fold_constants(model: ModelProto) -> ModelProto:
    """Fold constants and shape computations, drop dead nodes, sort, infer shapes."""
    ort.set_default_logger_severity(4)  # graphsurgeon folds through ONNX Runtime; the remarks of both help nobody
    try:
        with G_LOGGER.suppress():
            graph = gs.import_onnx(model)
            # graphsurgeon folds a Shape whole, even where it asks for a part of the dims (opset 15)
            partial = any(n.op == "Shape" and n.attrs for n in graph.nodes)
            # and mixes up the outputs of an If that has several when it puts a branch in its stead
            ifs = list(forks(model.graph))
            forked = any(len(n.output) > 1 for n in ifs)
            # it copies what lies within once for each level: only a hostile file has so many
            inside = len(ifs) <= _MOST_IFS
            nested = any(_turns(n) for g in graph.subgraphs() for n in g.nodes)
            tidied = {"remove_unused_graph_inputs": False, "recurse_subgraphs": inside}
            graph.cleanup(**tidied)  # folding would run dead nodes too
            graph.fold_constants(
                fold_shapes=not partial,
                recurse_subgraphs=inside and not nested,  # which asks nobody
                flatten_subgraphs=inside and not forked,
                should_exclude_node=_turns,
                error_ok=True,
            )
            graph.cleanup(**tidied).toposort(recurse_subgraphs=inside)
            cleaned: ModelProto = gs.export_onnx(graph, do_type_check=False)
    except Exception:  # graphsurgeon gives up on rare graphs; the importer works on the raw ones too
        cleaned = model
    finally:
        ort.set_default_logger_severity(2)
    return with_inferred(cleaned)
