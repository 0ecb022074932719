"""OpenVINO on the CPU, as a hantc backend. An extra: `pip install hantc[openvino]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import onnx

from hantc.backends.device import cpu_capabilities
from hantc.backends.feeds import input_dims, timing_feeds
from hantc.backends.openvino.trial import doubtful, flaw
from hantc.core.backend_api import Artefact, BuildSpec, Capabilities, Feeds
from hantc.core.errors import HantcError, ModelError
from hantc.core.timing import measure_artefacts
from hantc.core.types import Protocol, Timing
from hantc.dialect.floats import Floats, floats_of

try:
    import openvino as ov
except ImportError:  # a missing library is an answer of capabilities()
    ov = None

_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class _Handle:
    """A model as read, and its compiled forms: one for each set of input shapes that it was run at."""

    data: bytes
    inputs: frozenset[str]
    threads: int
    floats: Floats
    doubtful: bool  # whether compiling it may end the process
    no_feeds: str  # why there are no timing feeds, or ""
    requests: dict[_Shapes, Any] = field(default_factory=dict)  # openvino.InferRequest

    def request(self, feeds: Feeds) -> Any:
        """The compiled form for the shapes of `feeds`: fixed shapes run faster than dynamic ones."""
        shapes = tuple((name, tuple(np.shape(a))) for name, a in sorted(feeds.items()))
        if shapes not in self.requests:
            if self.doubtful and (wrong := flaw(self.data, shapes, options(self.threads, self.floats))):
                raise ModelError(f"OpenVINO does not take the model: {wrong}")
            self.requests[shapes] = _compile(self.data, shapes, self.threads, self.floats)
        return self.requests[shapes]


class OpenVinoBackend:
    """Runs ONNX models with OpenVINO's CPU plugin."""

    name = "openvino"

    def capabilities(self) -> Capabilities:
        """FP32 and INT8 (QDQ) on this machine's CPU, and BF16 where OpenVINO says that the CPU has it."""
        here = cpu_capabilities("OpenVINO", "openvino", None if ov is None else ov.__version__.split("-")[0])
        return replace(here, precisions=(*here.precisions, "bf16")) if here.available and _has_bf16() else here

    def supports(self, model: onnx.ModelProto) -> tuple[bool, str]:
        """Whether OpenVINO reads the model."""
        try:
            _read(model.SerializeToString())
        except HantcError as e:
            return False, e.message
        return True, ""

    def build(self, model: onnx.ModelProto, spec: BuildSpec) -> Artefact:
        """Compiled at the shapes of the timing feeds, with `spec.threads` threads, in BF16 if the model is marked so
        (`hantc.dialect.floats`) and the CPU has it. ModelError if OpenVINO refuses it.

        A model with symbolic dims beside the batch gets no timing feeds: it runs, but `measure` refuses it.
        """
        data = model.SerializeToString()
        _read(data)
        feeds, problem = timing_feeds(model, spec.batch)
        handle = _Handle(data, frozenset(input_dims(model)), spec.threads, floats_of(model), doubtful(model), problem)
        if not problem:
            handle.request(feeds)
        return Artefact(handle=handle, feeds=feeds, size_bytes=len(data))

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        """Interleaved latencies (`hantc.core.timing`)."""
        return measure_artefacts(
            artefacts, protocol, bound_run, lambda e: f"OpenVINO fails while running the model: {_first_line(e)}"
        )

    def run(self, artefact: Artefact, feeds: Feeds) -> list[np.ndarray[Any, Any]]:
        """Outputs in the graph's order. ModelError if the feeds do not fit the model."""
        if set(feeds) != artefact.handle.inputs:  # OpenVINO itself would run on what it was fed last
            wanted, got = (", ".join(sorted(names)) or "nothing" for names in (artefact.handle.inputs, feeds))
            raise ModelError(f"OpenVINO cannot run the model: it takes {wanted}, and was given {got}")
        try:
            request = artefact.handle.request(feeds)
            request.infer(_tensors(feeds))
            # copies: the request's own memory is written again by its next run
            return [np.array(request.get_output_tensor(i).data) for i in range(len(request.model_outputs))]
        except HantcError:
            raise
        except Exception as e:  # openvino's exceptions are RuntimeErrors and others
            raise ModelError(f"OpenVINO cannot run the model: {_first_line(e)}") from e


@cache
def _core() -> Any:
    if ov is None:
        raise HantcError("the package openvino is not installed", hint="pip install openvino")
    return ov.Core()


@cache
def _has_bf16() -> bool:
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _read(data: bytes) -> Any:
    if not data:
        raise ModelError("OpenVINO does not take the model: it is empty")
    try:
        return _core().read_model(data)
    except HantcError:
        raise
    except Exception as e:  # openvino's exceptions are RuntimeErrors and others
        raise ModelError(f"OpenVINO does not take the model: {_first_line(e)}") from e


def _compile(data: bytes, shapes: _Shapes, threads: int, floats: Floats) -> Any:
    model = _read(data)
    try:
        model.reshape({name: list(shape) for name, shape in shapes})
        return _core().compile_model(model, "CPU", options(threads, floats)).create_infer_request()
    except Exception as e:  # openvino's exceptions are RuntimeErrors and others
        raise ModelError(f"OpenVINO does not take the model: {_first_line(e)}") from e


def options(threads: int, floats: Floats) -> Mapping[str, Any]:
    """OpenVINO's settings; those of a file that is marked BF16 need the CPU's consent."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        # OpenVINO's own default is BF16 where the CPU has it, which would pass for FP32
        "INFERENCE_PRECISION_HINT": "bf16" if floats == "bf16" and _has_bf16() else "f32",
    }


def _tensors(feeds: Feeds) -> dict[str, Any]:
    return {name: ov.Tensor(np.ascontiguousarray(array)) for name, array in feeds.items()}


def bound_run(artefact: Artefact) -> Callable[[], object]:
    """A call that runs the artefact once on its timing feeds, which are set beforehand."""
    handle: _Handle = artefact.handle
    if handle.no_feeds:
        raise ModelError(f"the model cannot be timed: {handle.no_feeds}")
    request = handle.request(artefact.feeds)
    for name, tensor in _tensors(artefact.feeds).items():
        request.set_tensor(name, tensor)
    return lambda: request.infer(share_outputs=True)  # copying them is not the network's work


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    missing = [line.removeprefix("-- ") for line in lines if line.startswith("-- No conversion rule ")]
    # else its texts begin with the place in its source that raised them
    told = [line for line in lines if not line.startswith(("Exception from ", "Check ", "FrontEnd API "))]
    return (missing or told or lines or [type(error).__name__])[0][:400]
