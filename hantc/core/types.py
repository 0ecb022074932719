"""Frozen records that travel between passes. No torch here: graphs are named, never held."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal

Shape = tuple[int, ...]
Precision = Literal["fp32", "int8", "fp16", "bf16"]
ParamValue = int | float | str | bool


def digest(value: Any) -> str:
    """Stable content hash (32 hex digits) of a JSON-able value or a dataclass: the store's key."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output as the model file declares it; symbolic dims are strings, unknown ones None."""

    name: str
    dtype: str  # numpy name: "float32", "int64", …
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class ModelInfo:
    """What of an ONNX file is not in its nodes; survives the round trip. Held in `GraphModule.meta["info"]`."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    ir_version: int
    graph_name: str = "graph"
    producer: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    domains: tuple[tuple[str, int], ...] = ()  # opset imports beside the default domain
    types: tuple[tuple[str, bytes], ...] = ()  # inputs and outputs that are no tensors: name, its TypeProto


@dataclass(frozen=True)
class Region:
    """A single-entry single-exit subgraph of the teacher.

    `input` is the fx node whose value enters (outside the region), `output` the last node inside. Shapes
    are without the batch dim. `atoms` are the smallest regions' indices (position on the main line) that
    this one covers: a span of two blocks covers both their atoms, so that a selection is an exact cover.
    """

    name: str
    kind: str  # stem residual inverted_residual plain_conv dense_layer dense_block downsample attention span
    input: str
    output: str
    nodes: tuple[str, ...]
    in_shape: Shape
    out_shape: Shape
    macs: int
    params: int
    atoms: tuple[int, ...]
    parent: str | None = None
    final_act: str = ""  # name of the trailing activation ("relu", "silu", …) or ""

    @property
    def flops_per_byte(self) -> float:
        """Arithmetic intensity in FP32 at batch 1: of what has to move at the least, which is input, output and weights
        once each. Below a machine's peak over its bandwidth memory is the limit (Williams et al., "Roofline", 2009)."""
        return 2 * self.macs / (4 * (math.prod(self.in_shape) + math.prod(self.out_shape) + self.params))


@dataclass(frozen=True)
class Rejection:
    """A part of the graph that no region covers, or a subgraph that is not a region, and why."""

    where: str
    reason: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MatchResult:
    """Regions in topological order. `n_atoms` atoms are numbered 0…n-1. `misses`: what nearly was a region of some
    kind, or nearly fitted a pattern."""

    regions: tuple[Region, ...]
    rejections: tuple[Rejection, ...]
    n_atoms: int
    misses: tuple[Rejection, ...] = ()

    def region(self, name: str) -> Region:
        """The region called `name`; KeyError if there is none."""
        for r in self.regions:
            if r.name == name:
                return r
        raise KeyError(name)


@dataclass(frozen=True)
class CandidateSpec:
    """A replacement operation: its family and the family's hyper-parameters, sorted by name."""

    family: str
    params: tuple[tuple[str, ParamValue], ...] = ()

    @classmethod
    def make(cls, family: str, **params: ParamValue) -> CandidateSpec:
        """Build a spec from keyword hyper-parameters."""
        return cls(family, tuple(sorted(params.items())))

    @property
    def name(self) -> str:
        """Readable and unique: `cb_stack_k3_w0.5`."""
        return "_".join([self.family, *(f"{k}{v:g}" if isinstance(v, float) else f"{k}{v}" for k, v in self.params)])

    @property
    def kwargs(self) -> dict[str, ParamValue]:
        """The hyper-parameters as a dict."""
        return dict(self.params)


@dataclass(frozen=True)
class Signature:
    """All that a candidate must know of the region it replaces. Shapes are (C, H, W) without batch."""

    in_shape: Shape
    out_shape: Shape
    final_act: str = ""  # "", relu, relu6, silu, hardswish, leakyrelu, …

    @classmethod
    def of(cls, region: Region) -> Signature:
        """The signature of `region`."""
        return cls(region.in_shape, region.out_shape, region.final_act)

    @property
    def stride(self) -> int:
        """Ratio of the resolutions (1 where they are equal)."""
        if len(self.in_shape) < 2 or len(self.out_shape) < 2:
            return 1
        return max(1, round(self.in_shape[1] / self.out_shape[1]))


@dataclass(frozen=True)
class Device:
    """Fingerprint of the machine on which a figure was measured."""

    cpu: str
    flags: tuple[str, ...]
    cores: int
    versions: tuple[tuple[str, str], ...]  # (library, version)


@dataclass(frozen=True)
class Protocol:
    """How to time: warm-up, then `samples` interleaved samples of at least `min_sample_ms` each. `cold`: single runs
    instead, before each of which the processor's caches are filled with something else. `cores`: the processors that
    the threads stay on meanwhile; where the system places them if empty. `settle`: untimed runs before each sample, of
    networks that take a few ms at most."""

    threads: int
    batch: int = 1
    warmup: int = 3
    samples: int = 15
    min_sample_ms: float = 3.0
    cold: bool = False
    cores: tuple[int, ...] = ()
    settle: int = 1


@dataclass(frozen=True)
class Timing:
    """One measured latency, in milliseconds per run of the artefact at the protocol's batch."""

    median_ms: float
    iqr_ms: float
    samples: int


WEIGHT_BYTES = {"int8": 1, "fp16": 2, "bf16": 2}
UNUSABLE_MS = 1e8  # and more stands for what could not be timed


