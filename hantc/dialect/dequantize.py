"""A model that is quantised already → the same network in floats, so that it can be a teacher.

Values keep what quantisation made of the weights; the activations' rounding goes, their ranges are recorded. Where the
range of a sum or product begins at zero, the quantiser had left a ReLU to it, which comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, numpy_helper

from hantc.core.errors import UnsupportedError
from hantc.dialect.dequantize_rules import RULES, pad
from hantc.dialect.dequantize_work import Work
from hantc.dialect.leaf import attributes
from hantc.dialect.opaque import captured
from hantc.dialect.unfuse import unfused


@dataclass(frozen=True)
class Dequantized:
    """`model`: in floats, or as it was where `reason` says why not. `ranges`: scale and zero point of each activation
    that had been quantised."""

    model: ModelProto
    ranges: Mapping[str, tuple[float, int]]
    reason: str = ""


_PLACES = frozenset({"ArgMax", "ArgMin"})  # tell where a value is, which no scale changes


def is_quantized(model: ModelProto) -> bool:
    """Whether anything in it computes on quantised values."""
    return any(n.op_type in RULES for n in model.graph.node)


def dequantized(model: ModelProto) -> Dequantized:
    """`model` in floats, or itself where nothing in it is quantised. What cannot be taken apart (integers that are
    computed with) leaves the whole as it is."""
    if not is_quantized(model):
        return Dequantized(model, {})
    model = unfused(model)
    try:
        work = Work(model)
        for node in model.graph.node:
            _take(work, node)
    except UnsupportedError as error:
        return Dequantized(model, {}, error.message)
    # scales that are computed, inputs that are missing, broken weights (of which the import tells more)
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        return Dequantized(model, {}, f"its quantisation is of a kind that is not known: {error}")
    return Dequantized(work.finish(), work.ranges)


def _take(work: Work, node: NodeProto) -> None:
    """One node, in floats."""
    if node.op_type == "Constant" and (value := attributes(node).get("value")) is not None:
        work.constants[node.output[0]] = numpy_helper.to_array(value)
        return
    read = {*node.input, *captured(node)}
    if node.op_type in RULES:
        RULES[node.op_type](work, node)
    elif node.op_type == "Cast" and node.input[0] in work.sums:
        work.become(node.output[0], node.input[0])
    elif node.op_type == "Pad" and node.input[0] in work.floated:
        pad(work, node)
    elif node.op_type in _PLACES and node.input[0] in work.floated:
        work.put(node)
    elif read & work.sums or (read & work.floated and not work.moves(node)):
        raise UnsupportedError(f"{node.op_type} {node.name!r} computes with quantised values")
    else:
        work.floated.update(node.output if read & work.floated else ())
        work.put(node)
