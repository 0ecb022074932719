"""What the user asked for, validated; and what each effort level spends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

from hantc.core.errors import UsageError

Effort = Literal["quick", "standard", "thorough"]


@dataclass(frozen=True)
class Budget:
    """A latency budget: a fraction of the teacher's latency, or milliseconds."""

    fraction: float | None = None
    ms: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`0.5` → half the teacher's latency; `8ms` → eight milliseconds. UsageError otherwise."""
        m = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(ms|%)?\s*", text)
        if not m or float(m.group(1)) <= 0:
            raise UsageError(f"--budget {text!r} is not a budget", hint="write a fraction (0.5) or a latency (8ms)")
        value = float(m.group(1))
        if m.group(2) == "ms":
            return cls(ms=value)
        value = value / 100 if m.group(2) == "%" else value
        if value > 1:
            raise UsageError(
                f"--budget {text!r} is more than the teacher's own latency", hint="for 8 milliseconds write 8ms"
            )
        return cls(fraction=value)

    def in_ms(self, teacher_ms: float) -> float:
        """The budget in milliseconds, given the teacher's latency."""
        return self.ms if self.ms is not None else (self.fraction or 1.0) * teacher_ms


@dataclass(frozen=True)
class Cap:
    """A bound on what the student has: a fraction of the teacher's, or an amount."""

    fraction: float | None = None
    amount: float | None = None

    @classmethod
    def parse(cls, text: str, option: str) -> Cap:
        """`0.5` or `50%` → half of the teacher's; `300M`, `1.5G`, `4000` → so many (M is a million; of bytes 2^20, with
        `iB` or without). UsageError otherwise."""
        m = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|([KMGT])?(?:i?B)?)\s*", text, re.IGNORECASE)
        value = float(m.group(1)) if m else 0.0
        if not m or value <= 0:
            raise UsageError(f"{option} {text!r} is no amount", hint="write a fraction (0.5) or an amount (5M)")
        suffix = (m.group(3) or "").upper()
        if not m.group(2) and value <= 1:
            return cls(fraction=value)
        if m.group(2) == "%":
            if value > 100:
                raise UsageError(f"{option} {text!r} is more than the teacher has", hint="leave it out, or give less")
            return cls(fraction=value / 100)
        kilo = 1024 if option == "--budget-memory" else 1000
        return cls(amount=value * kilo ** " KMGT".index(suffix or " "))

    def of(self, teacher: float) -> float:
        """The amount, given the teacher's."""
        return self.amount if self.amount is not None else (self.fraction or 1.0) * teacher


def parse_duration(text: str) -> float:
    """`30m`, `90s`, `1h`, `1h30m` or plain seconds → seconds. UsageError otherwise."""
    m = re.fullmatch(r"\s*(?:(\d+(?:\.\d+)?)h)?\s*(?:(\d+(?:\.\d+)?)m)?\s*(?:(\d+(?:\.\d+)?)s?)?\s*", text)
    if not m or not any(m.groups()):
        raise UsageError(f"--time-limit {text!r} is not a duration", hint="write 30m, 90s or 1h30m")
    h, mi, s = (float(g or 0) for g in m.groups())
    return h * 3600 + mi * 60 + s


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str, option: str) -> int:
    """`500M`, `2G`, `1.5 GiB` or plain bytes → bytes. UsageError otherwise."""
    m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not m:
        raise UsageError(f"{option} {text!r} is not a size", hint="write 500M or 2G")
    return int(float(m.group(1)) * _UNITS[m.group(2).upper()])


def parse_shapes(texts: str | Sequence[str]) -> dict[str, tuple[int, ...]]:
    """`3x224x224`, or `NAME=3x224x224` once for each input → sizes by name ("" without one). UsageError otherwise."""
    found: dict[str, tuple[int, ...]] = {}
    for text in [texts] if isinstance(texts, str) else texts:
        name, _, dims = text.rpartition("=")
        if not re.fullmatch(r"[1-9]\d{0,8}(x[1-9]\d{0,8})*", dims.strip().lower()):
            hint = "write channels x height x width: 3x224x224"
            raise UsageError(f"{text!r} is not a shape", where="--input-shape", hint=hint)
        if name.strip() in found:
            raise UsageError("an input has two shapes", where="--input-shape", hint="give one for each")
        found[name.strip()] = tuple(map(int, dims.strip().lower().split("x")))
    return found


