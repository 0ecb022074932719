"""Freed memory kept for the next activation."""

from __future__ import annotations

import ctypes
import resource
import sys

import pytest
import torch

from hantc.core import memory


def _faults() -> int:
    """Page faults of allocating and filling 32 MB ten times."""
    torch.ones(8 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(8 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(memory._mallopt() is None, reason="not glibc")
def test_memory_is_reused_inside_and_given_back_behind() -> None:
    ctypes.CDLL(None).mallopt(-3, 128 << 10)  # as a fresh process has it
    ctypes.CDLL(None).mallopt(-1, 128 << 10)
    outside = _faults()
    with memory.retained_memory():
        inside = _faults()
    assert outside > 1000, "each allocation is mapped anew"
    assert inside < outside / 5
    assert _faults() > 1000


def test_settings_go_back_when_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def record(parameter: int, value: int) -> int:
        seen.append((parameter, value))
        return 1

    monkeypatch.setattr(memory, "_mallopt", lambda: record)
    with pytest.raises(ZeroDivisionError), memory.retained_memory():
        raise ZeroDivisionError
    assert [v for _, v in seen] == [1 << 30] * 2 + [128 << 10] * 2


@pytest.mark.skipif(sys.platform == "win32", reason="CDLL(None) needs a name there")
def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    with memory.retained_memory():
        assert memory._mallopt() is None
