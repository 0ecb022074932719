"""A GPU that is not there: CUDA's calls on this machine's memory, TensorRT's on ONNX Runtime, by a clock of their own.

It shows that the backend's calls are in order, not that a GPU answers to them: every name used here is looked up in the
real packages first, and addresses, sizes, shapes and streams must fit, or it fails.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from hantc.backends.prediction import predict
from hantc.backends.tensorrt import engine, gpu, sdk
from hantc.backends.tensorrt.backend import L4, TensorRTBackend

STREAM = 77


class Stream:
    def __int__(self) -> int:
        return STREAM


class Cuda:
    """What of `cuda.bindings.runtime` is used. `now`: milliseconds that the GPU has been at work."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self, real: Any, capability: tuple[int, int] = (8, 9)) -> None:
        for name in vars(Cuda):
            assert name.startswith("_") or hasattr(real, name), f"cuda.bindings.runtime has no {name}"
        for name in vars(self.cudaMemcpyKind):
            assert hasattr(real.cudaMemcpyKind, name)
        self.capability = capability
        self.memory: dict[int, Any] = {}
        self.pending: list[Context] = []  # what has run and is computed when somebody looks
        self.now = 0.0
        self.out_of_memory = False

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, 1

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, 13010

    def cudaGetDeviceProperties(self, index: int) -> tuple[int, Any]:
        major, minor = self.capability
        return 0, SimpleNamespace(name=b"Emulated\0\0", major=major, minor=minor, multiProcessorCount=58)

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, b"out of memory"

    def cudaSetDevice(self, index: int) -> tuple[int]:
        return (0,)

    def cudaStreamCreate(self) -> tuple[int, Stream]:
        return 0, Stream()

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[int]:
        assert int(stream) == STREAM
        return (0,)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        if self.out_of_memory:
            return 2, 0
        buffer = ctypes.create_string_buffer(size)
        address = ctypes.addressof(buffer)
        self.memory[address] = buffer
        return 0, address

    def cudaFree(self, address: int) -> tuple[int]:
        self.pending = [c for c in self.pending if address not in c.addresses.values()]
        del self.memory[address]
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: Stream) -> tuple[int]:
        assert int(stream) == STREAM and size <= len(self.memory[to if kind == 1 else source])
        for context in [c for c in self.pending if (to if kind == 1 else source) in c.addresses.values()]:
            context.compute()
            self.pending.remove(context)
        ctypes.memmove(to, source, size)
        return (0,)

    def cudaEventCreate(self) -> tuple[int, dict[str, float]]:
        return 0, {}

    def cudaEventRecord(self, event: dict[str, float], stream: Stream) -> tuple[int]:
        event["at"] = self.now
        return (0,)

    def cudaEventSynchronize(self, event: dict[str, float]) -> tuple[int]:
        return (0,)

    def cudaEventElapsedTime(self, first: dict[str, float], last: dict[str, float]) -> tuple[int, float]:
        return 0, last["at"] - first["at"]


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        batch = self.shapes[self.engine.model.graph.input[0].name][0]
        for value in self.engine.model.graph.output:
            self.shapes[value.name] = tuple(batch if d == -1 else d for d in self.engine.get_tensor_shape(value.name))
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address in self.engine.cuda.memory
        self.addresses[name] = address
        return True

    def _view(self, name: str) -> np.ndarray[Any, Any]:
        buffer = self.engine.cuda.memory[self.addresses[name]]
        dtype, shape = np.dtype(self.engine.dtype(name)), self.shapes[name]
        return np.frombuffer(buffer, dtype, count=int(np.prod(shape))).reshape(shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        if self not in self.engine.cuda.pending:
            self.engine.cuda.pending.append(self)
        self.engine.cuda.now += self.engine.ms
        return True

    def compute(self) -> None:
        out = self.engine.session.run(None, {v.name: self._view(v.name) for v in self.engine.model.graph.input})
        for value, array in zip(self.engine.model.graph.output, out, strict=True):
            self._view(value.name)[...] = array


class Engine:
    def __init__(self, trt: Any, cuda: Cuda, model: onnx.ModelProto, batch: int) -> None:
        self.trt, self.cuda, self.model, self.batch = trt, cuda, model, batch
        self.session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        self.values = {v.name: v.type.tensor_type for v in (*model.graph.output, *model.graph.input)}
        self.ms = predict(model, L4, batch, 1).latency_ms
        self.num_io_tensors = len(self.values)

    def dtype(self, name: str) -> Any:
        return onnx.helper.tensor_dtype_to_np_dtype(self.values[name].elem_type)

    def get_tensor_name(self, i: int) -> str:
        names: list[str] = list(self.values)
        return names[i]

    def get_tensor_mode(self, name: str) -> Any:
        fed = name in {v.name for v in self.model.graph.input}
        return self.trt.TensorIOMode.INPUT if fed else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return {"float32": self.trt.float32, "int64": self.trt.int64}[str(self.dtype(name))]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        dims = self.values[name].shape.dim
        return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        rest = self.get_tensor_shape(name)[1:]
        return [(1, *rest), (self.batch, *rest), (self.batch, *rest)]

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(dynamic_shapes_kernel_specialization_strategy=None)

    def create_execution_context(self, runtime_config: Any) -> Context:
        strategies = self.trt.DynamicShapesKernelSpecializationStrategy
        assert runtime_config.dynamic_shapes_kernel_specialization_strategy == strategies.EAGER
        return Context(self)

    def create_engine_inspector(self) -> Any:
        fused = {"Name": "conv1 + relu1", "Outputs": [{"Name": "r1", "Format/Datatype": "Half"}]}
        return SimpleNamespace(
            execution_context=None, get_engine_information=lambda form: json.dumps({"Layers": [fused, "pool"]})
        )


class Trt:
    """The real package, but for its runtime. `models`: what each engine was built from."""

    def __init__(self, real: Any, cuda: Cuda) -> None:
        self._real, self._cuda = real, cuda
        self.models: dict[bytes, tuple[onnx.ModelProto, int]] = {}
        for fake, original in ((Engine, real.ICudaEngine), (Context, real.IExecutionContext)):
            for name in vars(fake):
                if not name.startswith("_") and name not in ("dtype", "compute"):
                    assert hasattr(original, name), f"{original.__name__} has no {name}"
        assert hasattr(real.Runtime, "deserialize_cuda_engine") and hasattr(real.ICudaEngine, "num_io_tensors")
        assert hasattr(real.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")
        assert hasattr(real.EngineInspector, "get_engine_information")
        assert hasattr(real.EngineInspector, "execution_context")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def Runtime(self, log: Any) -> Any:
        def deserialize(data: bytes) -> Engine | None:
            found = self.models.get(data)
            if found is None:
                log.messages.append("the file is no engine")
                return None
            return Engine(self._real, self._cuda, *found)

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


def remembering(trt: Trt, build: Callable[..., Any], *, builds: bool) -> Callable[..., Any]:
    """`engine.build`, which tells the emulated runtime what its engines compute; or one that builds nothing else."""

    def built(sdk: Any, model: onnx.ModelProto, capability: str, batch: int) -> Any:
        count = len(trt.models)
        made = build(sdk, model, capability, batch) if builds else engine.Engine(f"engine {count}".encode(), 0.0)
        kept = onnx.ModelProto()
        kept.CopyFrom(model)
        trt.models[made.data] = (kept, batch)
        return made

    return built


def emulate(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (8, 9), *, builds: bool = True
) -> tuple[TensorRTBackend, Cuda]:
    """A backend that finds an emulated GPU of the compute capability; the packages must be installed. Without `builds`
    engines are a word each, and made at once."""
    real = sdk.load(sdk.RTX)
    assert real is not None and gpu.cuda is not None
    cuda = Cuda(gpu.cuda, capability)
    trt = Trt(real.module, cuda)
    monkeypatch.setattr(gpu, "cuda", cuda)
    monkeypatch.setattr(sdk, "load", lambda package: sdk.Sdk(package, trt) if package == sdk.RTX else None)
    monkeypatch.setattr(engine, "build", remembering(trt, engine.build, builds=builds))
    return TensorRTBackend("SM" + "".join(map(str, capability))), cuda