@dataclass(frozen=True)
class CostRow:
    """What one candidate costs at one region's shapes. `predicted` rows come from a model, not a clock."""

    region: str
    candidate: str
    precision: str
    latency_ms: float
    iqr_ms: float
    samples: int
    backend: str
    device: str  # digest of Device
    threads: int
    batch: int
    macs: int = 0
    params: int = 0
    predicted: bool = False
    note: str = ""

    @property
    def weight_mb(self) -> float:
        """Megabytes of weights, as the engine reads them."""
        return self.params * WEIGHT_BYTES.get(self.precision, 4) / 1e6


@dataclass(frozen=True)
class Correction:
    """What parts of a kind cost inside a network, over what the table says of them: fitted on measured students."""

    own: float = 1.0  # regions left as they are
    floats: float = 1.0  # replaced ones in the target's float precision
    int8: float = 1.0
    borders: float = 1.0  # between INT8 and floats
    glue: float = 1.0  # outside every region
    fetching: float = 1.0  # weights that the caches do not hold


@dataclass(frozen=True)
class Fetching:
    """What a network takes, beyond its parts, to fetch weights that the caches no longer hold when their turn comes
    again. Until then the network's other weights have passed there, and what others on the host brought in meanwhile,
    `mb_per_ms`: the sum is its load (the reuse distance of its weights). Each megabyte of load above `free_mb` costs
    `ms_per_mb`, and as much again above `steep_mb`: caches lose their hold little by little."""

    free_mb: float = 0.0
    ms_per_mb: float = 0.0
    steep_mb: float | None = None
    mb_per_ms: float = 0.0

    @property
    def knees(self) -> tuple[float, ...]:
        """Where a megabyte begins to cost, and to cost twice as much."""
        return (self.free_mb,) if self.steep_mb is None else (self.free_mb, self.steep_mb)

    def load_mb(self, weight_mb: float, ms: float) -> float:
        """The load of regions with so many megabytes of weights that take so many ms: as parts, times the table's
        `scale`, with what lies between the layers of blocks."""
        return weight_mb + self.mb_per_ms * ms

    def ms(self, load_mb: float) -> float:
        """Milliseconds for the load of all regions together."""
        return self.ms_per_mb * sum(max(0.0, load_mb - knee) for knee in self.knees)


@dataclass(frozen=True)
class CostTable:
    """All costs a selection needs. `glue_ms`: what the network costs outside every region (measured teacher
    minus the sum of its regions). `transitions`: cost of a quantise/dequantise pair on a region border,
    keyed by the tensor's shape."""

    rows: tuple[CostRow, ...]
    teacher_ms: float
    glue_ms: float
    transitions: tuple[tuple[Shape, float], ...] = ()
    # the teacher's latency, without `fetching`, over that of its parts and its glue, timed apart
    scale: float = 1.0
    skipped: tuple[tuple[str, str, str, str], ...] = ()  # region, candidate, precision, reason
    correction: Correction = Correction()
    pace: float = 1.0  # milliseconds of the clock on the wall, when the teacher was timed, in one of the table's
    fp32_ms: float | None = None  # the teacher in FP32, where `teacher_ms` is in BF16
    fetching: Fetching = Fetching()
    pinned: bool = False  # whether threads were kept on cores of their own
    clock_ms: float | None = None  # of the reference network, that the table's milliseconds are measured by
    clock_of: str = ""  # which network, and way of timing it, that is
    method: int | None = None  # version of the way that rows were measured; None before there was this entry

    @property
    def reference_ms(self) -> float:
        """What budgets are shares of: the teacher at its best FP32 setting, on GPUs in FP16."""
        return self.teacher_ms if self.fp32_ms is None else self.fp32_ms

    def marginal_ms(self, row: CostRow) -> float:
        """What a row costs in a network that loads the caches as much as the teacher: its own milliseconds, and those
        that its load makes the network fetch."""
        fetching, scale = self.fetching, max(1.0, self.scale)
        steepest = fetching.ms_per_mb * len(fetching.knees) * self.correction.fetching
        return row.latency_ms + steepest * fetching.load_mb(row.weight_mb, scale * row.latency_ms) / scale

    def by_key(self) -> dict[tuple[str, str, str], CostRow]:
        """Rows by (region, candidate, precision)."""
        return {(r.region, r.candidate, r.precision): r for r in self.rows}


@dataclass(frozen=True)
class ScoreRow:
    """How much the network suffers when one candidate alone is plugged in (search split).

    `score` is the divergence of the network's output from the teacher's (KL for classifiers), on images half of
    which are blended; lower is better, 0 for the teacher. `stderr` is its standard error over images.
    """

    region: str
    candidate: str
    precision: str
    score: float
    stderr: float
    accuracy_drop: float | None  # points
    agreement: float
    mse: float  # relative to the variance of the region's output
    dropped: str = ""  # reason, if the candidate is out


def untouched(candidate: str, precision: str) -> bool:
    """Whether a choice leaves a region as the teacher has it: its own operation, not quantised."""
    return candidate == "teacher" and precision != "int8"


@dataclass(frozen=True)
class Choice:
    """What the plan does with one region."""

    region: str
    kind: str
    candidate: str
    precision: str
    score: float
    cost_ms: float
    teacher_cost_ms: float
    runner_up: str = ""

    @property
    def kept(self) -> bool:
        """Whether the region stays as the teacher has it."""
        return untouched(self.candidate, self.precision)


@dataclass(frozen=True)
class Plan:
    """A selection: one choice per covered region, with what is expected of it."""

    choices: tuple[Choice, ...]
    predicted_latency_ms: float
    budget_ms: float
    predicted_score: float
    solver: Mapping[str, Any] = field(default_factory=dict)
