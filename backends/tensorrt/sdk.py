"""NVIDIA's two packages that build engines, which have the same interface but for what is said here.

`tensorrt_rtx` (on PyPI) builds for a compute capability on a machine without a GPU. The full `tensorrt` builds for the
GPU that is here, for data-centre GPUs too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from typing import Any

RTX, FULL = "tensorrt_rtx", "tensorrt"


@dataclass(frozen=True)
class Sdk:
    """One of the two packages, loaded."""

    package: str
    module: Any = field(repr=False, compare=False)

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def ahead(self) -> bool:
        """Whether engines are built for a GPU that is named, not for the one that is here."""
        return self.package == RTX

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities that can be named: "SM75", …"""
        names = dir(self.module.ComputeCapability) if self.ahead else ()
        return tuple(sorted((n for n in names if n.startswith("SM")), key=lambda n: int(n[2:])))

    @cached_property
    def log(self) -> Any:
        """The one logger of all builders and runtimes, which keeps `messages`, warnings and worse: TensorRT holds on to
        the first that it is given, and complains of others."""
        trt = self.module

        class Log(trt.ILogger):  # type: ignore[misc, name-defined]  # tensorrt is untyped
            """Keeps what TensorRT says instead of printing it."""

            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.messages: list[str] = []

            def log(self, severity: Any, msg: str) -> None:
                """Warnings and worse."""
                if severity <= trt.ILogger.Severity.WARNING:
                    self.messages.append(msg.strip())

        return Log()


@cache
def load(package: str) -> Sdk | None:
    """The package; None if it is not installed, or broken."""
    try:
        module = import_module(package)
    except (ImportError, OSError, RuntimeError):  # a missing or broken library is an answer of capabilities()
        return None
    return Sdk(package, module) if hasattr(module, "Builder") else None  # an empty folder can be imported too


def builders(capability: str, *, here: bool) -> tuple[Sdk, ...]:
    """The packages that build for GPUs of `capability`; the full one first where such a GPU is `here`."""
    full, rtx = load(FULL) if here else None, load(RTX)
    ahead = rtx if rtx is not None and capability in rtx.capabilities else None
    return tuple(s for s in (full, ahead) if s is not None)


def missing(capability: str) -> str:
    """Why there is no builder for GPUs of `capability`."""
    rtx = load(RTX)
    if rtx is None:
        return f"the package {RTX} is not installed (pip install {RTX})"
    return (
        f"{RTX} {rtx.version} builds for {', '.join(rtx.capabilities)}, not for {capability}; that takes NVIDIA's full "
        f"{FULL} (pip install {FULL}) on a machine with such a GPU"
    )
