"""Verify: emitted model -> figures, measured beside the teacher and the teacher quantised as a whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx
from onnx import ModelProto

from hantc.core.backend_api import Artefact, BuildSpec
from hantc.core.errors import HantcError
from hantc.core.types import Timing, digest
from hantc.data.dataset import Split
from hantc.dialect.emitter import emit
from hantc.dialect.examples import example_inputs
from hantc.dialect.floats import in_bf16
from hantc.dialect.graph import count_macs, shapes_of
from hantc.dialect.importer import import_model, model_info
from hantc.dialect.qdq import MIN_OPSET, quantize, quantize_whole
from hantc.passes import elsewhere
from hantc.passes.assemble import calibration_feeds, deployable
from hantc.passes.limits import activation_bytes
from hantc.passes.meter import Meter
from hantc.passes.state import Context, State

_VERSION = 11
_RESTLESS = 0.25  # quartiles of a latency so far apart, relative to it, are worth a warning
_FILES, _CLOCK = "measuring teacher, student and INT8 baseline", "measuring the machine's pace"
_BASELINES = ("baseline_int8", "baseline_bf16", "baseline_given")
_NOISE = 1.03  # a no-data student this much slower than its teacher is not slower "beyond noise"


@dataclass(frozen=True)
class _Outputs:
    """First outputs of one network over a split, and what follows for accuracy."""

    values: np.ndarray[Any, Any]
    accuracy: float | None


class Verify:
    """Emitted model -> summary: latency interleaved, accuracy and agreement of the very file, on the backend."""

    name: ClassVar[str] = "verify"
    requires: ClassVar[tuple[str, ...]] = ("network", "plan", "emitted", "costs")
    ensures: ClassVar[tuple[str, ...]] = ("summary", "emitted")

    def call(self, state: State, ctx: Context) -> State:
        """Measure, unless the same files were measured on the same data and device before."""
        assert state.emitted is not None and state.network is not None
        assert state.plan is not None and state.costs is not None
        key = digest(
            {
                "version": _VERSION,
                "student": digest(state.emitted.SerializeToString().hex()),
                "teacher": state.model_hash,
                "device": ctx.device_key,
                "given": state.given_hash,
                "options": [ctx.threads, ctx.config.batch, ctx.backend.name, *(["pinned"] if ctx.cores else [])],
                "fewer_threads": ctx.fewer_threads,
                "rivals": [asdict(r.capabilities().device) for r in ctx.rivals],
                "data": ctx.data.fingerprint if ctx.data else None,
                "predicted": [state.plan.predicted_latency_ms, state.costs.teacher_ms],
            }
        )
        stored = ctx.store.get_json("verify", key)
        if stored is not None:
            if stored["kept_original"]:
                state = _unchanged(state, self.teachers(state, ctx)[0])
            _tell(stored, ctx)
            return replace(state, summary=stored)
        baseline, reason = self._baseline(state, ctx)
        teacher, clock_model = self.teachers(state, ctx)
        others = {} if baseline is None else {"baseline_int8": baseline}
        if ctx.base == "bf16" and not ctx.from_table:
            others["baseline_bf16"] = in_bf16(state.model)
        if state.given is not None and not ctx.from_table and ctx.backend.supports(state.given)[0]:
            others["baseline_given"] = state.given
        assert state.emitted is not None
        timed = [teacher, state.emitted, *others.values()]
        timings = self._by_table(state) if ctx.from_table else self._time(timed, ctx)
        kept_original = False
        if ctx.data is None and timings[1].median_ms > timings[0].median_ms * _NOISE:
            # nothing was gained and something lost: the user's own file is the better answer
            state, kept_original = _unchanged(state, teacher), True
            timings[1] = timings[0]
        assert state.emitted is not None
        # the teacher's outputs are those of the user's own file: what FP16 does to them is the student's doing
        networks = {"teacher": state.model, "student": state.emitted, **others}
        pace = self._pace(state, ctx, timings, (teacher, clock_model))
        facts = self._facts(state, ctx, networks, timings, pace)
        facts |= {"baseline_int8_reason": reason, "kept_original": kept_original}
        facts["timing_note"] = self._restless(timings)
        facts["teacher_by_backend"] = elsewhere.by_backend(state.model, timings[0].median_ms, ctx)
        facts["teacher_by_threads"] = elsewhere.by_threads(state.model, timings[0].median_ms, ctx)
        _tell(facts, ctx)
        if ctx.capabilities.measures:
            ctx.store.put_json("verify", key, facts)
        return replace(state, summary=facts)

    @staticmethod
    def teachers(state: State, ctx: Context) -> tuple[ModelProto, ModelProto]:
        """The teacher that speed-ups are over, and the normalized network as the table has it. In FP16 they are one:
        engines fold the shape arithmetic that files are full of, which a prediction of the file itself counts."""
        assert state.network is not None
        network = emit(state.network).model
        if ctx.base == "bf16":
            return state.model, in_bf16(network)
        if ctx.base != "fp16":
            return state.model, network
        feeds = calibration_feeds(state.network, ctx.data, 64, 16) if ctx.data is not None else []
        half = deployable(network, ctx, feeds)
        return half, half

    @staticmethod
    def _baseline(state: State, ctx: Context) -> tuple[ModelProto | None, str | None]:
        """The teacher quantised as a whole, as a user of onnxruntime would (for other engines: as they ask for); or why
        it cannot be."""
        if ctx.data is None:
            return None, "no --data to calibrate with"
        if ctx.from_table:
            return None, "the latency table has no figure for it"
        if "int8" not in ctx.capabilities.precisions:
            return None, f"backend {ctx.backend.name} has no INT8"
        assert state.network is not None
        try:
            feeds = calibration_feeds(state.network, ctx.data, 128, 16)
            if ctx.quant.symmetric:
                model = quantize(emit(state.network, opset=MIN_OPSET).model, None, feeds, ctx.quant)
            else:
                model = quantize_whole(state.model, feeds, ctx.quant)
            model = deployable(model, ctx, feeds)
            ok, why = ctx.backend.supports(model)
        except HantcError as error:
            return None, error.message
        return (model, None) if ok else (None, why)

    @staticmethod
    def _time(networks: Sequence[ModelProto], ctx: Context, what: str = _FILES) -> list[Timing]:
        """Each network in a pair with the first, so that none pushes the others out of the caches; on the clock of
        the first pair."""
        spec = BuildSpec(ctx.threads, ctx.config.batch)
        _first = ctx.first_session(networks[0])
        artefacts = [ctx.backend.build(m, spec) for m in networks]
        protocol = ctx.protocol(warmup=5, samples=41, min_sample_ms=15.0, whole=True)
        with ctx.reporter.bar(what, 1.0):
            pairs = [ctx.backend.measure([artefacts[0], a], protocol) for a in artefacts[1:]]
        first = pairs[0][0]
        timings = [first]
        for teacher, other in pairs:
            pace = first.median_ms / teacher.median_ms
            timings.append(replace(other, median_ms=other.median_ms * pace, iqr_ms=other.iqr_ms * pace))
        return timings

    @staticmethod
    def _by_table(state: State) -> list[Timing]:
        """Teacher and student as the table has them, in milliseconds of the clock on its machine's wall."""
        assert state.plan is not None and state.costs is not None
        times = (state.costs.reference_ms, state.plan.predicted_latency_ms)
        return [Timing(state.costs.pace * ms, 0.0, 0) for ms in times]

    @staticmethod
    def _pace(state: State, ctx: Context, timings: Sequence[Timing], teachers: tuple[ModelProto, ModelProto]) -> float:
        """How long a millisecond of the table's clock took on the wall's when teacher and student were timed. By the
        reference network, as all that the table holds: a large teacher takes up to twice as long where others use the
        caches, which its student does not feel. Where there is none, or the student has the teacher's own weights: by
        the normalized teacher."""
        assert state.emitted is not None and state.costs is not None
        if ctx.from_table:
            return state.costs.pace
        protocol = ctx.protocol(warmup=5, samples=41, min_sample_ms=15.0, whole=True)
        meter = Meter(ctx) if state.costs.rows and ctx.data is not None else None
        clock = meter.on_clock_of(state.costs) if meter is not None else None
        if meter is not None and clock is not None:
            with ctx.reporter.bar(_CLOCK, 1.0):
                return timings[1].median_ms / (clock * meter.file(state.emitted, protocol).median_ms)
        again, normalized = Verify._time(teachers, ctx, _CLOCK)
        return normalized.median_ms * timings[0].median_ms / again.median_ms / state.costs.teacher_ms

    @staticmethod
    def _restless(timings: Sequence[Timing]) -> str:
        """A note where the latencies spread widely, else ""."""
        spread = max(t.iqr_ms / max(t.median_ms, 1e-9) for t in timings)
        if spread <= _RESTLESS:
            return ""
        return (
            f"the machine was restless while the files were timed (quartiles {100 * spread:.0f} % apart): "
            "latencies are less certain; `hantc verify` measures again"
        )

    def _facts(
        self,
        state: State,
        ctx: Context,
        networks: Mapping[str, ModelProto],
        timings: Sequence[Timing],
        pace: float,
    ) -> dict[str, Any]:
        assert state.network is not None and state.plan is not None and state.costs is not None
        outputs = dict(zip(networks, self._outputs(ctx, list(networks.values())), strict=True))
        rows: dict[str, dict[str, Any] | None] = dict.fromkeys(_BASELINES)
        for (name, model), timing in zip(networks.items(), timings, strict=True):
            rows[name] = {
                "latency_ms": timing.median_ms,
                "latency_iqr_ms": timing.iqr_ms,
                "accuracy": outputs[name].accuracy,
                "size_bytes": model.ByteSize(),
                **(_size(model) if name in ("teacher", "student") else {}),
            }
        teacher, student = rows["teacher"], rows["student"]
        assert teacher is not None and student is not None
        for row in map(rows.get, _BASELINES):
            if row is not None:
                row |= {"params": teacher["params"], "macs": teacher["macs"]}
        if state.student is not None and ctx.data is not None:
            student |= _size(emit(state.student).model)  # INT8 nodes hide weights and products from counting
        teacher["activation_bytes"] = activation_bytes(state.network, ctx)
        student["activation_bytes"] = activation_bytes(state.student or state.network, ctx)
        predicted = pace * state.plan.predicted_latency_ms
        drop = None
        if teacher["accuracy"] is not None and student["accuracy"] is not None:
            drop = teacher["accuracy"] - student["accuracy"]
        return {
            **rows,
            "speedup": teacher["latency_ms"] / student["latency_ms"],
            "accuracy_drop": drop,
            "predicted_latency_ms": predicted,
            "prediction_error": None
            if ctx.from_table
            else abs(predicted - student["latency_ms"]) / student["latency_ms"],
            "agreement": _agreement(outputs["teacher"].values, outputs["student"].values),
            "max_relative_difference": _difference(outputs["teacher"].values, outputs["student"].values),
            "ops": {k: _ops(networks[k]) for k in ("teacher", "student")},
        }

    def _outputs(self, ctx: Context, networks: Sequence[ModelProto]) -> list[_Outputs]:
        """Every network's first output on the validation split, or on random input without data."""
        spec = BuildSpec(ctx.threads, ctx.config.batch)
        split = ctx.data.val if ctx.data is not None else None
        n = len(split) if split is not None else 1
        found = []
        with ctx.reporter.bar("checking the files on validation data", n * len(networks)) as bar:
            for model in networks:
                artefact = ctx.backend.build(model, spec)
                found.append(_run_split(ctx, artefact, model, split, bar))
        return found


