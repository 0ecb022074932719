"""Targets: what `--target` accepts. Each is a TOML file, a built-in one under `machines/` or the user's own."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from hantc.backends.prediction import Machine
from hantc.backends.registry import get_backend
from hantc.backends.roofline.backend import RooflineBackend
from hantc.backends.tensorrt.backend import TensorRTBackend
from hantc.core.backend_api import Backend
from hantc.core.errors import HantcError, UsageError

GROUP = "hantc.targets"
_SUFFIX = ".toml"
_PREDICTING = (RooflineBackend.name, TensorRTBackend.name)


class Target(BaseModel):
    """A machine to compile for: which backend stands for it, at which precisions, batch size and thread count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    backend: str
    precisions: tuple[Literal["fp32", "int8", "fp16", "bf16"], ...] = Field(min_length=1)
    batch: PositiveInt = 1
    threads: PositiveInt | None = None  # None: physical cores
    pin: bool = False  # threads keep to as many cores while something is timed
    description: str = ""
    compute_capability: str | None = None  # of a GPU: "SM89"
    ceilings: Machine | None = None  # of a machine whose latencies are predicted

    @field_validator("precisions")
    @classmethod
    def _with_one_float(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if sum(p in ("fp32", "fp16", "bf16") for p in value) != 1:
            raise ValueError("one of fp32, fp16 and bf16 must be among them: what is not quantised runs in it")
        return value

    def on(self, backend: str) -> Target:
        """The same machine with another engine; ceilings are only for those that predict."""
        kept = self.ceilings if backend in _PREDICTING else None
        capability = self.compute_capability if backend == TensorRTBackend.name else None
        return self.model_copy(update={"backend": backend, "ceilings": kept, "compute_capability": capability})

    def make_backend(self) -> Backend:
        """The backend that stands for it. UsageError if there is none of that name, or it takes no ceilings."""
        where = f"--target {self.name}"
        if self.compute_capability is not None and self.backend != TensorRTBackend.name:
            raise UsageError("compute_capability is for the tensorrt backend alone", where=where, hint="leave it out")
        if self.ceilings is not None and self.backend not in _PREDICTING:
            hint = f"{self.backend} knows its machine: leave [ceilings] out"
            raise UsageError(f"ceilings are for {' and '.join(_PREDICTING)} alone", where=where, hint=hint)
        if self.backend == TensorRTBackend.name:
            if self.compute_capability is None or self.ceilings is None:
                hint = "hantc targets --json shows l4, which has both"
                raise UsageError("tensorrt needs compute_capability and [ceilings]", where=where, hint=hint)
            return TensorRTBackend(self.compute_capability, self.ceilings)
        return get_backend(self.backend) if self.ceilings is None else RooflineBackend(self.ceilings)


def targets() -> dict[str, Target | HantcError]:
    """All that have a name: the built-in ones, and third parties' through the entry point group `hantc.targets`, whose
    objects are `Target`s; the error in the place of one that does not load."""
    found: dict[str, Target | HantcError] = {name: _builtin(name) for name in _builtin_names()}
    for point in entry_points(group=GROUP):
        if point.name not in found:  # built-in names cannot be taken over
            try:
                found[point.name] = _external(point)
            except HantcError as e:
                found[point.name] = e
    return found


def get_target(name: str) -> Target:
    """The target called `name`, or that of the TOML file of this path. UsageError that lists the known names, or says
    what is wrong with the file; HantcError if it is a third party's and fails to load."""
    if name.endswith(_SUFFIX):
        path = Path(name).expanduser()
        try:
            return _parse(path.read_text(encoding="utf-8"), path.stem, name)
        except OSError as e:
            raise UsageError(f"cannot be read: {e.strerror}", where=f"--target {name}") from e
        except UnicodeDecodeError as e:
            raise UsageError("is not a text file", where=f"--target {name}") from e
    builtin, points = _builtin_names(), {p.name: p for p in entry_points(group=GROUP)}
    if name in builtin:
        return _builtin(name)
    if name in points:
        return _external(points[name])
    hint = "one of: " + ", ".join((*builtin, *points)) + "; or a file, ./mine.toml"
    raise UsageError(f"unknown target {name!r}", where="--target", hint=hint)


def _builtin_names() -> tuple[str, ...]:
    found = (entry.name for entry in files("hantc.backends").joinpath("machines").iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in found if name.endswith(_SUFFIX)))


def _builtin(name: str) -> Target:
    file = files("hantc.backends").joinpath("machines", name + _SUFFIX)
    return _parse(file.read_text(encoding="utf-8"), name, name)


def _external(point: EntryPoint) -> Target:
    hint = "reinstall or remove its package"
    try:
        loaded = point.load()
    except Exception as e:  # a third party's code may raise anything
        raise HantcError(f"the target {point.name!r} does not load: {e}", hint=hint) from e
    if not isinstance(loaded, Target):
        raise HantcError(f"the target {point.name!r} is not a hantc.backends.targets.Target", hint=hint)
    return loaded.model_copy(update={"name": point.name})


def _parse(text: str, name: str, where: str) -> Target:
    try:
        return Target.model_validate({"name": name, **tomllib.loads(text)})
    except tomllib.TOMLDecodeError as e:
        raise UsageError(f"is not TOML: {e}", where=f"--target {where}") from e
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{key}: {first['msg']}", where=f"--target {where}", hint="hantc targets --json shows some"
        ) from e
