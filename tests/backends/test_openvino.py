"""What OpenVINO's backend has of its own; the conformance suite holds for the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hantc.backends.onnxruntime.backend import OnnxRuntimeBackend
from hantc.backends.openvino import backend as module
from hantc.backends.openvino import trial
from hantc.backends.openvino.backend import OpenVinoBackend
from hantc.core.backend_api import BuildSpec
from hantc.core.errors import HantcError, ModelError
from hantc.dialect.floats import in_bf16
from hantc.dialect.qdq import QuantSpec, quantize
from tests.backends.test_conformance import conv_net

RNG = np.random.default_rng(0)


@pytest.fixture
def backend() -> OpenVinoBackend:
    found = OpenVinoBackend()
    if not found.capabilities().available:
        pytest.skip(found.capabilities().reason)
    return found


def test_a_missing_library_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ov", None)
    caps = OpenVinoBackend().capabilities()
    assert not caps.available and "pip install openvino" in caps.reason


def test_it_runs_at_other_batches_than_it_is_timed_at(backend: OpenVinoBackend) -> None:
    model = conv_net()
    artefact = backend.build(model, BuildSpec(batch=1))
    reference = OnnxRuntimeBackend()
    session = reference.build(model, BuildSpec())
    for batch in (3, 1, 3):
        feeds = {"x": RNG.standard_normal((batch, 3, 8, 8)).astype(np.float32)}
        (got,), (want,) = backend.run(artefact, feeds), reference.run(session, feeds)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert len(artefact.handle.requests) == 2, "compiled once for each shape"


def test_outputs_are_not_overwritten_by_the_next_run(backend: OpenVinoBackend) -> None:
    artefact = backend.build(conv_net(), BuildSpec())
    feeds = [{"x": RNG.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(2)]
    (first,) = backend.run(artefact, feeds[0])
    kept = first.copy()
    (second,) = backend.run(artefact, feeds[1])
    np.testing.assert_array_equal(first, kept)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("floats", "cpu_has_it", "hint"), [("bf16", True, "bf16"), ("bf16", False, "f32"), ("fp32", True, "f32")]
)
def test_bf16_takes_the_mark_and_the_cpu(
    monkeypatch: pytest.MonkeyPatch, floats: Any, cpu_has_it: bool, hint: str
) -> None:
    monkeypatch.setattr(module, "_has_bf16", lambda: cpu_has_it)
    assert module.options(2, floats)["INFERENCE_PRECISION_HINT"] == hint


@pytest.mark.parametrize("cpu_has_it", [True, False])
def test_bf16_is_offered_where_the_cpu_has_it(
    backend: OpenVinoBackend, monkeypatch: pytest.MonkeyPatch, cpu_has_it: bool
) -> None:
    monkeypatch.setattr(module, "_has_bf16", lambda: cpu_has_it)
    assert ("bf16" in backend.capabilities().precisions) == cpu_has_it


def test_a_marked_file_is_computed_in_bf16(backend: OpenVinoBackend) -> None:
    model, feeds = conv_net(width=32), {"x": RNG.standard_normal((4, 3, 8, 8)).astype(np.float32)}
    (plain,) = backend.run(backend.build(model, BuildSpec()), feeds)
    (marked,) = backend.run(backend.build(in_bf16(model), BuildSpec()), feeds)
    np.testing.assert_allclose(marked, plain, atol=0.03 * np.abs(plain).max())  # 8 bits of mantissa
    assert np.array_equal(marked, plain) == ("bf16" not in backend.capabilities().precisions)


def test_a_quantised_file_gives_what_onnx_runtime_gives(backend: OpenVinoBackend) -> None:
    """To within a step or two of the output's grid: the engines round sums differently."""
    model = conv_net()
    del model.graph.node[1]  # the norm stays float
    model.graph.node[1].input[0] = "c1"
    feeds = [{"x": RNG.standard_normal((8, 3, 8, 8)).astype(np.float32)}]
    quantised = quantize(model, None, feeds, QuantSpec(reduce_range=backend.capabilities().reduce_range))
    assert any(n.op_type == "QuantizeLinear" for n in quantised.graph.node)
    reference = OnnxRuntimeBackend()
    (want,) = reference.run(reference.build(quantised, BuildSpec(batch=8)), feeds[0])
    (got,) = backend.run(backend.build(quantised, BuildSpec(batch=8)), feeds[0])
    assert np.abs(got - want).max() <= 0.05 * np.ptp(want)


def test_other_symbolic_dims_run_but_are_not_timed(backend: OpenVinoBackend) -> None:
    model = conv_net(size="side")
    artefact = backend.build(model, BuildSpec())
    assert backend.run(artefact, {"x": np.zeros((1, 3, 8, 8), dtype=np.float32)})[0].shape == (1, 5)
    with pytest.raises(ModelError, match="cannot be timed"):
        module.bound_run(artefact)


def test_errors_say_what_openvino_says_not_where_in_its_source(backend: OpenVinoBackend) -> None:
    model = conv_net()
    model.graph.node[2].op_type = "NoSuchOperator"
    with pytest.raises(HantcError, match="NoSuchOperator"):
        backend.build(model, BuildSpec())


def quantised(op: str) -> onnx.ModelProto:
    """x as INT8 and back, joined with itself by `op`."""
    inits = [
        numpy_helper.from_array(np.array(v, dtype=t), n) for n, v, t in (("s", 0.1, np.float32), ("z", 0, np.uint8))
    ]
    attributes: dict[str, Any] = {"axis": 1} if op == "Concat" else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node(op, ["d", "d"], ["y"], **attributes),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", c, 4, 4]) for n, c in (("x", 3), ("y", None))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], inits)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_what_it_may_crash_on_is_compiled_elsewhere_first(
    backend: OpenVinoBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds = {"x": np.ones((2, 3, 4, 4), np.float32)}
    (got,) = backend.run(backend.build(quantised("Concat"), BuildSpec()), feeds)
    np.testing.assert_allclose(got, np.ones((2, 6, 4, 4)), atol=1e-6)
    monkeypatch.setattr(trial, "_PROGRAM", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(ModelError, match="crashes"):
        backend.build(quantised("Concat"), BuildSpec())
    backend.build(quantised("Add"), BuildSpec())  # not of the kind
    monkeypatch.setattr(trial, "_PROGRAM", "raise ValueError")  # an error: for the backend to report
    backend.build(quantised("Concat"), BuildSpec())
    monkeypatch.setattr(trial, "_PROGRAM", "import time; time.sleep(60)")
    monkeypatch.setattr(trial, "_TIMEOUT_S", 0.5)
    with pytest.raises(ModelError, match="still compiling"):
        backend.build(quantised("Concat"), BuildSpec())
