"""Threads keep to the processors that were asked for, and are let go again."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pytest

from hantc.core import pinning
from hantc.core.errors import HantcError
from hantc.core.pinning import can_pin, confined
from hantc.core.timing import measure_interleaved
from hantc.core.types import Protocol

HERE = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
needs_two = pytest.mark.skipif(not can_pin() or len(HERE) < 2, reason="no two processors to choose from")


@contextmanager
def waiting() -> Iterator[int]:
    """The number of a thread that waits meanwhile."""
    started, done = threading.Event(), threading.Event()
    numbers: list[int] = []

    def run() -> None:
        numbers.append(threading.get_native_id())
        started.set()
        done.wait()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    try:
        yield numbers[0]
    finally:
        done.set()
        thread.join()


@needs_two
def test_all_threads_are_confined_and_have_their_own_place_back() -> None:
    with waiting() as other:
        os.sched_setaffinity(other, HERE[1:2])
        with confined(HERE[:1]):
            assert os.sched_getaffinity(0) == os.sched_getaffinity(other) == {HERE[0]}
        assert os.sched_getaffinity(0) == set(HERE)
        assert os.sched_getaffinity(other) == {HERE[1]}


@needs_two
def test_threads_begun_meanwhile_are_not_left_confined() -> None:
    with confined(HERE[:1]):
        later = waiting()
        number = later.__enter__()
        assert os.sched_getaffinity(number) == {HERE[0]}
    assert os.sched_getaffinity(number) == set(HERE)
    later.__exit__(None, None, None)


@needs_two
def test_an_error_meanwhile_lets_them_go_too() -> None:
    with pytest.raises(ZeroDivisionError), confined(HERE[:1]):
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == set(HERE)


@needs_two
def test_threads_that_end_meanwhile_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    with waiting() as other:
        gone = other
    tasks = pinning._tasks
    monkeypatch.setattr(pinning, "_tasks", lambda: [*tasks(), gone])
    with confined(HERE[:1]):
        assert os.sched_getaffinity(0) == {HERE[0]}
    assert os.sched_getaffinity(0) == set(HERE)


@needs_two
def test_processors_that_are_not_there_are_an_error_and_nobody_stays_confined() -> None:
    with pytest.raises(HantcError, match=r"cannot be put on processors 9999: .*") as info, confined([9999]):
        raise AssertionError("never gets there")
    assert info.value.hint == "leave --pin away"
    assert os.sched_getaffinity(0) == set(HERE)


@needs_two
def test_an_old_place_that_is_gone_does_not_keep_the_rest_confined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thread of the list cannot go back."""
    put = os.sched_setaffinity
    refused: list[bool] = []

    def refuse(task: int, cores: Collection[int]) -> None:
        if task == first and refused:
            raise OSError(22, "Invalid argument")
        put(task, cores)

    with waiting() as first:
        monkeypatch.setattr(pinning, "_tasks", lambda: [first, os.getpid()])
        monkeypatch.setattr(os, "sched_setaffinity", refuse)
        with confined(HERE[:1]):
            refused.append(True)
        assert os.sched_getaffinity(os.getpid()) == set(HERE)
        monkeypatch.undo()


def test_nothing_asked_for_nothing_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert not can_pin()
    with confined(()):
        pass


@needs_two
def test_what_is_timed_stays_where_the_protocol_says() -> None:
    seen: list[set[int]] = []
    protocol = Protocol(1, warmup=1, samples=2, min_sample_ms=0.01, cores=(HERE[1],))
    measure_interleaved([lambda: seen.append(os.sched_getaffinity(0))], protocol)
    assert {frozenset(s) for s in seen} == {frozenset({HERE[1]})}
    assert os.sched_getaffinity(0) == set(HERE)
