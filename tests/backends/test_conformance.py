"""One suite for every backend: whoever implements `hantc.core.backend_api.Backend` must pass it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hantc.backends.registry import BUILTIN, get_backend
from hantc.backends.tensorrt import gpu, sdk
from hantc.core.backend_api import Backend, BuildSpec
from hantc.core.errors import HantcError
from hantc.core.types import Protocol, digest
from hantc.dialect.floats import in_bf16
from hantc.dialect.half import to_fp16
from hantc.dialect.qdq import QuantSpec, quantize
from tests.backends.emulated_gpu import emulate

QUICK = Protocol(threads=1, warmup=1, samples=3, min_sample_ms=0.2)
RNG = np.random.default_rng(0)


def conv_net(width: int = 8, batch: int | str = "N", size: int | str = 8, seed: int | None = None) -> onnx.ModelProto:
    """Conv, norm, Relu, residual Add, pool, Gemm over (batch, 3, size, size). Without a seed its weights change."""
    rng = RNG if seed is None else np.random.default_rng(seed)

    def init(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) * 0.2).astype(np.float32), name)

    inits = [init("w1", width, 3, 3, 3), init("b1", width), init("w2", width, width, 3, 3), init("fc", 5, width)]
    ones = np.ones(width, dtype=np.float32)
    inits += [numpy_helper.from_array(ones, n) for n in ("gamma", "beta", "mean", "var")]
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c1", "gamma", "beta", "mean", "var"], ["n1"], name="norm1"),
        helper.make_node("Relu", ["n1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="conv2", pads=[1] * 4),
        helper.make_node("Add", ["c2", "r1"], ["a"], name="add"),
        helper.make_node("GlobalAveragePool", ["a"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "fc"], ["y"], name="gemm", transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, size, size])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5])
    graph = helper.make_graph(nodes, "net", [x], [y], inits)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def bad_models() -> dict[str, onnx.ModelProto]:
    """Models that no backend may take."""
    unknown = conv_net()
    unknown.graph.node[2].op_type = "NoSuchOperator"
    dangling = conv_net()
    dangling.graph.node[3].input[0] = "nobody_makes_this"
    return {"unknown": unknown, "dangling": dangling, "empty": onnx.ModelProto()}


@pytest.fixture(params=[*sorted(BUILTIN), "tensorrt on an emulated GPU"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Every built-in backend that works on this machine, and TensorRT's calls where no GPU answers."""
    if request.param not in BUILTIN:
        if sdk.load(sdk.RTX) is None or gpu.cuda is None:
            pytest.skip("tensorrt_rtx or cuda-bindings is not installed")
        return emulate(monkeypatch)[0]
    found = get_backend(request.param)
    if not found.capabilities().available:
        pytest.skip(found.capabilities().reason)
    return found


def test_capabilities(backend: Backend) -> None:
    caps = backend.capabilities()
    assert caps == backend.capabilities()
    assert backend.name in BUILTIN and caps.reason and {"fp32", "fp16"} & set(caps.precisions)
    assert caps.device.cpu and caps.device.cores >= 1 and caps.device.versions
    assert len(digest(caps.device)) == 32


def test_supports(backend: Backend) -> None:
    assert backend.supports(conv_net()) == (True, "")
    for name, model in bad_models().items():
        ok, reason = backend.supports(model)
        assert not ok and reason, name


@pytest.mark.parametrize("bad", sorted(bad_models()))
def test_bad_model_is_a_hantc_error(backend: Backend, bad: str) -> None:
    with pytest.raises(HantcError):
        backend.build(bad_models()[bad], BuildSpec())


def test_wrong_shapes_are_a_hantc_error_at_the_latest_when_run(backend: Backend) -> None:
    model = conv_net()
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.ones((5, 8, 3, 3), dtype=np.float32), "w2"))
    with pytest.raises(HantcError):
        backend.measure([backend.build(model, BuildSpec())], QUICK)


@pytest.mark.parametrize("batch", [1, 3])
def test_feeds_follow_the_batch(backend: Backend, batch: int) -> None:
    model = conv_net()
    artefact = backend.build(model, BuildSpec(threads=1, batch=batch))
    again = backend.build(model, BuildSpec(threads=1, batch=batch))
    assert artefact.feeds["x"].shape == (batch, 3, 8, 8) and artefact.feeds["x"].dtype == np.float32
    np.testing.assert_array_equal(artefact.feeds["x"], again.feeds["x"])
    assert artefact.size_bytes > 0


