"""Where threads run while something is timed: on the same few processors from the first sample to the last.

The whole process is confined rather than single threads: engines keep pools of their own, and what none of them can
leave is what stays comparable. With one thread that ties it to one core; with several it keeps them from wandering to
another package, whose memory is further away, or to a core's second thread."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hantc.core.errors import HantcError

_TASKS = Path("/proc/self/task")


def can_pin() -> bool:
    """Whether this system ties threads to processors (Linux)."""
    return hasattr(os, "sched_setaffinity") and _TASKS.is_dir()


@contextmanager
def confined(cores: Collection[int]) -> Iterator[None]:
    """All threads of this process on `cores` (the system's numbers of processors) and nowhere else, for a while; no
    change where that is empty. Each has its own place back afterwards; those begun meanwhile get the caller's.
    HantcError if they cannot be put there."""
    if not cores:
        yield
        return
    usual, before = os.sched_getaffinity(0), {}
    try:
        for task in _tasks():
            with suppress(ProcessLookupError):  # it has ended meanwhile
                before[task] = _place(task, cores)
        yield
    finally:
        for task in _tasks():
            with suppress(OSError):  # it has ended, or its old place is taken from the process: the rest go back
                os.sched_setaffinity(task, before.get(task, usual))


def _place(task: int, cores: Collection[int]) -> set[int]:
    """Put a thread there; where it was. HantcError if the system does not have it."""
    try:
        old = os.sched_getaffinity(task)
        os.sched_setaffinity(task, cores)
    except ProcessLookupError:
        raise
    except OSError as e:  # processors taken from the process meanwhile, or a sandbox
        which = ", ".join(map(str, sorted(cores)))
        raise HantcError(f"threads cannot be put on processors {which}: {e.strerror}", hint="leave --pin away") from e
    return old


def _tasks() -> list[int]:
    return [int(entry.name) for entry in _TASKS.iterdir()]
