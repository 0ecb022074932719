"""What stands around a part while it is timed: its numbers, and what is left when it is taken off."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from hantc.core.types import CostRow, Shape
from hantc.dialect.qdq import QuantSpec
from hantc.dialect.replicate import replicate
from hantc.passes import frames
from hantc.passes.meter import Meter, Work

if TYPE_CHECKING:
    from tests.passes.conftest import Lab

QUANT = QuantSpec(reduce_range=False)
PLAIN: Shape = (16, 6, 6)


def run(model: ModelProto, x: np.ndarray[Any, Any]) -> list[Any]:
    import onnxruntime as ort

    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {i.name: x for i in session.get_inputs()}))


def image(shape: Shape = PLAIN) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32)


def scaling(shape: Shape = PLAIN) -> ModelProto:
    """x → 3 x."""
    x, y = (helper.make_tensor_value_info(v, TensorProto.FLOAT, ["N", *shape]) for v in "xy")
    three = onnx.numpy_helper.from_array(np.array(3.0, np.float32), "three")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "three"], ["y"], name="m")], "g", [x], [y], [three])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_chain_in_its_frame_computes_head_copies_tail() -> None:
    around = frames.frame(PLAIN, PLAIN, None, 17)
    assert around.head is not None and around.tail is not None
    x = image()
    (got,) = run(around.around(scaling(), 3, chain=True), x)
    (inner,) = run(around.head, x)
    (want,) = run(around.tail, 27 * inner)
    assert np.allclose(got, want, atol=1e-4)


def test_other_copies_have_lanes_of_their_own() -> None:
    around = frames.frame(PLAIN, PLAIN, None, 17)
    assert around.head is not None and around.tail is not None
    x = image()
    outputs = run(around.around(scaling(), 3, chain=False), x)
    (want,) = run(around.tail, 3 * run(around.head, x)[0])
    assert len(outputs) == 3
    assert all(np.allclose(o, want, atol=1e-4) for o in outputs)


def test_an_empty_frame_is_what_a_chain_has_around_it() -> None:
    around = frames.frame(PLAIN, PLAIN, None, 17)
    x = image()
    once, empty = (run(m, x)[0] for m in (around.around(scaling(), 1, chain=True), frames.empty(PLAIN, None, 17)))
    assert np.allclose(once, 3 * empty, atol=1e-4)


def test_engines_do_not_compute_what_copies_have_in_common_once() -> None:
    """Without weights, copies that read one tensor would be one."""
    import onnxruntime as ort

    x, y = (helper.make_tensor_value_info(v, TensorProto.FLOAT, ["N", 3, 8, 8]) for v in "xy")
    pool = helper.make_node("AveragePool", ["x"], ["y"], name="p", kernel_shape=[3, 3], pads=[1] * 4)
    graph = helper.make_graph([pool], "g", [x], [y])
    part = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    made = frames.frame((3, 8, 8), (3, 8, 8), None, 17).around(part, 4, chain=False)
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(Path(tempfile.mkdtemp()) / "p")
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, {i.name: image((3, 8, 8)) for i in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text())
    assert sum(e.get("args", {}).get("op_name") == "AveragePool" for e in events if "kernel_time" in e["name"]) == 4


def test_further_tails_read_the_same_tensor() -> None:
    pair = frames.tails(PLAIN, None, 17)
    assert pair is not None
    x = image()
    one, many = (run(m, x) for m in pair[:2])
    assert len(one) == 1 and len(many) == 1 + pair[2]
    assert all(np.allclose(m, one[0], atol=1e-6) for m in many)


@pytest.mark.parametrize(
    ("in_shape", "out_shape", "head", "tail"),
    [
        ((3, 8, 8), (16, 4, 4), False, True),  # an image: no blocks of channels
        ((16, 4, 4), (16,), True, False),  # a vector
        ((16,), (16,), False, False),
        ((4, 4), (16, 4, 4), False, True),
    ],
)
def test_what_is_none_of_a_convolutions_has_no_frame(in_shape: Shape, out_shape: Shape, head: bool, tail: bool) -> None:
    around = frames.frame(in_shape, out_shape, None, 17)
    assert (around.head is not None, around.tail is not None) == (head, tail)


def test_parts_in_int8_stand_between_convolutions_in_int8() -> None:
    around = frames.frame(PLAIN, PLAIN, QUANT, 17)
    for part in (around.head, around.tail):
        assert part is not None
        assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= {n.op_type for n in part.graph.node}
    assert frames.frame(PLAIN, PLAIN, QUANT, 9) == frames.Frame(None, None), "opset 9 cannot quantise"


def test_what_is_timed_for_a_border_differs_by_two_pairs() -> None:
    rows = frames.borders(PLAIN, QUANT)
    assert rows is not None

    def count(model: ModelProto, op: str) -> int:
        return [n.op_type for n in model.graph.node].count(op)

    for model in (rows.plain, rows.mixed, *rows.rounded):
        run(model, image())
    convolutions = count(rows.plain, "Conv")
    assert count(rows.mixed, "Conv") == convolutions == count(rows.plain, "Sigmoid")
    assert count(rows.mixed, "Sigmoid") == convolutions - 2
    # two convolutions in INT8 stand apart; each has a pair before and behind, and one for its weights
    weights = count(rows.rounded[0], "DequantizeLinear") / count(rows.rounded[0], "Conv")
    assert count(rows.mixed, "DequantizeLinear") == 2 * weights
    bare = [n.op_type != "Sigmoid" for n in rows.mixed.graph.node if n.op_type in ("Sigmoid", "QuantizeLinear")]
    assert "".join("q" if b else "f" for b in bare).strip("f").count("f") > 5, "far from each other"


def test_of_rows_that_take_what_their_parts_take_the_pair_is_left() -> None:
    rows = frames.borders(PLAIN, QUANT)
    assert rows is not None
    floats, in_int8, pair, ends = 7.0, 3.0, 11.0, 5.0
    many = sum(n.op_type == "Sigmoid" for n in rows.plain.graph.node)
    short, long = (ends + in_int8 * sum(n.op_type == "Conv" for n in m.graph.node) for m in rows.rounded)
    mixed = (many - 2) * floats + 2 * in_int8 + 2 * pair
    assert rows.pair(many * floats, mixed, short, long) == pytest.approx(pair)
    assert rows.pair(many * floats, 1.0, short, long) == 0, "noise costs nothing"


def test_what_is_no_map_of_many_channels_has_no_border() -> None:
    assert frames.borders((16,), QUANT) is None and frames.borders((3, 8, 8), QUANT) is None


def test_a_frame_leaves_no_trace_in_the_figures(lab: Lab) -> None:
    """On a machine where latencies are counted: a part's own products, whatever stands around it."""
    m = Meter(lab.fresh())
    pair = replicate(frames.empty(PLAIN, None, 17), 1, "chain")  # 16 → 16 channels, then a tail's 16
    for chained in (True, False):
        row = CostRow("r00", f"c{chained}", "fp32", 0.0, 0.0, 0, "roofline", "d", 1, 1)
        (found,) = m.rows([Work(m.key(chained=chained), row, pair, chained, PLAIN, PLAIN)])
        assert found.latency_ms == pytest.approx(1e3 * 2 * 2 * 16 * 16 * 36 / 1e9, rel=1e-6)


def test_what_no_convolution_reads_has_no_border(lab: Lab) -> None:
    m = Meter(lab.fresh())
    assert m.border((16,)) == 0.0
    assert m.border((3, 8, 8)) == 0.0


def test_what_stands_before_wide_tensors_is_light() -> None:
    """As little as its layout asks for: its weights would push out of the caches those of what is timed."""
    for channels, groups in ((512, 1), (1280, 1280)):
        head = frames.frame((channels, 7, 7), (10,), None, 17).head
        assert head is not None
        (node,), (weight,) = head.graph.node, head.graph.initializer
        assert [a.i for a in node.attribute if a.name == "group"] == [groups]
        assert 4 * np.prod(weight.dims) <= 1.1e6
        assert [d.dim_value for d in head.graph.output[0].type.tensor_type.shape.dim][1:] == [channels, 7, 7]
