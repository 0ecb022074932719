"""TensorRT's build half: engines for GPUs that are not here, every layer's type known beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from hantc.backends.tensorrt import engine
from hantc.backends.tensorrt.backend import TensorRTBackend
from hantc.core.backend_api import BuildSpec, Deployer
from hantc.core.errors import HantcError, ModelError
from hantc.dialect.half import overflowing, to_fp16
from hantc.dialect.qdq import QuantSpec, quantize_for_timing
from tests.backends.test_conformance import bad_models, conv_net

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Result, Tiny

needs_sdk = pytest.mark.skipif(engine.version() is None, reason="tensorrt_rtx is not installed")
SPEC = BuildSpec(threads=1, batch=16)
SYMMETRIC = QuantSpec(reduce_range=False, symmetric=True)


@needs_sdk
@pytest.mark.parametrize("capability", ["SM75", "SM80", "SM86", "SM89", "SM120"])
def test_engines_are_fp16_throughout(capability: str) -> None:
    backend = TensorRTBackend(capability)
    assert isinstance(backend, Deployer) and backend.capabilities().available
    made = backend.deploy(to_fp16(conv_net()), SPEC)
    assert made.file == "model.engine" and len(made.data) == made.facts["size_bytes"] > 1000
    assert made.facts["float32_layers"] == [] and made.facts["layers"]["fp16"] > 5
    assert made.facts["compute_capability"] == capability and made.facts["seconds"] > 0


@needs_sdk
@pytest.mark.parametrize("capability", ["SM75", "SM80", "SM86", "SM89", "SM120"])
def test_engines_compute_products_in_int8_where_the_file_does(capability: str) -> None:
    model = conv_net()
    products = sum(n.op_type in ("Conv", "Gemm", "MatMul") for n in model.graph.node)
    made = TensorRTBackend(capability).deploy(to_fp16(quantize_for_timing(model, SYMMETRIC)), SPEC)
    assert made.facts["products"] == {"int8": products} and made.facts["float32_layers"] == []
    plain = TensorRTBackend(capability).deploy(to_fp16(model), SPEC)
    assert plain.facts["products"] == {"fp16": products}


@needs_sdk
def test_the_form_for_cpus_is_refused() -> None:
    with pytest.raises(ModelError, match="TensorRT does not take"):
        engine.parse(to_fp16(quantize_for_timing(conv_net(), QuantSpec(reduce_range=False))))


@needs_sdk
def test_layers_left_in_fp32_are_named() -> None:
    model = conv_net()
    model.graph.initializer[2].CopyFrom(_times(model.graph.initializer[2], 1e6))
    wide = overflowing(model, [{"x": np.ones((1, 3, 8, 8), np.float32)}])
    assert "conv2" in wide
    made = TensorRTBackend().deploy(to_fp16(model, keep=wide), SPEC)
    assert "conv2" in made.facts["float32_layers"] and "conv1" not in made.facts["float32_layers"]


def _times(weight: onnx.TensorProto, factor: float) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(factor), weight.name)


@needs_sdk
def test_a_fixed_batch_needs_no_profile() -> None:
    made = TensorRTBackend().deploy(to_fp16(conv_net(batch=2)), SPEC)
    assert made.data


@needs_sdk
def test_free_sizes_beside_the_batch_are_refused() -> None:
    with pytest.raises(ModelError, match="beside the batch"):
        TensorRTBackend().deploy(to_fp16(conv_net(size="S")), SPEC)


@needs_sdk
@pytest.mark.parametrize("bad", sorted(bad_models()))
def test_bad_models_are_refused_with_the_parsers_reason(bad: str) -> None:
    with pytest.raises(HantcError, match="TensorRT does not take"):
        engine.parse(bad_models()[bad])


@needs_sdk
def test_unknown_to_the_package() -> None:
    caps = TensorRTBackend("SM90").capabilities()
    assert not caps.available and "SM89" in caps.reason and "not for SM90" in caps.reason


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "trt", None)
    caps = TensorRTBackend().capabilities()
    assert not caps.available and "pip install" in caps.reason
    ok, reason = TensorRTBackend().supports(conv_net())
    assert not ok and "not installed" in reason


def test_fp16_is_predicted_faster_than_fp32() -> None:
    """Of the same network: half the bytes, and a GPU's FP16 peak is higher."""
    backend = TensorRTBackend()
    model = conv_net(width=256, size=32)
    single, half = (backend.measure([_predicted(backend, m)], None)[0] for m in (model, to_fp16(model)))  # type: ignore[arg-type]
    assert half.median_ms < 0.6 * single.median_ms


