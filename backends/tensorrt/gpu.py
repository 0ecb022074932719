"""The GPU, where one is here: its memory, its stream and its clock, through NVIDIA's cuda-bindings."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from hantc.core.errors import HantcError

Array = np.ndarray[Any, Any]


def _load() -> Any:
    try:
        return import_module("cuda.bindings.runtime")
    except (ImportError, OSError, RuntimeError):  # a missing or broken library is an answer of find()
        return None


cuda = _load()


@dataclass(frozen=True)
class Found:
    """A GPU of this machine. `driver`: the CUDA version that its driver has, "13.1"."""

    index: int
    name: str
    capability: str  # "SM89"
    processors: int
    driver: str


def find(capability: str | None = None) -> Found | None:
    """The first GPU, or the first of the compute capability; None if there is none, or no driver or library for it."""
    if cuda is None:
        return None
    error, count = cuda.cudaGetDeviceCount()
    if int(error):
        return None
    for index in range(count):
        try:
            found = _describe(index)
        except HantcError:  # one that is in a bad state is as good as none
            continue
        if capability in (None, found.capability):
            return found
    return None


def _describe(index: int) -> Found:
    facts = checked(cuda.cudaGetDeviceProperties(index))
    driver = checked(cuda.cudaDriverGetVersion())
    name = facts.name.decode(errors="replace") if isinstance(facts.name, bytes) else str(facts.name)
    return Found(
        index=index,
        name=name.strip("\0 "),
        capability=f"SM{facts.major}{facts.minor}",
        processors=facts.multiProcessorCount,
        driver=f"{driver // 1000}.{driver % 1000 // 10}",
    )


def checked(result: tuple[Any, ...]) -> Any:
    """What a call returned beside its error code. HantcError with CUDA's own words if that is one."""
    error, *values = result
    if int(error):
        text = cuda.cudaGetErrorString(error)[1]
        raise HantcError(f"CUDA: {text.decode() if isinstance(text, bytes) else text}")
    return values[0] if values else None


class Gpu:
    """One GPU and one stream of it, on which everything stands in order."""

    def __init__(self, found: Found) -> None:
        self.found, self._cuda = found, cuda
        self.select()
        self._stream = checked(self._cuda.cudaStreamCreate())
        self.stream = int(self._stream)
        self.clock = Clock(self._stream)

    def select(self) -> None:
        """Make it the one that this thread's calls are for."""
        checked(self._cuda.cudaSetDevice(self.found.index))

    def allocate(self, size: int) -> int:
        """The address of `size` bytes on the GPU."""
        return int(checked(self._cuda.cudaMalloc(max(1, size))))

    def free(self, address: int) -> None:
        """Give memory back."""
        checked(self._cuda.cudaFree(address))

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous array to the GPU."""
        self._copy(address, array.ctypes.data, array.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def download(self, array: Array, address: int) -> None:
        """Fill a contiguous array from the GPU."""
        self._copy(array.ctypes.data, address, array.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def _copy(self, to: int, source: int, size: int, kind: Any) -> None:
        checked(self._cuda.cudaMemcpyAsync(to, source, size, kind, self._stream))
        self.wait()

    def wait(self) -> None:
        """Until all that stands on the stream is done."""
        checked(self._cuda.cudaStreamSynchronize(self._stream))


class Clock:
    """Nanoseconds by events: what is put on the stream between two calls takes their difference, as the GPU has it,
    with the time that the first of it takes to get there. Each call waits for all that came before."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._ns = stream, 0
        self._last, self._next = checked(cuda.cudaEventCreate()), checked(cuda.cudaEventCreate())
        self._mark(self._last)

    def __call__(self) -> int:
        self._mark(self._next)
        self._ns += round(1e6 * checked(cuda.cudaEventElapsedTime(self._last, self._next)))
        self._last, self._next = self._next, self._last
        return self._ns

    def _mark(self, event: Any) -> None:
        checked(cuda.cudaEventRecord(event, self._stream))
        checked(cuda.cudaEventSynchronize(event))