def parse_drop(text: str) -> float:
    """`0.5%` or `0.5` → 0.5 points of accuracy. UsageError otherwise."""
    m = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%?\s*", text)
    if not m:
        raise UsageError(f"--max-drop {text!r} is not a number of points", hint="write 0.5%")
    return float(m.group(1))


class CompileConfig(BaseModel):
    """One run of the compiler. Paths are checked where they are used, so that the error can name the stage."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    model: Path
    target: str = "xeon"
    backend: str | None = None  # None: the target's
    data: str | None = None
    val: str | None = None
    unlabelled: str | None = None
    preprocess: str | None = None
    budget: Budget | None = None
    budget_params: Cap | None = None
    budget_macs: Cap | None = None
    budget_memory: Cap | None = None  # of activations
    max_drop: float | None = None
    effort: Effort = "standard"
    time_limit: float | None = Field(default=None, gt=0)  # seconds
    input_shape: dict[str, tuple[PositiveInt, ...]] = {}  # without the batch, by name; "" is the only input
    region: tuple[str, ...] = ()  # "FROM:TO": regions wanted just so
    recipe: Literal["hantc", "paper"] = "hantc"  # of training candidates
    pool: Literal["sample", "whole"] = "sample"  # of a region's scratch candidates: which are measured and trained
    memory: int | None = Field(default=None, ge=1 << 28)  # bytes that training may fill; None: half of the machine's
    train_device: Literal["auto", "cpu", "cuda"] = "auto"
    train_precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16: of products, where candidates and students learn
    precision: Literal["auto", "fp32", "int8", "fp16", "bf16"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    pin: bool = False  # keep to as many cores as threads while something is timed
    batch: int = Field(default=1, ge=1)
    lut: Path | None = None
    foreign_lut: bool = False  # the table is of another device, and its latencies count
    optimized: bool = False  # also leave the file as the engine rewrites it for this machine
    out: Path
    store: Path
    store_limit: int = Field(default=10 << 30, ge=0)  # bytes; what was unused longest goes when a run has ended
    resume: bool = False
    seed: int = 0

    @property
    def caps(self) -> tuple[Cap | None, ...]:
        """What is bounded beside latency: weights, multiply-accumulates, memory."""
        return self.budget_params, self.budget_macs, self.budget_memory

    @property
    def limited(self) -> bool:
        """Whether anything beside latency is bounded."""
        return any(cap is not None for cap in self.caps)

    @field_validator("model", "out", "store", mode="after")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser()


@dataclass(frozen=True)
class EffortSettings:
    """What an effort level spends. Times are shares of the time limit."""

    time_limit_s: float
    per_region: int  # candidates trained per region
    per_span: int  # candidates trained per span of several regions
    measured_per_region: int  # candidates measured per region and precision
    distill_share: float
    distill_epochs: int  # upper bound
    solutions: int  # K of the paper
    finetune_share: float  # of the whole limit; what is left over is used too
    finetune_epochs: int  # upper bound
    score_images: int
    explored: int  # whole students judged on a few images
    explore_share: float  # of the time limit, at most
    batch_size: int = 64


EFFORTS: dict[str, EffortSettings] = {
    "quick": EffortSettings(420, 2, 1, 10, 0.15, 12, 6, 0.40, 60, 200, 60, 0.06),
    "standard": EffortSettings(1380, 2, 1, 22, 0.15, 20, 10, 0.45, 120, 400, 120, 0.05),
    "thorough": EffortSettings(9000, 3, 2, 60, 0.15, 40, 16, 0.50, 200, 800, 400, 0.04),
}
