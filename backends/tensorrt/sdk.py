"""NVIDIA's two packages that build engines, which have the same interface but for what is said here.

`tensorrt_rtx` (on PyPI) builds for a compute capability on a machine without a GPU. The full `tensorrt` builds for the
GPU that is here, for data-centre GPUs too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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


def load(package: str) -> Sdk | None:
    """The package; None if it is not installed, or broken."""
    try:
        module = import_module(package)
    except (ImportError, OSError, RuntimeError):  # a missing or broken library is an answer of capabilities()
        return None
    return Sdk(package, module) if hasattr(module, "Builder") else None  # an empty folder can be imported too


def choose(capability: str, *, here: bool) -> tuple[Sdk | None, str]:
    """The package that builds for GPUs of `capability`, the full one first where such a GPU is `here`; or None, and
    what is missing."""
    full, rtx = load(FULL) if here else None, load(RTX)
    if full is not None:
        return full, ""
    if rtx is not None and capability in rtx.capabilities:
        return rtx, ""
    if rtx is None:
        return None, f"the package {RTX} is not installed (pip install {RTX})"
    known = ", ".join(rtx.capabilities)
    return None, (
        f"{RTX} {rtx.version} builds for {known}, not for {capability}; that takes NVIDIA's full {FULL} (pip install "
        f"{FULL}) on a machine with such a GPU"
    )