def _unchanged(state: State, teacher: ModelProto) -> State:
    """The state of a run that came to nothing: the teacher's file, and a plan that leaves every region alone."""
    assert state.plan is not None
    kept = tuple(replace(c, candidate="teacher", cost_ms=c.teacher_cost_ms) for c in state.plan.choices)
    student = state.network if state.student is not None else None
    return replace(state, emitted=teacher, student=student, plan=replace(state.plan, choices=kept))


def _tell(facts: Mapping[str, Any], ctx: Context) -> None:
    """The notes that follow from the figures."""
    if facts["timing_note"]:
        ctx.note(facts["timing_note"])
    if facts["kept_original"]:
        ctx.note("rewriting gained nothing: the student was slower than the teacher, which was kept as it is")
    given, student = facts.get("baseline_given"), facts.get("student")
    if given and student and given["latency_ms"] < student["latency_ms"]:
        ctx.note(
            f"the file as given takes {given['latency_ms']:.2f} ms, less than the student: a smaller "
            "--budget is needed to gain anything over it"
        )
    elsewhere.tell(facts, ctx)


def _run_split(ctx: Context, artefact: Artefact, model: ModelProto, split: Split | None, bar: Any) -> _Outputs:
    info = model_info(model)
    if split is None:
        feeds = {s.name: t.numpy() for s, t in zip(info.inputs, example_inputs(info, ctx.config.batch), strict=True)}
        return _Outputs(ctx.backend.run(artefact, feeds)[0], None)
    spec = info.inputs[0]
    fixed = spec.shape[0] if spec.shape and isinstance(spec.shape[0], int) else None
    size = fixed or 50
    values, hits, seen = [], 0, 0
    for i in range(0, len(split), size):
        index = list(range(i, min(len(split), i + size)))
        real = len(index)
        index += [index[-1]] * (size - real if fixed else 0)
        x, y = split.batch(index)
        out = ctx.backend.run(artefact, {spec.name: x.numpy().astype(spec.dtype)})[0][:real]
        values.append(out)
        if y is not None and out.ndim == 2:
            hits += int((out.argmax(1) == y.numpy()[:real]).sum())
            seen += real
        bar.advance(real)
    return _Outputs(np.concatenate(values), 100 * hits / seen if seen else None)


def _agreement(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Share of equal top-1 for (N, classes) outputs, elsewhere of values within 1 % of the teacher's range."""
    if a.ndim == 2 and a.shape[1] > 1:
        return float((a.argmax(1) == b.argmax(1)).mean())
    return float((np.abs(a - b) <= 0.01 * max(float(np.ptp(a)), 1e-12)).mean())


def _difference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    value = float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-12))
    return value if math.isfinite(value) else 1e9


def _size(model: ModelProto) -> dict[str, int]:
    """Weights, and multiply-accumulates for one sample, of a float model."""
    module = import_model(model)
    shapes = shapes_of(module, example_inputs(module.meta["info"], 1))
    weights = sum(math.prod(i.dims) for i in model.graph.initializer if i.data_type in _FLOATS)
    return {"params": weights, "macs": count_macs(module, shapes)}


_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def _ops(model: ModelProto) -> dict[str, int]:
    return dict(Counter(n.op_type for n in model.graph.node).most_common())
