"""The interface every backend implements; passes see backends only through this file.

A third party adds a backend by an entry point in the group `hantc.backends` whose object is a class with
these methods. A missing SDK or device is an answer of `capabilities()`, never an ImportError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx

from hantc.core.types import Device, Timing
from hantc.core.types import Protocol as TimingProtocol

Feeds = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do here and now."""

    available: bool
    reason: str  # why not, or a short description
    precisions: tuple[str, ...]
    device: Device
    measures: bool  # False: figures are predicted, never timed
    notes: tuple[str, ...] = ()  # e.g. "no VNNI: INT8 weights use a reduced range"
    reduce_range: bool = False  # INT8 weights must keep to 7 bits
    symmetric: bool = False  # INT8 activations are signed, about zero; biases stay floats
    channel_block: int = 0  # channels in a block, where float convolutions hold activations in blocks (else 0)


@dataclass(frozen=True)
class BuildSpec:
    """How to build. The precision is already in the ONNX graph (QDQ nodes, FP16 tensors)."""

    threads: int = 1
    batch: int = 1


@dataclass(frozen=True)
class Artefact:
    """Something built that can be run and timed. `handle` belongs to the backend."""

    handle: Any
    feeds: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)  # ready-made input for timing
    size_bytes: int = 0


@dataclass(frozen=True)
class Deployed:
    """What a backend makes of a finished network for its device: a file's content, and facts for the summary."""

    data: bytes
    file: str  # its name in the run folder
    facts: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Backend(Protocol):
    """An inference engine on a device."""

    name: str

    def capabilities(self) -> Capabilities:
        """What can be done here."""
        ...

    def supports(self, model: onnx.ModelProto) -> tuple[bool, str]:
        """Whether the engine takes this model; if not, why."""
        ...

    def build(self, model: onnx.ModelProto, spec: BuildSpec) -> Artefact:
        """Compile the model. Symbolic batch dims become `spec.batch` in the artefact's timing feeds."""
        ...

    def measure(self, artefacts: Sequence[Artefact], protocol: TimingProtocol) -> list[Timing]:
        """Time the artefacts interleaved with each other; one Timing each, in order."""
        ...

    def run(self, artefact: Artefact, feeds: Feeds) -> list[np.ndarray[Any, Any]]:
        """Run once; outputs in the graph's order."""
        ...


@runtime_checkable
class Optimizer(Protocol):
    """A backend that can write down what it makes of a model on this machine, so that it need not do so again."""

    def optimized(self, model: onnx.ModelProto, spec: BuildSpec) -> Deployed:
        """The model as the engine has rewritten it, for this machine alone. ModelError if it does not take it."""
        ...


@runtime_checkable
class Deployer(Protocol):
    """A backend that has a format of its own for finished networks, beside ONNX."""

    def deploy(self, model: onnx.ModelProto, spec: BuildSpec) -> Deployed:
        """The network as its device loads it, for batches of up to `spec.batch`. HantcError if it cannot be made."""
        ...
