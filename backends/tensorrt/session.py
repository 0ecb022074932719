"""A TensorRT engine on the GPU that is here: loaded, fed, run, and asked what it is made of."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np

from hantc.backends.tensorrt.engine import listen
from hantc.backends.tensorrt.gpu import Gpu
from hantc.backends.tensorrt.sdk import Sdk
from hantc.core.backend_api import Feeds
from hantc.core.errors import ModelError

Array = np.ndarray[Any, Any]


class Session:
    """A loaded engine, with memory for one set of input shapes at a time. ModelError if the GPU does not take it."""

    def __init__(self, sdk: Sdk, gpu: Gpu, data: bytes) -> None:
        trt = self._trt = sdk.module
        self._gpu, self._sdk = gpu, sdk
        heard = listen(sdk)
        self._runtime = trt.Runtime(sdk.log)
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise self._refusal("does not load the engine", heard)
        self._context = self._make_context()
        if self._context is None:
            raise self._refusal("cannot run the engine", heard)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        fed = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.inputs, self._outputs = tuple(fed), tuple(n for n in names if n not in fed)
        self._memory: dict[str, tuple[int, int]] = {}  # (address, bytes) by tensor
        weakref.finalize(self, _release, gpu, self._memory).atexit = False  # the driver frees what is left

    def _make_context(self) -> Any:
        """With kernels made for the shapes that it is fed, before the first run and not beside later ones
        (tensorrt_rtx's own default: what is timed first would be a stopgap)."""
        strategies = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is None:
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return self._engine.create_execution_context(config)

    def _refusal(self, what: str, heard: list[str]) -> ModelError:
        told = "; ".join(dict.fromkeys(heard)) or "it does not say why"
        return ModelError(f"TensorRT {what} on {self._gpu.found.name}: {told}")

    def feed(self, feeds: Feeds) -> None:
        """Put the inputs where the next run finds them. ModelError if they are not the model's."""
        if set(feeds) != set(self.inputs):
            wanted, got = (", ".join(sorted(names)) or "nothing" for names in (self.inputs, feeds))
            raise ModelError(f"TensorRT cannot run the model: it takes {wanted}, and was given {got}")
        for name in self.inputs:
            shape, dtype = tuple(np.shape(feeds[name])), self._dtype(name)
            if not self._fits(name, shape) or not self._context.set_input_shape(name, shape):
                raise ModelError(f"TensorRT cannot run the model: input {name!r} may not have the shape {shape}")
            array = np.ascontiguousarray(feeds[name], dtype=dtype)
            self._gpu.upload(self._place(name, array.nbytes), array)
        if missing := self._context.infer_shapes():
            raise ModelError(f"TensorRT cannot run the model: the shape of {', '.join(missing)} is not known")
        for name in self._outputs:
            self._place(name, prod(self._output_shape(name)) * self._dtype(name).itemsize)

    def _fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the engine was built for the shape: TensorRT's own check prints, and lets some ranks pass."""
        declared = tuple(self._engine.get_tensor_shape(name))
        if len(declared) != len(shape) or any(d not in (-1, s) for d, s in zip(declared, shape, strict=True)):
            return False
        if -1 not in declared:
            return True
        low, _, high = self._engine.get_tensor_profile_shape(name, 0)
        return all(a <= s <= b for a, s, b in zip(tuple(low), shape, tuple(high), strict=True))

    def _output_shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise ModelError(f"TensorRT cannot run the model: the shape of output {name!r} depends on values")
        return shape

    def _dtype(self, name: str) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
        return dtype

    def _place(self, name: str, size: int) -> int:
        """Where a tensor of `size` bytes lies, on memory that is kept while it is large enough."""
        address, held = self._memory.get(name, (0, -1))
        if held < size:
            if held >= 0:
                del self._memory[name]
                self._gpu.free(address)
            address = self._gpu.allocate(size)
            self._memory[name] = (address, size)
        self._context.set_tensor_address(name, address)
        return address

    def enqueue(self) -> None:
        """Put one run on the stream. ModelError if TensorRT refuses it."""
        if not self._context.execute_async_v3(self._gpu.stream):
            raise self._refusal("fails while running the model", self._sdk.log.messages[-1:])

    def fetch(self) -> dict[str, Array]:
        """The outputs of the last run, by name."""
        found = {}
        for name in self._outputs:
            found[name] = np.empty(self._output_shape(name), self._dtype(name))
            self._gpu.download(found[name], self._memory[name][0])
        return found

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Outputs by name, for any number of images: in as many runs as the engine's largest batch asks for. ModelError
        if the feeds do not fit the model."""
        most = self._most(feeds)
        if most is None:
            self.feed(feeds)
            self.enqueue()
            return self.fetch()
        free = {name for name in feeds if name in self.inputs and self._free(name)}
        n = max(len(feeds[name]) for name in free)
        parts = [
            self.run({k: a[i : i + most] if k in free else a for k, a in feeds.items()}) for i in range(0, n, most)
        ]
        return {k: np.concatenate([p[k] for p in parts]) if self._free(k) else parts[0][k] for k in parts[0]}

    def _free(self, name: str) -> bool:
        """Whether a tensor's first dim is the batch, and open."""
        return tuple(self._engine.get_tensor_shape(name))[:1] == (-1,)

    def _most(self, feeds: Feeds) -> int | None:
        """The engine's largest batch, if the feeds' is larger."""
        open_ = [n for n, a in feeds.items() if n in self.inputs and np.ndim(a) and self._free(n)]
        highest = [tuple(self._engine.get_tensor_profile_shape(name, 0)[2]) for name in open_]
        most = min((int(shape[0]) for shape in highest), default=0)
        return most if any(len(feeds[name]) > most for name in open_) else None

    def bound(self, feeds: Feeds) -> Callable[[], None]:
        """A call that puts one run on these feeds on the stream."""
        self.feed(feeds)
        return self.enqueue

    def kernels(self) -> Mapping[str, Any]:
        """What the engine is made of, from TensorRT's inspector: how many `layers`, the names of those that several of
        the network's layers were `fused` into, and how many make each type (`types`)."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        return summarise(text)


def summarise(text: str) -> Mapping[str, Any]:
    """The inspector's JSON in short. Layers are names alone, or objects with their tensors, as the engine was built."""
    try:
        layers = json.loads(text)["Layers"]
    except (json.JSONDecodeError, KeyError, TypeError):
        layers = None
    if not isinstance(layers, list):
        return {"layers": None, "fused": [], "types": {}}
    named = [str(layer.get("Name", "")) if isinstance(layer, Mapping) else str(layer) for layer in layers]
    types: Counter[str] = Counter()
    for layer in layers:
        made = layer.get("Outputs") if isinstance(layer, Mapping) else None
        for tensor in made if isinstance(made, list) else []:
            if isinstance(tensor, Mapping) and (kind := tensor.get("Format/Datatype") or tensor.get("Datatype")):
                types[str(kind)] += 1
    return {"layers": len(layers), "fused": [n for n in named if "+" in n], "types": dict(types.most_common())}


def _release(gpu: Gpu, memory: dict[str, tuple[int, int]]) -> None:
    while memory:
        gpu.free(memory.popitem()[1][0])
