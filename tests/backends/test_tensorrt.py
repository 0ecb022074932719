"""TensorRT's build half: engines for GPUs that are not here, every layer's type known beforehand."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from hantc.backends.onnxruntime.backend import OnnxRuntimeBackend
from hantc.backends.tensorrt import engine, gpu, sdk, session
from hantc.backends.tensorrt.backend import TensorRTBackend
from hantc.core.backend_api import BuildSpec, Deployer
from hantc.core.errors import HantcError, ModelError
from hantc.core.types import Protocol
from hantc.dialect.half import overflowing, to_fp16
from hantc.dialect.qdq import QuantSpec, quantize_for_timing
from tests.backends.emulated_gpu import emulate
from tests.backends.test_conformance import QUICK, bad_models, conv_net

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Result, Tiny

RTX = sdk.load(sdk.RTX)
needs_sdk = pytest.mark.skipif(RTX is None, reason="tensorrt_rtx is not installed")
SPEC = BuildSpec(threads=1, batch=16)
SYMMETRIC = QuantSpec(reduce_range=False, symmetric=True)


def _rtx() -> sdk.Sdk:
    assert RTX is not None
    return RTX


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
        engine.parse(_rtx(), to_fp16(quantize_for_timing(conv_net(), QuantSpec(reduce_range=False))))


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
        engine.parse(_rtx(), bad_models()[bad])


@needs_sdk
def test_unknown_to_the_package() -> None:
    caps = TensorRTBackend("SM90").capabilities()
    assert not caps.available and "SM89" in caps.reason and "not for SM90" in caps.reason
    assert "full tensorrt" in caps.reason


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdk, "load", lambda package: None)
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
    assert "(predicted, not measured)" in made.out and "note: no NVIDIA L4 was used" in made.out
    assert "from a model of the machine, not a clock" in " ".join(cli("lut", "show", table).out.split())
    given = ("--target", "l4", "--data", tiny.data, "--budget", "0.9", "--effort", "quick", "--time-limit", "8s")
    result = cli(tiny.model, *given, "--lut", table, "--out", tmp_path / "run", "--store", tmp_path / "store", "--json")
    assert result.code in (0, 1), result.err
    summary = result.json()
    assert summary["status"] in ("done", "budget_missed") and summary["predicted"] and summary["batch"] == 128
    used = json.loads((tmp_path / "run" / "lut.json").read_text())
    assert used["rows"] == json.loads(table.read_text())["rows"]
    assert {c["precision"] for c in summary["choices"]} <= {"fp16", "int8"}
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
    (row,) = [t for t in cli("targets", "--json").json() if t["name"] == "h100"]
    assert not row["available"] and "tensorrt" in row["reason"]


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


needs_gpu_calls = pytest.mark.skipif(RTX is None or gpu.cuda is None, reason="tensorrt_rtx, cuda-bindings missing")


@needs_gpu_calls
def test_a_gpu_that_is_here_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own events: the emulated one's runs take what they are said to, to the nanosecond."""
    backend, _ = emulate(monkeypatch)
    caps = backend.capabilities()
    assert caps.measures and caps.available and not caps.notes
    assert caps.device.cpu == "Emulated (SM89)" and caps.device.cores == 58
    assert ("CUDA driver", "13.1") in caps.device.versions
    artefacts = [backend.build(to_fp16(conv_net(width=w)), SPEC) for w in (8, 64)]
    timings = backend.measure(artefacts, Protocol(threads=1, batch=16, samples=3, min_sample_ms=0.2))
    for artefact, timing in zip(artefacts, timings, strict=True):
        wanted = artefact.handle.session._engine.ms
        assert timing.median_ms == pytest.approx(wanted, rel=1e-4) and timing.samples >= 3


