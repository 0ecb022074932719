"""Errors that a user can act on: what failed, where, and what to do."""

from __future__ import annotations


class HantcError(Exception):
    """Base of all errors that hantc raises on purpose. `exit_code` is the command line's answer."""

    exit_code = 3

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class UsageError(HantcError):
    """Bad option, bad input file, bad data (exit code 2)."""

    exit_code = 2


class ModelError(UsageError):
    """The model file cannot be read or is not something that ONNX Runtime runs (exit code 2)."""


class DataError(UsageError):
    """The images or labels cannot be used (exit code 2)."""


class BudgetError(HantcError):
    """The asked constraint cannot be met (exit code 1). `nearest` is the nearest reachable value: in the
    search, of what is constrained (ms or score); from the select pass, a share of the teacher's latency."""

    exit_code = 1

    def __init__(self, message: str, *, nearest: float, where: str = "", hint: str = "") -> None:
        super().__init__(message, where=where, hint=hint)
        self.nearest = nearest


class UnsupportedError(HantcError):
    """A graph element that the dialect cannot express natively; the importer falls back to an opaque leaf."""
