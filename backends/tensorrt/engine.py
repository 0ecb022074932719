"""TensorRT engines from ONNX files, ahead of time: the GPU is named, not used.

Networks are strongly typed: every layer computes in the type that the file gives it, so that nothing falls back to
FP32 silently, and what does is found before the build.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import onnx

from hantc.backends.tensorrt.sdk import Sdk
from hantc.core.errors import HantcError, ModelError

_TYPES = MappingProxyType({"HALF": "fp16", "FLOAT": "fp32"})  # the others as TensorRT calls them
_PRODUCTS = frozenset({"CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY"})
_MOVING = frozenset({"CAST", "CONSTANT", "SHUFFLE", "IDENTITY"})  # compute nothing


@dataclass(frozen=True)
class Engine:
    """A serialized engine. `layers`: how many of the network's layers make each type; `products`: how many convolutions
    and matrix products compute in each (INT8: of dequantised values); `float32`: names of the layers that compute in
    FP32; `messages`: what the builder said, warnings and errors."""

    data: bytes
    seconds: float
    layers: Mapping[str, int] = field(default_factory=dict)
    products: Mapping[str, int] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Parsed:
    """A network definition, and what must live as long as it does."""

    network: Any
    builder: Any
    parser: Any
    messages: list[str]  # what TensorRT has said since


def listen(sdk: Sdk) -> list[str]:
    """A list of what TensorRT says from now on, until somebody else listens."""
    sdk.log.messages = []
    heard: list[str] = sdk.log.messages
    return heard


def parse(sdk: Sdk, model: onnx.ModelProto) -> _Parsed:
    """The model as a strongly typed network. ModelError with the parser's reason if TensorRT does not take it."""
    trt, heard = sdk.module, listen(sdk)
    builder = trt.Builder(sdk.log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, sdk.log)
    if not parser.parse(model.SerializeToString()) or not network.num_outputs:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        errors = [e for e in errors if "CUDA driver" not in e.desc()] or errors  # that no GPU is here is no reason
        text = "; ".join(f"{e.desc()} (node {e.node_name() or e.node()})" for e in errors) or "it has no outputs"
        raise ModelError(f"TensorRT does not take the model: {text}")
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    if strange := [n for n in names if n not in {v.name for v in model.graph.input}]:
        raise ModelError(f"TensorRT does not take the model: it renames an input that is an output too ({strange[0]})")
    return _Parsed(network, builder, parser, heard)


def build(sdk: Sdk, model: onnx.ModelProto, capability: str, batch: int) -> Engine:
    """An engine for a GPU of `capability`, for batches of 1 to `batch` where the model's batch is free, tuned for
    `batch`. HantcError with the builder's messages if it cannot be built."""
    started = time.monotonic()
    parsed = parse(sdk, model)
    network, builder = parsed.network, parsed.builder
    config = builder.create_builder_config()
    config.profiling_verbosity = sdk.module.ProfilingVerbosity.DETAILED  # the inspector tells types by it
    if profile := _profile(network, builder, batch):
        config.add_optimization_profile(profile)
    if sdk.ahead:
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(sdk.module.ComputeCapability, capability), 0):
            raise HantcError(f"{sdk.package} does not build for {capability}")
    layers, products, float32 = _types(network)
    data = builder.build_serialized_network(network, config)
    messages = tuple(dict.fromkeys(parsed.messages))
    if data is None:
        raise HantcError(f"TensorRT builds no engine for {capability}: {'; '.join(messages) or 'without a reason'}")
    seconds = time.monotonic() - started
    return Engine(bytes(data), seconds, MappingProxyType(layers), MappingProxyType(products), float32, messages)


def _profile(network: Any, builder: Any, batch: int) -> Any:
    """The batch sizes allowed, None where all inputs are fixed."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    free = [i for i in inputs if -1 in tuple(i.shape)]
    if not free:
        return None
    profile = builder.create_optimization_profile()
    for i in free:
        shape = tuple(i.shape)
        if -1 in shape[1:]:
            raise ModelError(
                f"input {i.name!r} has free sizes beside the batch: {shape}",
                hint="export the model with a fixed resolution",
            )
        profile.set_shape(i.name, (1, *shape[1:]), (batch, *shape[1:]), (batch, *shape[1:]))
    return profile


def _types(network: Any) -> tuple[dict[str, int], dict[str, int], tuple[str, ...]]:
    """Layers by the type that they make, products by that which they compute in, and layers that compute in FP32."""
    count: Counter[str] = Counter()
    products: Counter[str] = Counter()
    float32, dequantised = [], set()
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if not layer.num_outputs:
            continue
        dtype = layer.get_output(0).dtype
        name = _TYPES.get(dtype.name, dtype.name.lower())
        count[name] += 1
        if layer.type.name == "DEQUANTIZE":
            dequantised.add(layer.get_output(0).name)
        if layer.type.name in _PRODUCTS:
            products["int8" if layer.get_input(0).name in dequantised else name] += 1
        if dtype.name == "FLOAT" and layer.type.name not in _MOVING:
            float32.append(layer.name)
    return dict(count), dict(products), tuple(float32)