@needs_gpu_calls
def test_an_engine_for_the_gpu_here_is_run_and_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = emulate(monkeypatch)
    made = backend.deploy(to_fp16(conv_net()), SPEC)
    assert made.facts["run_on"] == "Emulated" and made.facts["relative_error"] < 2e-3
    assert made.facts["kernels"] == {"layers": 2, "fused": ["conv1 + relu1"], "types": {"Half": 1}}


@needs_gpu_calls
def test_a_session_takes_what_the_engine_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, cuda = emulate(monkeypatch)
    model = conv_net()
    artefact, plain = backend.build(model, SPEC), OnnxRuntimeBackend().build(model, SPEC)
    rng = np.random.default_rng(0)
    for batch in (1, 16, 3, 50):  # memory grows, and is used again; 50 are four runs
        x = rng.standard_normal((batch, 3, 8, 8)).astype(np.float32)
        (got,) = backend.run(artefact, {"x": x})
        (want,) = OnnxRuntimeBackend().run(plain, {"x": x})
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="may not have the shape"):
        backend.run(artefact, {"x": np.zeros((1, 3, 8, 9), np.float32)})
    assert cuda.memory
    del artefact
    gc.collect()
    assert not cuda.memory


@needs_gpu_calls
def test_what_is_no_image_goes_with_every_part_of_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = emulate(monkeypatch)
    model = conv_net()
    model.graph.output[0].name = "z"
    model.graph.node.append(onnx.helper.make_node("Mul", ["y", "factor"], ["z"]))
    model.graph.input.append(onnx.helper.make_tensor_value_info("factor", onnx.TensorProto.FLOAT, []))
    feeds = {"x": np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)}
    feeds["factor"] = np.array(2, np.float32)
    (got,) = backend.run(backend.build(model, SPEC), feeds)
    (want,) = OnnxRuntimeBackend().run(OnnxRuntimeBackend().build(model, SPEC), feeds)
    assert got.shape == want.shape == (40, 5)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@needs_gpu_calls
def test_a_gpu_that_fails_is_told_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, cuda = emulate(monkeypatch)
    cuda.out_of_memory = True
    caps = backend.capabilities()
    assert caps.available and not caps.measures
    assert any("Emulated is here but not used: CUDA: out of memory" in note for note in caps.notes)
    artefact = backend.build(to_fp16(conv_net()), SPEC)
    assert backend.measure([artefact], QUICK)[0].samples == 0


@needs_gpu_calls
def test_a_gpu_in_a_bad_state_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    _, cuda = emulate(monkeypatch)
    monkeypatch.setattr(cuda, "cudaGetDeviceProperties", lambda index: (46, None))
    for backend in (TensorRTBackend(), TensorRTBackend("SM89")):
        caps = backend.capabilities()
        assert caps.available and not caps.measures and backend.capability == "SM89"


@needs_gpu_calls
def test_without_a_target_it_is_for_the_gpu_that_is_here_if_that_is_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as known:
        emulate(known, capability=(8, 6))
        assert TensorRTBackend().capability == "SM86" and TensorRTBackend().capabilities().measures
    emulate(monkeypatch, capability=(9, 0))
    backend = TensorRTBackend()
    assert backend.capability == "SM89" and backend.capabilities().available and not backend.capabilities().measures


@needs_gpu_calls
def test_an_engine_that_cannot_be_tried_is_there_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, cuda = emulate(monkeypatch)
    assert backend.capabilities().measures
    cuda.out_of_memory = True
    made = backend.deploy(to_fp16(conv_net()), SPEC)
    assert made.data and "out of memory" in made.facts["not_run"]


@needs_sdk
def test_an_output_that_is_an_input_is_refused() -> None:
    """TensorRT gives the input another name."""
    model = conv_net()
    model.graph.output.append(model.graph.input[0])
    with pytest.raises(ModelError, match="renames an input"):
        engine.parse(_rtx(), model)


@needs_sdk
def test_builders_do_not_speak_of_each_other() -> None:
    parsed = [engine.parse(_rtx(), conv_net()) for _ in range(3)]
    assert [p.messages for p in parsed] == [[], [], []]


