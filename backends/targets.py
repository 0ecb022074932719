"""Named targets: what `--target` accepts."""

from __future__ import annotations

from dataclasses import dataclass

from hantc.core.errors import UsageError


@dataclass(frozen=True)
class Target:
    """A machine to compile for: which backend stands for it, at which precisions and batch size."""

    name: str
    backend: str
    precisions: tuple[str, ...]
    batch: int
    description: str


TARGETS: tuple[Target, ...] = (
    Target("xeon", "onnxruntime", ("fp32", "int8"), 1, "server CPU, ONNX Runtime, FP32 and INT8, batch 1"),
    Target("cpu", "onnxruntime", ("fp32", "int8"), 1, "this machine's CPU, ONNX Runtime, FP32 and INT8, batch 1"),
    Target("roofline", "roofline", ("fp32", "int8"), 1, "no hardware: predicted figures of a roofline model"),
)


def get_target(name: str) -> Target:
    """The target called `name`. UsageError that lists the known names otherwise."""
    for target in TARGETS:
        if target.name == name:
            return target
    raise UsageError(f"unknown target {name!r}", where="--target", hint="one of: " + ", ".join(t.name for t in TARGETS))
