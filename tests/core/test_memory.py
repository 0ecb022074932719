"""Freed memory kept for the next activation."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hantc.core import memory


def test_figures_are_of_this_process_and_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = torch.ones(16 << 20)  # 64 MB
    assert memory.peak_memory() >= block.nbytes
    total = memory.total_memory()
    assert total > memory.peak_memory()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_GROUP_LIMIT", limit)
    limit.write_text("max\n")
    unlimited = memory.total_memory()
    assert unlimited >= total
    limit.write_text(f"{1 << 30}\n")
    assert memory.total_memory() == min(unlimited, 1 << 30)
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t 9 kB\n")
    monkeypatch.setattr(memory, "_STATUS", status)
    assert memory.peak_memory() == 2 << 20
    status.write_text("Name:\tx\n")
    assert memory.peak_memory() >= block.nbytes, "the figure of another source"


def _faults() -> int:
    """Page faults of allocating and filling 64 MB ten times."""
    torch.ones(16 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(memory._mallopt() is None, reason="not glibc")
def test_memory_is_reused_inside_and_given_back_behind() -> None:
    """In a process of its own: what other tests left in the heap decides where blocks come from."""
    code = """
from hantc.core.memory import retained_memory
from tests.core.test_memory import _faults
before = _faults()
with retained_memory():
    _faults()  # the heap grows, by how much depends on where its blocks happen to lie
    inside = _faults()
print(before, inside, _faults())
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, text=True, capture_output=True, check=True)
    before, inside, behind = map(int, done.stdout.split())
    assert before > 1000, "each allocation is mapped anew"
    assert inside < before / 5
    assert behind > 1000


@pytest.mark.skipif(memory._mallopt() is None, reason="not glibc")
def test_settings_change_back_when_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def record(parameter: int, value: int) -> int:
        seen.append((parameter, value))
        return 1

    monkeypatch.setattr(memory, "_mallopt", lambda: record)
    with pytest.raises(ZeroDivisionError), memory.retained_memory():
        raise ZeroDivisionError
    assert seen == [(-3, 1 << 30), (-1, 1 << 30), (-3, 32 << 20), (-1, 64 << 20)]


@pytest.mark.skipif(memory._mallopt() is None, reason="not glibc")
def test_an_older_glibc_is_asked_for_less_or_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = [(-3, 1 << 30), (-3, 32 << 20)]
    for most, wanted in ((32 << 20, [*tried, (-1, 1 << 30)]), (0, tried)):
        seen: list[tuple[int, int]] = []

        def refuse(parameter: int, value: int, most: int = most, seen: list[tuple[int, int]] = seen) -> int:
            seen.append((parameter, value))
            return int(parameter == -1 or value <= most)

        monkeypatch.setattr(memory, "_mallopt", lambda refuse=refuse: refuse)
        with memory.retained_memory():
            assert seen == wanted
        assert len(seen) == len(wanted) + (2 if most else 0)


@pytest.mark.skipif(sys.platform == "win32", reason="CDLL(None) needs a name there")
def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    with memory.retained_memory():
        assert memory._mallopt() is None
