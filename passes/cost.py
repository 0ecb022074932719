"""Cost: candidates -> latency table measured on the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from onnx import ModelProto
from pydantic import TypeAdapter, ValidationError
from torch import fx

from hantc.core.atomic import to_jsonable
from hantc.core.errors import HantcError, UnsupportedError, UsageError
from hantc.core.lut import read_lut
from hantc.core.progress import Bar
from hantc.core.types import CandidateSpec, CostRow, CostTable, Region, Signature, digest
from hantc.dialect.alike import work_digest
from hantc.dialect.emitter import emit
from hantc.dialect.graph import cut
from hantc.dialect.qdq import MIN_OPSET, quantize_for_timing
from hantc.dialect.rewrites.normalize import normalize
from hantc.ops.derived import structure
from hantc.ops.registry import DERIVED, Origin, build
from hantc.passes.ceilings import Ceilings, ceilings_of
from hantc.passes.fetching import balance, measure_beginnings
from hantc.passes.glue import measure_glue
from hantc.passes.meter import METHOD, Meter, Work
from hantc.passes.plug import origin_of
from hantc.passes.state import Context, Proposal, State

_VERSION = 8  # of what a table is made of beyond its rows: those made otherwise are not taken up again
_SLACK = 0.8  # the peak may have been measured in a slower minute than the one that rows are scaled to


class Cost:
    """Proposals -> latency table measured on the target, for candidates, teacher and borders."""

    name: ClassVar[str] = "cost"
    requires: ClassVar[tuple[str, ...]] = ("network", "match", "proposals")
    ensures: ClassVar[tuple[str, ...]] = ("costs",)

    def call(self, state: State, ctx: Context) -> State:
        """Measure what is not in the store yet; with --lut, read the table instead."""
        assert state.network is not None and state.match is not None and state.proposals is not None
        if ctx.config.lut is not None:
            return self._read(state, ctx, ctx.config.lut)
        ctx = _with_what_can_be_written(state.network, ctx)
        meter = Meter(ctx)
        model = emit(state.network).model
        key = _key(meter, state, ctx, model)
        table = _recall(ctx, key)
        if table is None:
            before = len(ctx.notes)
            table = self._measure(state, ctx, meter, model)
            if meter.restless:  # of a table that is taken up again, too
                ctx.note(meter.restless)
            if all(r.predicted or r.samples > 0 for r in table.rows):  # what could not be timed is tried again
                ctx.store.put_json("table", key, to_jsonable({"table": table, "notes": ctx.notes[before:]}))
        paces = [round(p, 3) for p in meter.pace]
        facts: dict[str, Any] = {"measured": meter.measured, "teacher_ms": table.teacher_ms, "glue_ms": table.glue_ms}
        facts |= {"scale": table.scale, "fetching": asdict(table.fetching)}
        ctx.reporter.event("cost", rows=len(table.rows), **facts, pace=paces)
        return replace(state, costs=table)

    def _measure(self, state: State, ctx: Context, meter: Meter, model: ModelProto) -> CostTable:
        """The table, row by row from the store or the clock."""
        assert state.network is not None and state.match is not None and state.proposals is not None
        regions = {r.name: r for r in state.match.regions}
        timing, pace = meter.network(model)
        teacher_ms = timing.median_ms
        fp32_ms = meter.network_fp32(model) if ctx.base == "bf16" else None
        rows: list[CostRow] = []
        skipped: list[tuple[str, str, str, str]] = []
        # a sample has no candidates of many more multiplications than the teacher
        ceilings = ceilings_of(ctx) if ctx.config.pool == "whole" else None
        seen: dict[str, tuple[str, ...]] = {}
        with ctx.reporter.bar("measuring candidates", len(state.proposals) + len(regions)) as bar:
            for region in regions.values():  # one at a time: a whole pool's files would not fit in memory together
                work = self._teacher(state, ctx, meter, region)
                mine = [p for p in state.proposals if p.region == region.name]
                share = 1 + len(mine)
                if ceilings is not None and mine:
                    mine, hopeless = _hopeful(mine, meter.rows(work), ceilings, ctx)
                    skipped += hopeless
                if mine:
                    source = _Source.of(state, region)
                    work += [w for p in mine for w in self._candidate(ctx, meter, source, p, seen)]
                half = share / 2  # building them takes about as long as timing them
                bar.advance(half)
                rows += meter.rows(work, partial(_advance, bar, half))
        shapes = sorted({r.out_shape for r in regions.values()} | {r.in_shape for r in regions.values()})
        mixed = len(ctx.precisions) > 1
        transitions = tuple((s, meter.border(s)) for s in shapes) if mixed else ()
        glue = measure_glue(meter, state, rows) if rows else None
        beginnings = measure_beginnings(meter, state, rows, glue, teacher_ms)
        inner_ms = glue.inner_ms if glue else 0.0
        found = balance(state.match.regions, rows, teacher_ms, glue.ms if glue else None, beginnings, inner_ms)
        return CostTable(
            tuple(rows),
            teacher_ms,
            found.glue_ms,
            transitions,
            found.scale,
            tuple(skipped),
            pace=pace,
            fp32_ms=fp32_ms,
            fetching=found.fetching,
            pinned=bool(ctx.cores),
            clock_ms=meter.reference_ms if meter.steady else None,
            clock_of=meter.clock_of,
            method=METHOD,
        )

    @staticmethod
    def _read(state: State, ctx: Context, path: Path) -> State:
        """The table of a file; candidates that it lacks are left out, with the reason."""
        assert state.match is not None
        lut = read_lut(path)
        device = ctx.capabilities.device
        pinned = lut.table.pinned if ctx.from_table else bool(ctx.cores)
        lut.check_device(device, backend=ctx.backend.name, threads=ctx.threads, batch=ctx.config.batch, pinned=pinned)
        lut.check_regions(state.match.regions)
        known = {(r.region, r.candidate) for r in lut.table.rows if r.precision in ctx.precisions}
        proposals = tuple(p for p in state.proposals or () if (p.region, p.spec.name) in known)
        missing = [p for p in state.proposals or () if (p.region, p.spec.name) not in known]
        skipped = tuple((p.region, p.spec.name, f"not in {path}") for p in missing)
        wanted = {(p.region, p.spec.name) for p in proposals} | {(r.name, "teacher") for r in state.match.regions}
        rows = tuple(r for r in lut.table.rows if r.precision in ctx.precisions and (r.region, r.candidate) in wanted)
        if not any(r.precision == ctx.base for r in rows):
            there = ", ".join(sorted({r.precision for r in lut.table.rows}))
            hint = "measure one: hantc profile MODEL --lut FILE, for the same --target"
            raise UsageError(f"{path} is of {there}, and {ctx.base} is asked for", where=f"--lut {path}", hint=hint)
        ctx.reporter.event("cost", rows=len(rows), measured=0, teacher_ms=lut.table.teacher_ms, lut=str(path))
        ctx.note(f"latencies of candidates were read from {path}, not measured")
        if lut.table.method != METHOD and not ctx.from_table:
            ctx.note(f"{path} was measured by another version of hantc, in another way: predictions may be further off")
        costs = replace(lut.table, rows=rows, skipped=())
        return replace(state, costs=costs, proposals=proposals, skipped=state.skipped + skipped)

    def _row(self, ctx: Context, region: str, candidate: str, precision: str, macs: int, params: int) -> CostRow:
        return CostRow(
            region=region,
            candidate=candidate,
            precision=precision,
            latency_ms=0.0,
            iqr_ms=0.0,
            samples=0,
            backend=ctx.backend.name,
            device=ctx.device_key,
            threads=ctx.threads,
            batch=ctx.config.batch,
            macs=macs,
            params=params,
            predicted=not ctx.capabilities.measures,
        )

    def _teacher(self, state: State, ctx: Context, meter: Meter, region: Region) -> list[Work]:
        assert state.network is not None
        part = cut(state.network, region.input, region.output, region.in_shape, region.out_shape)
        model = emit(part).model
        name = work_digest(model)  # blocks that are alike are timed once
        work = []
        for precision in ctx.precisions:
            key = meter.key(teacher=name, precision=precision)
            rounded = precision == "int8" and not meter.known(key)
            try:
                timed = quantize_for_timing(model, ctx.quant) if rounded else model
            except HantcError as error:
                ctx.note(f"{region.name} stays in FP32: {error.message}")
                continue
            row = self._row(ctx, region.name, "teacher", precision, region.macs, region.params)
            chain = region.in_shape == region.out_shape
            work.append(Work(key, row, timed, chain, region.in_shape, region.out_shape))
        return work

    def _candidate(
        self, ctx: Context, meter: Meter, source: _Source, proposal: Proposal, seen: dict[str, tuple[str, ...]]
    ) -> list[Work]:
        """The candidate in every precision that it can run in. `seen`: those precisions, of all measured so far."""
        region, origin = source.region, source.origin if proposal.spec.family in DERIVED else None
        spec, size = proposal.spec, (proposal.macs, proposal.params)
        what: dict[str, object] = {"signature": asdict(Signature.of(region)), "spec": asdict(spec)}
        if origin is not None:
            what["origin"] = source.structures
        key = {p: meter.key(**what, precision=p) for p in ctx.precisions}
        same = digest(what)
        if same in seen:
            models = dict.fromkeys(seen[same], ModelProto())  # the meter has their figures by now
        elif all(meter.known(k) for k in key.values()):
            models = dict.fromkeys(ctx.precisions, ModelProto())  # and so has the store
        else:
            models = self._models(ctx, spec, Signature.of(region), origin)
        seen[same] = tuple(models)
        work = []
        for precision, model in models.items():
            if precision not in ctx.precisions:
                continue
            row = self._row(ctx, region.name, spec.name, precision, *size)
            chain = region.in_shape == region.out_shape
            work.append(Work(key[precision], row, model, chain, region.in_shape, region.out_shape))
        return work

    @staticmethod
    def _models(
        ctx: Context, spec: CandidateSpec, signature: Signature, origin: Origin | None
    ) -> dict[str, ModelProto]:
        """The candidate as it will run: norms folded, as floats and in INT8 (unless it cannot be)."""
        torch.manual_seed(ctx.config.seed)
        folded, _, _ = normalize(build(spec, signature, origin=origin).eval())
        plain = emit(folded).model
        if "int8" not in ctx.precisions or spec.family == "identity":
            return {ctx.base: plain}
        try:
            return {ctx.base: plain, "int8": quantize_for_timing(plain, ctx.quant)}
        except HantcError as error:
            ctx.reporter.event("int8_refused", candidate=spec.name, reason=error.message)
            return {ctx.base: plain}


def _with_what_can_be_written(network: fx.GraphModule, ctx: Context) -> Context:
    """Without INT8, if the network cannot be written in an opset that has it."""
    if "int8" in ctx.precisions:
        try:
            emit(network, opset=MIN_OPSET)
        except UnsupportedError as error:
            ctx.note(f"nothing is quantised: {error.message}")
            return replace(ctx, precisions=(ctx.base,))
    return ctx


def _key(meter: Meter, state: State, ctx: Context, model: ModelProto) -> str:
    """What a whole table depends on."""
    assert state.match is not None and state.proposals is not None
    asked = [(p.region, p.spec.name, p.macs, p.params) for p in state.proposals]
    regions = [asdict(r) for r in state.match.regions]
    network = digest(model.SerializeToString().hex())
    whole = ctx.config.pool == "whole"
    return meter.key(
        version=_VERSION, table=network, regions=regions, asked=asked, precisions=ctx.precisions, whole=whole
    )


def _recall(ctx: Context, key: str) -> CostTable | None:
    """The table of an earlier run on the same network, with the same candidates; None if there was none."""
    stored: Any = ctx.store.get_json("table", key)
    try:
        table = TypeAdapter(CostTable).validate_python(stored["table"])
        notes = TypeAdapter(list[str]).validate_python(stored["notes"])
    except (TypeError, KeyError, ValidationError):  # none, or of an older version
        return None
    for note in notes:
        ctx.note(note)
    return table


@dataclass(frozen=True)
class _Source:
    """A region and what candidates are derived from there."""

    region: Region
    origin: Origin
    structures: list[str]

    @staticmethod
    def of(state: State, region: Region) -> _Source:
        assert state.network is not None and state.match is not None
        origin = origin_of(state.network, state.match, region)
        return _Source(region, origin, [structure(origin.whole), *map(structure, origin.blocks)])


def _hopeful(
    proposals: Sequence[Proposal], own: Sequence[CostRow], ceilings: Ceilings, ctx: Context
) -> tuple[list[Proposal], list[tuple[str, str, str, str]]]:
    """Those that may be faster than the teacher's own operation (`own`: its rows), if the machine reaches its peak all
    the way; and (region, candidate, precision, reason) of the others."""
    peak = max(ceilings.peak(r.precision, ctx.threads) for r in own) / _SLACK
    bar = min(r.latency_ms for r in own)
    kept, dropped = [], []
    for p in proposals:
        least = 1e3 * 2 * p.macs * ctx.config.batch / peak
        if least <= bar:
            kept.append(p)
        else:
            reason = f"cannot be faster: {least:.3f} ms at the machine's peak against the teacher's {bar:.3f} ms"
            dropped.append((p.region, p.spec.name, "*", reason))
    return kept, dropped


def _advance(bar: Bar, units: float, share: float) -> None:
    bar.advance(units * share)
