"""The teacher otherwise: with other engines, and on fewer threads. What a user might choose instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from onnx import ModelProto

from hantc.core.backend_api import Artefact, Backend, BuildSpec
from hantc.core.errors import HantcError
from hantc.core.types import Protocol
from hantc.dialect.floats import in_bf16
from hantc.passes.state import Context

_TURNS = 3  # of timing the teacher as it is and otherwise
_BF16 = " bf16"
_NOISE = 1.03
_THREADS_NOISE = 1.1  # a note that asks for another setting wants more than a timing's chance

_Timed = tuple[Backend, Artefact, Protocol]


def by_backend(teacher: ModelProto, ms: float, ctx: Context) -> dict[str, float]:
    """The teacher's latency in FP32 with every engine that can be timed here, and in BF16 (`NAME bf16`) with those
    that have it, on the clock of `ms`, the chosen one's in FP32."""
    found = {ctx.backend.name: ms}
    spec, protocol = BuildSpec(ctx.threads, ctx.config.batch), _protocol(ctx)
    ways = [(r.name, r, teacher) for r in ctx.rivals]
    ways += [
        (f"{r.name}{_BF16}", r, in_bf16(teacher))
        for r in (ctx.backend, *ctx.rivals)
        if ctx.capabilities.measures and "bf16" in r.capabilities().precisions
    ]
    _first = ctx.first_session(teacher) if ways else None
    for name, rival, model in ways:
        try:
            pair = [(b, b.build(m, spec), protocol) for b, m in ((ctx.backend, teacher), (rival, model))]
            found[name] = ms * _ratio(pair)
        except HantcError as error:
            ctx.reporter.event("elsewhere", backend=name, refused=error.message)
    return found


def by_threads(teacher: ModelProto, ms: float, ctx: Context) -> dict[str, float]:
    """The teacher's latency on the run's threads (`ms`) and on `ctx.fewer_threads`: a small network at a small batch
    may be slower on all of a large machine's cores than on some of them."""
    found = {str(ctx.threads): ms}
    _first = ctx.first_session(teacher) if ctx.fewer_threads else None
    for threads in ctx.fewer_threads:
        if ctx.clock.remaining() <= 0 or min(found.values()) * _THREADS_NOISE < list(found.values())[-1]:
            break  # once fewer are slower, still fewer are slower yet
        few = replace(_protocol(ctx), threads=threads, cores=ctx.cores[:threads])
        try:
            pair = [
                (ctx.backend, ctx.backend.build(teacher, BuildSpec(p.threads, ctx.config.batch)), p)
                for p in (_protocol(ctx), few)
            ]
            found[str(threads)] = ms * _ratio(pair)
        except HantcError as error:
            ctx.reporter.event("elsewhere", threads=threads, refused=error.message)
    return found


def tell(facts: Mapping[str, Any], ctx: Context) -> None:
    """Notes on what runs the teacher clearly faster than what was asked for."""
    engines: Mapping[str, float] = facts["teacher_by_backend"]
    fastest = min(engines, key=lambda name: engines[name])
    here, there = engines[ctx.backend.name], engines[fastest]
    if there * _NOISE < here and not (ctx.base == "bf16" and fastest.startswith(ctx.backend.name)):
        way = "--target xeon-bf16" if fastest.endswith(_BF16) else f"--backend {fastest}"
        name = fastest.replace(_BF16, " in BF16")
        ctx.note(
            f"{name} runs the teacher in {there:.2f} ms where {ctx.backend.name} takes {here:.2f} ms: "
            f"{way} compiles for it"
        )
    threads: Mapping[str, float] = facts["teacher_by_threads"]
    best = min(threads, key=lambda n: threads[n])
    few, all_ = threads[best], threads[str(ctx.threads)]
    if few * _THREADS_NOISE < all_:
        ctx.note(
            f"the teacher takes {few:.2f} ms on {best} thread(s), less than the {all_:.2f} on {ctx.threads} that "
            f"speed-ups and budgets are over: --threads {best} compiles for that"
        )


def _protocol(ctx: Context) -> Protocol:
    return ctx.protocol(warmup=5, samples=15, min_sample_ms=15.0, whole=True)


def _ratio(pair: Sequence[_Timed]) -> float:
    """What the second takes of the first, timed in turns: no engine times another's artefacts, nor those for other
    threads, and the machine's speed may change."""
    turns = [[b.measure([a], p)[0].median_ms for b, a, p in pair] for _ in range(_TURNS)]
    return median(there / here for here, there in turns)
