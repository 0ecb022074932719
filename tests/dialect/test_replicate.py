"""Copies of a model in one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, helper

from hantc.dialect.qdq import QuantSpec, quantize_for_timing
from hantc.dialect.replicate import Layout, replicate

if TYPE_CHECKING:
    from tests.dialect.conftest import Models

Array = np.ndarray[Any, Any]


def run(model: ModelProto, x: Array) -> list[Array]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


def block(models: Models, c_in: int, c_out: int) -> ModelProto:
    """Conv, ReLU, a skip connection where shapes agree, and a Clip, whose missing input has an empty name."""
    skip = c_in == c_out
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Add", ["r", "x" if skip else "r"], ["a"], name="add"),
        helper.make_node("Clip", ["a", "", "top"], ["y"], name="clip"),
    ]
    constants = {
        "w": models.weight(c_out, c_in, 3, 3) * 0.3,
        "b": models.weight(c_out),
        "top": np.array(4.0, np.float32),
    }
    return models.make(nodes, {"x": ("N", c_in, 6, 6)}, {"y": ("N", c_out, 6, 6)}, constants)


def images(models: Models, channels: int = 3) -> Array:
    return np.asarray(models.rng.standard_normal((2, channels, 6, 6)), np.float32)


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_a_chain_is_repeated_application(models: Models, copies: int) -> None:
    model = block(models, 3, 3)
    x = want = images(models)
    for _ in range(copies):
        (want,) = run(model, want)
    made = replicate(model, copies, "chain")
    onnx.checker.check_model(made, full_check=True)
    (got,) = run(made, x)
    assert np.allclose(got, want, atol=1e-5)
    assert len(made.graph.node) == copies * len(model.graph.node)


@pytest.mark.parametrize("copies", [1, 3])
def test_side_by_side_all_outputs_are_equal(models: Models, copies: int) -> None:
    model, x = block(models, 3, 5), images(models)
    made = replicate(model, copies, "fan")
    onnx.checker.check_model(made, full_check=True)
    (want,) = run(model, x)
    outputs = run(made, x)
    assert len(outputs) == copies
    assert all(np.allclose(o, want, atol=1e-6) for o in outputs)
    assert [i.name for i in made.graph.input] == ["x"]


def test_lanes_have_inputs_of_their_own(models: Models) -> None:
    model, other = block(models, 3, 5), block(models, 5, 5)
    head = block(models, 3, 3)
    made = replicate(model, 2, "lanes", head=head, tail=other)
    onnx.checker.check_model(made, full_check=True)
    names = [i.name for i in made.graph.input]
    assert len(set(names)) == 2
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {n: images(models) for n in names}
    for n, got in zip(names, session.run(None, feeds), strict=True):
        (want,) = run(other, run(model, run(head, feeds[n])[0])[0])
        assert np.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("layout", ["chain", "lanes", "fan"])
def test_every_copy_has_weights_and_names_of_its_own(models: Models, layout: Layout) -> None:
    model = block(models, 3, 3)
    made = replicate(model, 3, layout)
    assert len(made.graph.initializer) == 3 * len(model.graph.initializer)
    for names in (
        [i.name for i in made.graph.initializer],
        [n.name for n in made.graph.node],
        [o for n in made.graph.node for o in n.output],
    ):
        assert len(set(names)) == len(names)
    convs = [n for n in made.graph.node if n.op_type == "Conv"]
    assert len({n.input[1] for n in convs}) == 3


def test_a_quantised_chain(models: Models) -> None:
    """The form that is timed: weights between Q/DQ pairs are copied too."""
    model = quantize_for_timing(block(models, 3, 3), QuantSpec(reduce_range=False))
    made = replicate(model, 2, "chain")
    x = images(models)
    (once,) = run(model, x)
    (twice,), (got,) = run(model, once), run(made, x)
    # invented ranges of a few values: a rounding step apart at most
    assert np.abs(got - twice).max() <= 0.08


def test_the_model_itself_stays(models: Models) -> None:
    model = block(models, 3, 3)
    before = model.SerializeToString(deterministic=True)
    made = replicate(model, 2, "chain")
    made.graph.initializer[0].float_data.append(1.0)
    assert model.SerializeToString(deterministic=True) == before
    assert list(made.opset_import) == list(model.opset_import)
