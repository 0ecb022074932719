"""TensorRT as a hantc backend: FP16 and INT8 engines for GPUs that need not be here.

An extra: `pip install hantc[tensorrt]`.

Engines are built ahead of time by NVIDIA's `tensorrt_rtx`. Running and timing one needs its GPU and is not built
yet: latencies are the roofline model's, with the GPU's ceilings, and numbers are ONNX Runtime's on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from hantc.backends import predicted
from hantc.backends.prediction import Machine
from hantc.backends.tensorrt import engine
from hantc.core.backend_api import Artefact, BuildSpec, Capabilities, Deployed, Feeds
from hantc.core.errors import HantcError
from hantc.core.types import Device, Protocol, Timing

ENGINE = "model.engine"
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


class TensorRTBackend:
    """Builds engines for one kind of GPU, `capability`, whose ceilings are `machine`."""

    name = "tensorrt"

    def __init__(self, capability: str = "SM89", machine: Machine = L4) -> None:
        self.capability, self.machine = capability, machine

    def capabilities(self) -> Capabilities:
        """FP16 and INT8, if engines for the GPU can be built here; never measures."""
        version, known = engine.version(), engine.known_capabilities()
        versions = ((engine.PACKAGE, version or ""),)
        flags = (self.capability, *predicted.ceilings(self.machine))
        device = Device(f"{self.machine.name} ({self.capability})", flags, cores=1, versions=versions)
        reason = ""
        if version is None:
            reason = f"the package {engine.PACKAGE} is not installed (pip install {engine.PACKAGE})"
        elif self.capability not in known:
            reason = (
                f"{engine.PACKAGE} {version} builds for {', '.join(known)}, not for {self.capability}; that takes "
                "NVIDIA's full tensorrt on such a machine, which hantc does not drive yet"
            )
        if reason:
            return Capabilities(False, reason, (), device, measures=False)
        return Capabilities(
            available=True,
            reason=f"{engine.PACKAGE} {version} builds engines for {self.machine.name} ({self.capability})",
            precisions=("fp16", "int8"),
            device=device,
            measures=False,
            symmetric=True,
            notes=(
                f"no {self.machine.name} was used: latencies are predicted by a roofline model of it, and outputs "
                "are ONNX Runtime's, which computes FP16 in FP32 on most CPUs",
            ),
        )

    def supports(self, model: onnx.ModelProto) -> tuple[bool, str]:
        """Whether TensorRT parses the model, and every shape can be inferred."""
        try:
            engine.parse(model)
        except HantcError as e:
            return False, e.message
        return predicted.supports(model, self.machine)

    def build(self, model: onnx.ModelProto, spec: BuildSpec) -> Artefact:
        """Check and predict; an engine is made by `deploy` alone. ModelError if TensorRT does not take the model."""
        artefact = predicted.build(model, self.machine, spec)
        engine.parse(model)
        return artefact

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        """The predictions, with no spread and no samples."""
        return predicted.timings(artefacts)

    def run(self, artefact: Artefact, feeds: Feeds) -> list[np.ndarray[Any, Any]]:
        """Run with ONNX Runtime, for the numbers. ModelError if it cannot."""
        return predicted.run(artefact, feeds)

    def deploy(self, model: onnx.ModelProto, spec: BuildSpec) -> Deployed:
        """The engine for batches of up to `spec.batch`, with its layers' types and the builder's messages."""
        made = engine.build(model, self.capability, spec.batch)
        facts = {
            "compute_capability": self.capability,
            "built_by": f"{engine.PACKAGE} {engine.version()}",
            "size_bytes": len(made.data),
            "seconds": round(made.seconds, 2),
            "layers": dict(made.layers),
            "products": dict(made.products),
            "float32_layers": list(made.float32),
            "messages": list(made.messages),
        }
        return Deployed(made.data, ENGINE, facts)
