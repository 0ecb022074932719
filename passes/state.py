"""What passes hand to each other: one frozen state, one context of services."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from onnx import ModelProto
from torch import Tensor, fx, nn

from hantc.core.backend_api import Artefact, Backend, BuildSpec, Capabilities, Deployed
from hantc.core.config import CompileConfig, EffortSettings
from hantc.core.memory import total_memory
from hantc.core.progress import Reporter
from hantc.core.store import Store
from hantc.core.types import CandidateSpec, CostTable, MatchResult, Plan, Protocol, ScoreRow, digest
from hantc.data.dataset import Dataset
from hantc.dialect.qdq import QuantSpec
from hantc.dialect.rewrites.base import Applied, Missed
from hantc.passes.place import CPU, place_of

_SETTLE = 5  # runs that shared caches take to hold of a network what they will

WeightMap = Mapping[str, Tensor]


@dataclass(frozen=True)
class Proposal:
    """A candidate that may replace a region, with its analytic size for one sample."""

    region: str
    spec: CandidateSpec
    macs: int
    params: int


@dataclass(frozen=True)
class Evaluated:
    """One selection, run as a real (not yet fine-tuned) student. `teacher_ms`: the teacher's latency in the same state
    of the host, on the same clock. `loss` and `accuracy` on the search split."""

    plan: Plan
    measured_ms: float
    teacher_ms: float
    loss: float | None
    accuracy: float | None
    chosen: bool = False


@dataclass(frozen=True)
class State:
    """Everything the compiler knows so far; each pass returns a new one."""

    model: ModelProto
    model_hash: str
    given: ModelProto | None = None  # the user's own file, where it is quantised and `model` its dequantised form
    given_hash: str = ""
    teacher: fx.GraphModule | None = None  # as imported
    network: fx.GraphModule | None = None  # normalized; what is matched, distilled from and rewritten
    applied: tuple[Applied, ...] = ()
    missed: tuple[Missed, ...] = ()
    match: MatchResult | None = None
    proposals: tuple[Proposal, ...] | None = None
    skipped: tuple[tuple[str, str, str], ...] = ()  # region, candidate, reason
    costs: CostTable | None = None
    weights: Mapping[tuple[str, str], WeightMap] | None = None  # (region, candidate) → trained tensors
    scores: tuple[ScoreRow, ...] | None = None
    plan: Plan | None = None
    evaluated: tuple[Evaluated, ...] = ()
    student: fx.GraphModule | None = None
    history: tuple[Mapping[str, float], ...] = ()  # fine-tuning: one record per evaluation
    emitted: ModelProto | None = None
    deployed: Deployed | None = None  # the target's own file, where there is one
    undeployed: str = ""  # why it could not be made
    summary: Mapping[str, object] | None = None


@dataclass
class Clock:
    """The time limit of a run. Passes ask for their share of what is left, so that none starves the next."""

    limit_s: float
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.started

    def excuse(self, seconds: float) -> None:
        """Do not count so much of the time that has passed."""
        self.started += seconds

    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.limit_s - self.elapsed())


@dataclass(frozen=True)
class Context:
    """The services of a run."""

    config: CompileConfig
    effort: EffortSettings
    backend: Backend
    capabilities: Capabilities
    precisions: tuple[str, ...]
    store: Store
    reporter: Reporter
    clock: Clock
    threads: int
    out: Path
    data: Dataset | None = None
    device: torch.device = CPU  # that candidates and students learn on
    mixed: bool = False  # whether candidates and students multiply in BF16 while they learn
    mixed_on_cpu: bool = False  # the same for networks that learn on the CPU though there is a GPU
    cores: tuple[int, ...] = ()  # the processors to stay on while something is timed
    rivals: tuple[Backend, ...] = ()  # other engines that can be timed on this machine
    target: Mapping[str, object] = field(default_factory=dict)  # the target's definition, as its file has it
    notes: list[str] = field(default_factory=list)

    @property
    def from_table(self) -> bool:
        """Whether all latencies are those of a table from another machine: nothing can be timed."""
        return self.config.foreign_lut

    @property
    def base(self) -> str:
        """The floating-point precision of all that is not quantised: fp32, on GPUs fp16, bf16 where asked for."""
        return next(p for p in self.precisions if p != "int8")

    @property
    def quant(self) -> QuantSpec:
        """How INT8 is written for the target."""
        return QuantSpec(reduce_range=self.capabilities.reduce_range, symmetric=self.capabilities.symmetric)

    def protocol(
        self,
        *,
        warmup: int,
        samples: int,
        min_sample_ms: float = Protocol.min_sample_ms,
        cold: bool = False,
        whole: bool = False,
    ) -> Protocol:
        """How to time, for this run's threads, batch and cores; `whole` networks behind runs in which they settle."""
        settle = _SETTLE if whole else 1
        return Protocol(self.threads, self.config.batch, warmup, samples, min_sample_ms, cold, self.cores, settle)

    def first_session(self, model: ModelProto) -> Artefact | None:
        """To be kept while sessions built behind it are timed: of a process's sessions of one large network the first
        was 3 to 15 % slower than all that followed, the more the longer the process had run (its weights lie in what
        others have left of the heap). None where sessions are not timed, or not on this heap."""
        if not self.capabilities.measures or self.base == "fp16":
            return None
        return self.backend.build(model, BuildSpec(self.threads, self.config.batch))

    def place(self, network: nn.Module) -> torch.device:
        """Where a network's candidates and students learn."""
        found = place_of(self.device, network)
        if found != self.device:
            self.note("the network has operators that only the CPU computes here: candidates and students learnt on it")
        return found

    def mixes(self, device: torch.device) -> bool:
        """Whether products are in BF16 in what learns there."""
        return self.mixed if device == self.device else self.mixed_on_cpu

    def recipe(self, own: Mapping[str, object]) -> dict[str, object]:
        """What a training does, for its key in the store: its own recipe, and what products are computed in."""
        return {**own, "products": "bf16"} if self.mixed else dict(own)

    @property
    def fewer_threads(self) -> tuple[int, ...]:
        """Halves of the threads, down to one, where nobody chose their number and they are a CPU's."""
        chosen = self.config.threads is not None or self.target.get("threads") is not None
        if chosen or not self.capabilities.measures or self.base == "fp16":
            return ()
        return tuple(self.threads >> k for k in range(1, self.threads.bit_length()))

    @property
    def memory_limit(self) -> int:
        """Bytes that the process should stay below."""
        return self.config.memory or total_memory() // 2

    @property
    def device_key(self) -> str:
        """Digest of the device that figures are measured on."""
        return digest(self.capabilities.device)

    def note(self, text: str) -> None:
        """Something the user should read in the report."""
        if text not in self.notes:
            self.notes.append(text)
            self.reporter.event("note", text=text)
