"""TensorRT as a hantc backend: FP16 and INT8 engines for GPUs that need not be here.

An extra: `pip install hantc[tensorrt]`.

Where no such GPU is here, engines are built ahead of time by NVIDIA's `tensorrt_rtx`, latencies are the roofline
model's, with the GPU's ceilings, and numbers are ONNX Runtime's on the CPU. Where one is, both are its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from hantc.backends import predicted
from hantc.backends.feeds import random_feeds, timing_feeds
from hantc.backends.prediction import Machine
from hantc.backends.tensorrt import engine, gpu, sdk
from hantc.backends.tensorrt.session import Session
from hantc.core.backend_api import Artefact, BuildSpec, Capabilities, Deployed, Feeds
from hantc.core.errors import HantcError, ModelError
from hantc.core.timing import measure_artefacts
from hantc.core.types import Device, Protocol, Timing

ENGINE = "model.engine"
_USUAL = "SM89"
_BROKEN = 1e9  # the error of outputs that are no numbers where the file's are
L4 = Machine(  # as backends/machines/l4.toml has it: what there is without a target
    name="NVIDIA L4",
    peak_fp32=1.515e13,
    peak_fp16=6.05e13,
    peak_int8=1.21e14,
    bandwidth=2.4e11,
    bandwidth_max=2.4e11,
    op_overhead_s=4e-6,
    parallel_efficiency=1.0,
)


@dataclass(frozen=True)
class _Handle:
    """An engine on the GPU that is here."""

    session: Session
    outputs: tuple[str, ...]  # in the graph's order
    threads: int
    no_feeds: str  # why there are no timing feeds, or ""


@dataclass(frozen=True)
class _Ready:
    """What there is to work with. `trouble`: why a GPU that is here is not used."""

    sdk: sdk.Sdk | None
    gpu: gpu.Gpu | None
    trouble: str


class TensorRTBackend:
    """Builds engines for one kind of GPU, `capability`, whose ceilings are `machine`; runs and times them where such a
    GPU is here. Without a `capability`: for the GPU that is here, else for an L4."""

    name = "tensorrt"

    def __init__(self, capability: str | None = None, machine: Machine = L4) -> None:
        self.capability, self.machine = capability or _USUAL, machine
        if capability is None and (found := gpu.find()) is not None:
            self.capability = found.capability
            if self._ready.gpu is None:  # it is of no use
                self.capability = _USUAL
                del self._ready

    @cached_property
    def _ready(self) -> _Ready:
        """The package that builds, and the GPU if one is here and an engine of it has shown that it runs there."""
        trouble = ""
        found = gpu.find(self.capability)
        if found is not None:
            for used in sdk.builders(self.capability, here=True):
                try:
                    opened = gpu.Gpu(found)
                    _prove(used, opened)
                except Exception as e:  # what a driver and a library of other versions say to each other
                    trouble = f"{found.name} is here but not used: {getattr(e, 'message', None) or e}"
                else:
                    return _Ready(used, opened, "")
        ahead = sdk.builders(self.capability, here=False)
        return _Ready(ahead[0] if ahead else None, None, trouble)

    @property
    def _sdk(self) -> sdk.Sdk:
        if self._ready.sdk is None:
            raise HantcError(sdk.missing(self.capability))
        return self._ready.sdk

    @property
    def _here(self) -> gpu.Gpu | None:
        here = self._ready.gpu
        if here is not None:
            here.select()
        return here

    def capabilities(self) -> Capabilities:
        """FP16 and INT8, if engines for the GPU can be built here; measures if it is here."""
        chosen, here, trouble = self._ready.sdk, self._ready.gpu, self._ready.trouble
        versions: tuple[tuple[str, str], ...] = (
            ((chosen.package, chosen.version),) if chosen is not None else ((sdk.RTX, ""),)
        )
        flags = (self.capability, *predicted.ceilings(self.machine))
        device = Device(f"{self.machine.name} ({self.capability})", flags, cores=1, versions=versions)
        if chosen is None:
            reason = sdk.missing(self.capability)
            return Capabilities(False, reason, (), device, measures=False, notes=(trouble,) if trouble else ())
        builds = f"{chosen.package} {chosen.version} builds engines for"
        precisions = ("fp16", "int8")
        if here is not None:
            found = here.found
            versions = (*versions, ("CUDA driver", found.driver))
            device = Device(f"{found.name} ({self.capability})", (self.capability,), found.processors, versions)
            told = f"{builds} {found.name} ({self.capability}), which is here"
            return Capabilities(True, told, precisions, device, measures=True, symmetric=True)
        note = (
            f"no {self.machine.name} was used: latencies are predicted by a roofline model of it, and outputs "
            "are ONNX Runtime's, which computes FP16 in FP32 on most CPUs"
        )
        return Capabilities(
            available=True,
            reason=f"{builds} {self.machine.name} ({self.capability})",
            precisions=precisions,
            device=device,
            measures=False,
            symmetric=True,
            notes=(note, trouble) if trouble else (note,),
        )

    def supports(self, model: onnx.ModelProto) -> tuple[bool, str]:
        """Whether TensorRT parses the model, and every shape can be inferred."""
        try:
            engine.parse(self._sdk, model)
        except HantcError as e:
            return False, e.message
        return predicted.supports(model, self.machine)

    def build(self, model: onnx.ModelProto, spec: BuildSpec) -> Artefact:
        """An engine on the GPU where it is here, for batches of up to `spec.batch`; else a check and a prediction.
        ModelError if TensorRT does not take the model."""
        here = self._here
        if here is None:
            artefact = predicted.build(model, self.machine, spec)
            engine.parse(self._sdk, model)
            return artefact
        made = engine.build(self._sdk, model, self.capability, spec.batch)
        feeds, problem = timing_feeds(model, spec.batch)
        handle = _Handle(Session(self._sdk, here, made.data), _outputs(model), spec.threads, problem)
        return Artefact(handle, feeds, size_bytes=len(made.data))

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        """Interleaved latencies by the GPU's own events (`hantc.core.timing`); or the predictions, with no spread and
        no samples."""
        here = self._here
        if here is None:
            return predicted.timings(artefacts)
        return measure_artefacts(artefacts, protocol, _bound_run, lambda e: f"TensorRT fails: {e}", here.clock)

    def run(self, artefact: Artefact, feeds: Feeds) -> list[np.ndarray[Any, Any]]:
        """Run on the GPU; or with ONNX Runtime, for the numbers. ModelError if it cannot."""
        if self._here is None:
            return predicted.run(artefact, feeds)
        handle: _Handle = artefact.handle
        try:
            found = handle.session.run(feeds)
        except HantcError:
            raise
        except Exception as e:  # TensorRT's and numpy's share no base class
            raise ModelError(f"TensorRT cannot run the model: {e}") from e
        return [found[name] for name in handle.outputs]

    def deploy(self, model: onnx.ModelProto, spec: BuildSpec) -> Deployed:
        """The engine for batches of up to `spec.batch`, with its layers' types and the builder's messages; where its
        GPU is here, what it is made of and how far its outputs are from ONNX Runtime's in FP32."""
        here = self._here
        made = engine.build(self._sdk, model, self.capability, spec.batch)
        facts = {
            "compute_capability": self.capability,
            "built_by": f"{self._sdk.package} {self._sdk.version}",
            "size_bytes": len(made.data),
            "seconds": round(made.seconds, 2),
            "layers": dict(made.layers),
            "products": dict(made.products),
            "float32_layers": list(made.float32),
            "messages": list(made.messages),
        }
        if here is not None:
            try:
                facts |= self._checked(model, made.data, spec, here)
            except Exception as e:  # the engine is there all the same
                facts["not_run"] = str(getattr(e, "message", None) or e)
        return Deployed(made.data, ENGINE, facts)

    def _checked(self, model: onnx.ModelProto, data: bytes, spec: BuildSpec, here: gpu.Gpu) -> Mapping[str, Any]:
        """What the engine's own GPU says of it."""
        session, feeds = Session(self._sdk, here, data), random_feeds(model, spec.batch)
        found = session.run(feeds)
        want = predicted.run(predicted.build(model, self.machine, spec), feeds)
        pairs = zip((found[n] for n in _outputs(model)), want, strict=True)
        away = [float(np.abs(g.astype(float) - w).max() / max(np.abs(w).max(), 1e-12)) for g, w in pairs if w.size]
        error: float | None = max(away, default=0.0)
        if not all(map(math.isfinite, away)):  # the file's own values may overflow in FP16 on random input
            error = _BROKEN if all(np.isfinite(w).all() for w in want) else None
        return {"run_on": here.found.name, "kernels": dict(session.kernels()), "relative_error": error}


def _outputs(model: onnx.ModelProto) -> tuple[str, ...]:
    return tuple(o.name for o in model.graph.output)


def _bound_run(artefact: Artefact) -> Callable[[], object]:
    handle: _Handle = artefact.handle
    if handle.no_feeds:
        raise ModelError(f"the model cannot be timed: {handle.no_feeds}")
    return handle.session.bound(artefact.feeds)


def _prove(used: sdk.Sdk, here: gpu.Gpu) -> None:
    """A small engine built, loaded and run. HantcError if it cannot be, or computes something else."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 4])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 4])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "proof", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    made = engine.build(used, model, here.found.capability, batch=2)
    values = np.array([[-1, 0, 1, 2], [3, -4, 5, -6]], np.float32)
    got = Session(used, here, made.data).run({"x": values})
    if not np.array_equal(got["y"], np.maximum(values, 0)):
        raise HantcError("a small engine computes something else on it")