def _predicted(backend: TensorRTBackend, model: onnx.ModelProto) -> Any:
    from hantc.backends import predicted

    return predicted.build(model, backend.machine, SPEC)


@needs_sdk
def test_compiling_for_a_gpu_leaves_an_engine(
    tiny: Tiny, cli: Callable[..., Result], run_model: Callable[..., Any], tmp_path: Path
) -> None:
    """By a table that was written before, as where one comes from elsewhere."""
    table = tmp_path / "table.json"
    made = cli(
        "profile", tiny.model, "--target", "l4", "--effort", "quick", "--lut", table, "--store", tmp_path / "other"
    )
    assert made.code == 0, made.err
    given = ("--target", "l4", "--data", tiny.data, "--budget", "0.9", "--effort", "quick", "--time-limit", "8s")
    result = cli(tiny.model, *given, "--lut", table, "--out", tmp_path / "run", "--store", tmp_path / "store", "--json")
    assert result.code in (0, 1), result.err
    summary = result.json()
    assert summary["status"] in ("done", "budget_missed") and summary["predicted"] and summary["batch"] == 128
    used = json.loads((tmp_path / "run" / "lut.json").read_text())
    assert used["rows"] == json.loads(table.read_text())["rows"]
    assert {c["precision"] for c in summary["choices"]} == {"fp16"}
    facts = summary["engine"]
    assert facts["file"] == "model.engine" and facts["compute_capability"] == "SM89" and facts["float32_layers"] == []
    assert (tmp_path / "run" / "model.engine").stat().st_size == facts["size_bytes"]
    assert any("predicted" in note for note in summary["notes"])
    file = onnx.load(tmp_path / "run" / "model.onnx")
    assert {i.data_type for i in file.graph.initializer} & {onnx.TensorProto.FLOAT16}
    assert all(v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for v in (*file.graph.input, *file.graph.output))
    out = run_model(tmp_path / "run" / "model.onnx", tiny.feeds())
    assert (out.argmax(1) == tiny.labels[: len(out)]).mean() > 0.5
    assert cli("verify", tmp_path / "run", "--json").json()["ok"]
    assert "model.engine" in cli("inspect", tmp_path / "run").out


@needs_sdk
def test_without_data_the_teacher_is_made_fp16(tiny: Tiny, cli: Callable[..., Result], tmp_path: Path) -> None:
    given = ("--target", "t4", "--out", tmp_path / "run", "--store", tmp_path / "store", "--json")
    result = cli(tiny.model, *given)
    assert result.code == 0, result.err
    assert result.json()["engine"]["compute_capability"] == "SM75"
    assert (tmp_path / "run" / "model.engine").is_file()


def test_a_gpu_whose_engines_cannot_be_built_is_told(tiny: Tiny, cli: Callable[..., Result], tmp_path: Path) -> None:
    result = cli(tiny.model, "--target", "h100", "--out", tmp_path / "run")
    assert result.code == 2 and "h100" in result.err and not (tmp_path / "run").exists()


@needs_sdk
def test_an_engine_that_fails_does_not_take_the_student_with_it(
    tiny: Tiny, cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise HantcError("the builder ran out of memory")

    monkeypatch.setattr(engine, "build", fails)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.engine").write_bytes(b"an earlier run's")
    result = cli(tiny.model, "--target", "l4", "--out", tmp_path / "run", "--store", tmp_path / "store", "--json")
    assert result.code == 1 and result.json()["status"] == "engine_missing"
    assert "no engine could be built" in result.err
    assert result.json()["engine"] == {"file": None, "reason": "the builder ran out of memory"}
    assert (tmp_path / "run" / "model.onnx").is_file() and not (tmp_path / "run" / "model.engine").exists()