@needs_gpu_calls
def test_another_gpu_is_not_the_one_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, capability=(8, 6))
    caps = TensorRTBackend("SM89").capabilities()
    assert caps.available and not caps.measures and len(caps.notes) == 1


@needs_gpu_calls
def test_the_full_package_builds_for_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    full = sdk.Sdk(sdk.FULL, SimpleNamespace(__version__="11.4"))
    both = {sdk.FULL: full, sdk.RTX: RTX}
    monkeypatch.setattr(sdk, "load", both.get)
    assert sdk.builders("SM90", here=True) == (full,) and sdk.builders("SM89", here=True) == (full, RTX)
    assert sdk.builders("SM89", here=False) == (RTX,) and not full.capabilities
    assert sdk.builders("SM90", here=False) == () and "not for SM90" in sdk.missing("SM90")


def test_what_the_inspector_says_in_short() -> None:
    names = session.summarise('{"Layers": ["conv1 + relu1", "fc"], "Bindings": ["x"]}')
    assert names == {"layers": 2, "fused": ["conv1 + relu1"], "types": {}}
    for odd in ("no JSON", '{"Layers": null}', "[]", "{}"):
        assert session.summarise(odd)["layers"] is None
    assert session.summarise('{"Layers": [null]}')["layers"] == 1


@needs_gpu_calls
def test_a_gpu_is_compiled_for_where_it_is(
    tiny: Tiny, cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Costs, choice, accuracy and the engine's own figures are the GPU's."""
    emulate(monkeypatch, builds=False)
    given = ("--target", "l4", "--data", tiny.data, "--budget", "0.9", "--effort", "quick", "--time-limit", "20s")
    result = cli(tiny.model, *given, "--out", tmp_path / "run", "--store", tmp_path / "store", "--json")
    assert result.code == 0, result.err
    summary = result.json()
    assert not summary["predicted"] and summary["student"]["latency_ms"] > 0
    assert summary["engine"]["run_on"] == "Emulated" and summary["engine"]["relative_error"] < 0.01
    assert any("run on Emulated" in note for note in summary["notes"])
    assert cli("verify", tmp_path / "run", "--json").json()["ok"]


@needs_gpu_calls
def test_a_table_of_a_gpu_serves_where_there_is_none(
    tiny: Tiny, cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, given = tmp_path / "l4.json", ("--target", "l4", "--effort", "quick")
    with monkeypatch.context() as there:
        emulate(there, builds=False)
        made = cli("profile", tiny.model, *given, "--lut", table, "--store", tmp_path / "there")
        assert made.code == 0, made.err
    written = json.loads(table.read_text())
    assert written["device"]["cpu"] == "Emulated (SM89)" and any(r["samples"] for r in written["rows"])
    here: list[object] = [tiny.model, *given, "--data", tiny.data, "--budget", "0.9", "--time-limit", "8s"]
    here += ["--lut", table, "--out", tmp_path / "run", "--store", tmp_path / "here"]
    refused = cli(*here)
    assert refused.code == 2 and "--foreign-lut" in refused.err
    result = cli(*here, "--foreign-lut", "--json")
    assert result.code in (0, 1), result.err
    assert (tmp_path / "run" / "model.engine").stat().st_size > 1000
    assert any("measured on Emulated" in note for note in result.json()["notes"])


@pytest.mark.skipif(RTX is None or gpu.find("SM89") is None, reason="no GPU that the l4 target is for")
def test_on_a_real_gpu() -> None:
    backend = TensorRTBackend()
    assert backend.capabilities().measures, backend.capabilities().notes
    model = conv_net(width=256)
    made = backend.deploy(to_fp16(model), SPEC)
    assert made.facts["relative_error"] < 0.02 and made.facts["kernels"]["layers"]
    timing = backend.measure([backend.build(to_fp16(model), SPEC)], QUICK)[0]
    assert timing.median_ms > 0 and timing.samples >= QUICK.samples
