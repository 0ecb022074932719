"""`summary.json`: the result of a run. The field names are a public contract (schema version 1)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from hantc.core.atomic import write_text
from hantc.core.errors import UsageError
from hantc.report.text import finite

SCHEMA_VERSION = 1
FILE_NAME = "summary.json"


def _number(value: Any) -> Any:
    return finite(value) if isinstance(value, float) else value


def _pairs(value: Any) -> Any:
    # `Device.versions` is a tuple of pairs; the file holds a plain object.
    return value if isinstance(value, Mapping) or not isinstance(value, list | tuple) else dict(value)


Number = Annotated[float | None, BeforeValidator(_number)]  # NaN and infinities read as None


class _Record(BaseModel):
    # Later versions may add keys without a new schema version; they survive a round trip.
    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=True)


class NetworkStats(_Record):
    """One network as measured: median and interquartile latency in ms, accuracy in percent on the validation
    split, file size in bytes, parameters, multiply-accumulates, and the largest sum of activations alive at once, at
    the run's batch and in its floats. None: not known."""

    latency_ms: Number
    latency_iqr_ms: Number = None
    accuracy: Number = None
    size_bytes: int | None = None
    params: int | None = None
    macs: int | None = None
    activation_bytes: int | None = None


class DeviceInfo(_Record):
    """The machine on which the figures were measured."""

    cpu: str
    flags: tuple[str, ...] = ()
    cores: int | None = None
    versions: Annotated[dict[str, str], BeforeValidator(_pairs)] = Field(default_factory=dict)
    threads: int | None = None
    notes: tuple[str, ...] = ()


class DataInfo(_Record):
    """The data that the run used. `counts`: images per split."""

    source: str
    labelled: bool
    counts: dict[str, int] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    synthetic: bool = False
    fingerprint: str | None = None


class ChoiceRow(_Record):
    """What became of one region. Costs in ms; `score` None where nothing was scored."""

    region: str
    kind: str
    candidate: str
    precision: str
    score: Number = None
    cost_ms: Number
    teacher_cost_ms: Number
    runner_up: str = ""


class OpCounts(_Record):
    """Operations by type in both networks."""

    teacher: dict[str, int] = Field(default_factory=dict)
    student: dict[str, int] = Field(default_factory=dict)


class Summary(_Record):
    """The content of `summary.json`. Latencies in ms, `accuracy_drop` in points, `prediction_error` and
    `agreement` as fractions. Keys without a default must be there, if only as null."""

    schema_version: Literal[1] = 1
    hantc_version: str
    model: str
    model_hash: str | None = None
    target: str
    device: DeviceInfo
    data: DataInfo | None
    seed: int
    status: str
    teacher: NetworkStats
    student: NetworkStats
    baseline_int8: NetworkStats | None
    baseline_int8_reason: str | None = None
    baseline_bf16: NetworkStats | None = None  # the teacher as it is, where the target computes floats in BF16
    baseline_given: NetworkStats | None = None  # the file as given, where it was quantised already or in FP16
    speedup: Number
    accuracy_drop: Number
    predicted_latency_ms: Number
    prediction_error: Number
    agreement: Number
    regions: int
    choices: tuple[ChoiceRow, ...]
    solver: dict[str, Any] = Field(default_factory=dict)
    timings_s: dict[str, float] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ops: OpCounts = Field(default_factory=OpCounts)
    predicted: bool = False  # the latencies come from the backend's model of the machine, not from a clock
    engine: dict[str, Any] | None = None  # a file beside model.onnx and facts about it, or the reason
    backend: str | None = None
    teacher_by_backend: dict[str, float] = Field(default_factory=dict)  # ms, with each engine that there was
    teacher_by_threads: dict[str, float] = Field(default_factory=dict)  # ms, on fewer where nobody chose their number
    target_definition: dict[str, Any] = Field(default_factory=dict)  # what `target` was then: it may be a file
    batch: int | None = None
    effort: str | None = None
    memory: dict[str, int] = Field(default_factory=dict)  # limit_bytes, peak_bytes
    max_relative_difference: Number = None  # of the student's outputs from the teacher's
    options: dict[str, Any] = Field(default_factory=dict)  # as asked for, paths absolute

    @model_validator(mode="before")
    @classmethod
    def _reason_instead_of_baseline(cls, value: Any) -> Any:
        # {"baseline_int8": {"reason": …}} says the same as null beside `baseline_int8_reason`.
        base = value.get("baseline_int8") if isinstance(value, dict) else None
        if isinstance(base, dict) and "latency_ms" not in base and "reason" in base:
            return {**value, "baseline_int8": None, "baseline_int8_reason": str(base["reason"])}
        return value

    def to_json(self) -> str:
        """Indented strict JSON (NaN and infinities become null), with a final newline."""
        return self.model_dump_json(indent=2) + "\n"

    def save(self, run_folder: str | os.PathLike[str]) -> Path:
        """Write `summary.json` into an existing run folder in one step; returns its path."""
        path = Path(run_folder) / FILE_NAME
        write_text(path, self.to_json())
        return path


def load(run_folder: str | os.PathLike[str]) -> Summary:
    """Read a run folder's summary. UsageError if the folder is not there, is no run folder, or is broken."""
    folder = Path(run_folder)
    if not folder.exists():
        raise UsageError("no such run folder", where=str(folder), hint="give the folder that --out named (MODEL.hantc)")
    if not folder.is_dir():
        raise UsageError("this is a file, not a run folder", where=str(folder), hint="give the folder that holds it")
    path = folder / FILE_NAME
    if not path.is_file():
        hint = "if the run was cut off, finish it: the same command with --resume"
        raise UsageError(f"not a finished run folder: it has no {FILE_NAME}", where=str(folder), hint=hint)
    value = read_json(path)
    if not isinstance(value, dict):
        raise UsageError("not a summary: the file holds no JSON object", where=str(path), hint=_RERUN)
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        hint = "read it with the hantc that wrote it, or a newer one"
        raise UsageError(f"schema_version {version!r} is not {SCHEMA_VERSION}", where=str(path), hint=hint)
    try:
        return Summary.model_validate(value)
    except ValidationError as e:
        raise broken(path, e) from e


_RERUN = "run hantc again with --resume to write it anew"


def read_json(path: Path) -> Any:
    """A JSON file's content; UsageError that names the file and the place if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        where = f"{path}:{e.lineno}:{e.colno}"
        raise UsageError(f"broken JSON: {e.msg}", where=where, hint=_RERUN) from e
    except (OSError, UnicodeDecodeError, RecursionError) as e:
        raise UsageError(f"cannot be read: {e}", where=str(path), hint=_RERUN) from e


def broken(path: Path, error: ValidationError) -> UsageError:
    """A UsageError naming the first wrong entries of a file."""
    wrong = [f"{'.'.join(str(p) for p in e['loc']) or 'top level'}: {e['msg']}" for e in error.errors()]
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return UsageError(f"wrong content: {'; '.join(wrong[:3])}{more}", where=str(path), hint=_RERUN)