def test_build_leaves_the_model_alone(backend: Backend) -> None:
    model = conv_net()
    before = model.SerializeToString()
    backend.build(model, BuildSpec(batch=2))
    assert model.SerializeToString() == before


def test_a_mark_for_bf16_changes_little_or_nothing(backend: Backend) -> None:
    model, feeds = conv_net(), {"x": RNG.standard_normal((1, 3, 8, 8)).astype(np.float32)}
    outputs = [backend.run(backend.build(m, BuildSpec()), feeds)[0] for m in (model, in_bf16(model))]
    np.testing.assert_allclose(outputs[1], outputs[0], atol=0.03 * np.abs(outputs[0]).max())


def test_measure_is_positive_and_in_order(backend: Backend) -> None:
    models = [conv_net(width=4), conv_net(width=256)]
    timings = backend.measure([backend.build(m, BuildSpec()) for m in models], QUICK)
    assert len(timings) == 2
    for t in timings:
        assert math.isfinite(t.median_ms) and t.median_ms > 0 and t.iqr_ms >= 0
        assert t.samples >= (QUICK.samples if backend.capabilities().measures else 0)
    assert timings[1].median_ms > timings[0].median_ms  # about 3,000 times the work
    assert backend.measure([], QUICK) == []


def test_run_equals_the_onnx_reference(backend: Backend) -> None:
    model = conv_net()
    feeds = {"x": RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)}
    (got,) = backend.run(backend.build(model, BuildSpec(batch=2)), feeds)
    want = ReferenceEvaluator(model).run(None, feeds)
    assert got.shape == (2, 5)
    np.testing.assert_allclose(got, np.asarray(next(iter(want))), rtol=1e-4, atol=1e-5)


def unlike(backend: Backend, model: onnx.ModelProto) -> float:
    """How far a form of `conv_net(seed=1)` is from its floats: the largest difference, of the largest output."""
    feeds = {"x": RNG.standard_normal((4, 3, 8, 8)).astype(np.float32)}
    (got,) = backend.run(backend.build(model, BuildSpec(batch=4)), feeds)
    want = np.asarray(next(iter(ReferenceEvaluator(conv_net(seed=1)).run(None, feeds))))
    assert got.shape == want.shape and np.isfinite(got).all()
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_int8_runs_and_is_timed_where_it_is_claimed(backend: Backend) -> None:
    caps = backend.capabilities()
    if "int8" not in caps.precisions:
        pytest.fail(f"{backend.name} claims no INT8: every built-in one has it")
    feeds = [{"x": RNG.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(32)]
    spec = QuantSpec(reduce_range=caps.reduce_range, symmetric=caps.symmetric)
    model = quantize(conv_net(seed=1), None, feeds, spec)
    assert any(n.op_type == "QuantizeLinear" for n in model.graph.node)
    assert backend.supports(model) == (True, "")
    assert 1e-5 < unlike(backend, model) < 0.2, "rounded, and not more"
    (timing,) = backend.measure([backend.build(model, BuildSpec())], QUICK)
    assert timing.median_ms > 0


def test_fp16_runs_where_it_is_claimed(backend: Backend) -> None:
    model = to_fp16(conv_net(seed=1))
    assert any(w.data_type == TensorProto.FLOAT16 for w in model.graph.initializer)
    if "fp16" in backend.capabilities().precisions:
        assert backend.supports(model) == (True, "")
    assert 1e-6 < unlike(backend, model) < 0.02, "files in FP16 run anywhere, if not faster"


@pytest.mark.parametrize("feeds", [{}, {"x": np.zeros((1, 7), dtype=np.float32)}, {"y": np.zeros(1)}])
def test_wrong_feeds_are_a_hantc_error(backend: Backend, feeds: dict[str, np.ndarray[Any, Any]]) -> None:
    artefact = backend.build(conv_net(), BuildSpec())
    with pytest.raises(HantcError):
        backend.run(artefact, feeds)
