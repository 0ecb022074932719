"""One run of the compiler, from options to a run folder; and finished runs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from onnx import ModelProto
from torch import fx, nn

import hantc
from hantc.backends.targets import Target
from hantc.core.atomic import write_bytes, write_json
from hantc.core.config import Cap, CompileConfig
from hantc.core.errors import BudgetError, HantcError, UsageError
from hantc.core.lut import write_lut
from hantc.core.memory import peak_memory, retained_memory
from hantc.core.pinning import can_pin
from hantc.core.progress import Reporter
from hantc.core.types import CostTable, Device, Plan
from hantc.data.dataset import Dataset
from hantc.dialect.importer import import_file, load_onnx
from hantc.inputs import check_folder, default_store, make_config, prepare
from hantc.passes.cold import check_cold, measure_cold
from hantc.passes.load import Load
from hantc.passes.normalize import Normalize
from hantc.passes.state import Context, State
from hantc.passes.verify import Verify
from hantc.pipeline import COMPILE, PROFILE, Passes, run_passes
from hantc.report.html import write_report
from hantc.report.summary import FILE_NAME, Summary, load

_BESIDE = ("model.engine", "model.optimized.onnx")  # what some runs have beside model.onnx
_OVER_CAP = 1.01  # files have a few numbers that are no weights
_OVER_BUDGET = 1.05  # measured over asked latency: more than the noise of two measurements
SPEED_TOLERANCE, ACCURACY_TOLERANCE = 0.15, 0.2  # share; points: how far a verification may be off
_EXACT, _EXACT_FP16 = 1e-3, 2e-2  # relative output difference that a run without data may show


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its figures, its student (as a graph module and as a file)."""

    folder: Path
    summary: Summary
    student: fx.GraphModule

    @property
    def model_path(self) -> Path:
        """The student's ONNX file."""
        return self.folder / "model.onnx"

    @property
    def report_path(self) -> Path:
        """The run's page."""
        return self.folder / "report.html"


@contextmanager
def _process_settings() -> Iterator[None]:
    """Give torch's thread count and random state, and freed memory, back to whoever embeds hantc."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), retained_memory():
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def compile_config(
    config: CompileConfig, reporter: Reporter, *, model: ModelProto | None = None, passes: Passes = COMPILE
) -> Run:
    """Run the whole pipeline and write the run folder. Raises HantcError subclasses with exit codes."""
    before = peak_memory()
    with _process_settings():
        state, ctx = prepare(config, reporter, model)
        state, timings = run_passes(passes, state, ctx)
        _check_memory(ctx, before)
        summary = _summary(state, ctx, timings)
        _write(state, ctx, summary)
    ctx.store.gc(max_bytes=config.store_limit)
    assert state.student is not None
    return Run(config.out, summary, state.student)


def profile_config(config: CompileConfig, reporter: Reporter) -> tuple[CostTable, Device, tuple[str, ...]]:
    """Measure the candidates of a model's regions, with or without data; the table, the device it holds for, and what
    is to be known of it."""
    with _process_settings():
        state, ctx = prepare(config, reporter, measure_only=True)
        state, _ = run_passes(PROFILE, state, ctx)
    assert state.costs is not None
    return state.costs, ctx.capabilities.device, tuple(ctx.notes)


def _check_memory(ctx: Context, before: int) -> None:
    """Say so if the limit did not hold: it bounds what is trained at once, not the data or one large candidate.
    `before`: the process's peak when the run began."""
    peak, limit = peak_memory(), ctx.memory_limit
    if peak > max(limit, before):
        ctx.note(f"memory peaked at {peak / 2**30:.1f} GiB, above the limit of {limit / 2**30:.1f} GiB (--memory)")


def _summary(state: State, ctx: Context, timings: Mapping[str, float]) -> Summary:
    assert state.summary is not None and state.plan is not None and state.match is not None
    device, config = ctx.capabilities.device, ctx.config
    facts = {
        k: v for k, v in state.summary.items() if k not in ("kept_original", "max_relative_difference", "timing_note")
    }
    return Summary.model_validate(
        {
            "hantc_version": hantc.__version__,
            "model": str(config.model),
            "model_hash": state.model_hash,
            "target": config.target,
            "target_definition": dict(ctx.target),
            "device": {**asdict(device), "threads": ctx.threads, "notes": list(ctx.capabilities.notes)},
            "data": None if ctx.data is None else _data_facts(ctx.data),
            "seed": config.seed,
            "status": _status(state, ctx),
            "regions": len(state.match.regions),
            "choices": [asdict(c) for c in state.plan.choices],
            "solver": dict(state.plan.solver),
            "timings_s": dict(timings),
            "notes": list(ctx.notes),
            "max_relative_difference": state.summary["max_relative_difference"],
            "backend": ctx.backend.name,
            "batch": config.batch,
            "effort": config.effort,
            "memory": {"limit_bytes": ctx.memory_limit, "peak_bytes": peak_memory()},
            "predicted": not ctx.capabilities.measures,
            "engine": _engine(state),
            "options": _options(config),
            **facts,
        }
    )


def _engine(state: State) -> dict[str, Any] | None:
    if state.deployed is None:
        return {"file": None, "reason": state.undeployed} if state.undeployed else None
    return {"file": state.deployed.file, **state.deployed.facts}


def _data_facts(data: Dataset) -> dict[str, Any]:
    return {
        "source": data.source,
        "labelled": data.labelled,
        "counts": {"train": len(data.train), "search": len(data.search), "val": len(data.val)}
        | ({"unlabelled": len(data.more)} if data.more is not None else {}),
        "notes": list(data.notes),
        "fingerprint": data.fingerprint,
    }


def _options(config: CompileConfig) -> dict[str, Any]:
    """What was asked for, with absolute paths, so that the run can be verified from anywhere."""
    options = config.model_dump(mode="json", exclude={"out", "store", "store_limit", "resume"}, exclude_none=True)
    for name in ("model", "data", "val", "unlabelled", "preprocess", "lut"):
        if name in options and Path(options[name]).expanduser().exists():
            options[name] = str(Path(options[name]).expanduser().absolute())
    return options


def _status(state: State, ctx: Context) -> str:
    facts: Any = state.summary
    budget, drop = ctx.config.budget, facts["accuracy_drop"]
    if state.undeployed:
        return "engine_missing"
    if budget is not None:
        allowed = budget.in_ms(facts["teacher"]["latency_ms"])
        if facts["student"]["latency_ms"] > _OVER_BUDGET * allowed:
            return "budget_missed"
    if any(facts["student"][k] > _OVER_CAP * cap.of(facts["teacher"][k]) for k, cap in _caps(ctx.config)):
        return "budget_missed"
    if drop is None and ctx.data is not None:
        drop = 100 * (1 - facts["agreement"])  # without labels the drop that can be held is that in agreement
    if ctx.config.max_drop is not None and drop is not None and drop > ctx.config.max_drop:
        return "drop_exceeded"
    return "done"


def _caps(config: CompileConfig) -> list[tuple[str, Cap]]:
    """Bounds on figures of the summary."""
    named = (
        ("params", config.budget_params),
        ("macs", config.budget_macs),
        ("activation_bytes", config.budget_memory),
    )
    return [(name, cap) for name, cap in named if cap is not None]


def _write(state: State, ctx: Context, summary: Summary) -> None:
    """Put every file in place atomically. `summary.json` makes a folder a run: it goes first from an old run,
    and comes last but one; a run that is broken off before it leaves no model either."""
    assert state.emitted is not None and state.match is not None and state.costs is not None
    out = ctx.out
    for name in (FILE_NAME, *_BESIDE):
        (out / name).unlink(missing_ok=True)
    try:
        write_bytes(out / "model.onnx", state.emitted.SerializeToString())
        if state.deployed is not None:
            write_bytes(out / state.deployed.file, state.deployed.data)
        write_json(out / "plan.json", state.plan)
        skipped = tuple((r, c, "*", why) for r, c, why in state.skipped)
        write_lut(
            out / "lut.json", replace(state.costs, skipped=skipped + state.costs.skipped), ctx.capabilities.device
        )
        write_json(out / "scores.json", {"rows": list(state.scores or ())})
        write_json(out / "regions.json", {"regions": state.match.regions, "rejections": state.match.rejections})
        write_json(out / "front.json", {"solutions": _front(state)})
        write_json(out / "history.json", {"finetune": [dict(h) for h in state.history]})
        summary.save(out)
    except BaseException:
        for name in (FILE_NAME, "model.onnx", *_BESIDE):
            (out / name).unlink(missing_ok=True)
        raise
    write_report(out)


def _front(state: State) -> list[dict[str, Any]]:
    return [
        {
            "predicted_ms": e.plan.predicted_latency_ms,
            "measured_ms": e.measured_ms,
            "score": e.plan.predicted_score,
            "accuracy": e.accuracy,
            "chosen": e.chosen,
        }
        for e in state.evaluated
    ]


def compile(
    model: str | os.PathLike[str] | nn.Module,
    *,
    target: str = "xeon",
    data: str | os.PathLike[str] | None = None,
    budget: float | str | None = None,
    example_input: torch.Tensor | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> Run:
    """Compile a trained vision network for a target.

    `model`: path of an ONNX file, or a torch module (then `example_input`, a batch of one, is needed; the
    exported teacher is kept as `teacher.onnx` in the run folder). `budget`: fraction of the teacher's latency
    (0.5) or milliseconds ("8ms"). `target`: a name or a TOML file. Other options are those of the command line
    with underscores: `val`, `unlabelled`, `preprocess`, `max_drop`, `effort`, `time_limit` ("30m" or seconds),
    `precision`, `input_shape` ("3x224x224"), `pool`, `region` (a list of "FROM:TO"), `recipe`, `memory`,
    `backend`, `threads`, `batch`, `lut`, `optimized`, `out`, `store`, `seed`; a module also takes `name`. Raises
    what the command line exits with: UsageError (2), BudgetError (1), HantcError (3).
    """
    proto: ModelProto | None = None
    if isinstance(model, nn.Module):
        from hantc.dialect.torch_export import export_module

        if example_input is None:
            raise UsageError("a torch module needs example_input, a tensor of one sample", where="hantc.compile")
        name = options.pop("name", type(model).__name__)
        out = Path(options.setdefault("out", f"{name}.hantc"))
        check_folder(out, f"out={out}")
        make_config(out / "teacher.onnx", target=target, budget=budget, **options)  # before the slow export
        proto = export_module(model, example_input)
        path = out / "teacher.onnx"
        write_bytes(path, proto.SerializeToString())
    else:
        path = Path(model)
    config = make_config(path, target=target, data=data, budget=budget, **options)
    return compile_config(config, reporter or Reporter(), model=proto)


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Open a finished run folder; UsageError if it is none."""
    path = Path(folder)
    return Run(path, load(path), import_file(path / "model.onnx"))


def verify_run(folder: Path, reporter: Reporter, *, cold: bool = False) -> dict[str, Any]:
    """Measure a run's file again, beside its teacher, as the run itself did at its end.

    The answer holds `teacher`, `student`, `speedup`, `accuracy_drop`, `agreement`, the `recorded` figures, `ok`,
    and the `differences` that make it false: the speed-up off by more than SPEED_TOLERANCE, an accuracy or the
    agreement by more than ACCURACY_TOLERANCE points. Latencies themselves may differ: machines have slow days.
    Without the run's data, only what needs none is checked. With `cold` also the latencies behind other work, as
    `cold`. UsageError if the run or its teacher is not there.
    """
    summary = load(folder)
    teacher = _teacher_file(folder, summary)
    notes: list[str] = []
    wanted = {k: summary.options.get(k) for k in ("data", "val", "preprocess", "precision", "input_shape")}
    gone = [k for k in ("data", "val") if wanted[k] and not Path(str(wanted[k])).exists()]
    if summary.data is not None and (gone or not wanted["data"]):
        notes.append(f"{summary.data.source} is no longer there: accuracy and agreement were not checked")
        wanted |= {"data": None, "val": None, "preprocess": None}
    student = load_onnx(folder / "model.onnx")
    with TemporaryDirectory() as place, _process_settings():
        config = make_config(
            teacher,
            target=summary.target,
            backend=summary.backend,
            threads=summary.device.threads,
            batch=summary.batch,
            seed=summary.seed,
            pin=bool(summary.options.get("pin")) and can_pin(),
            train_device="cpu",  # nothing learns here
            out=Path(place, "run"),
            store=Path(place, "store"),
            **wanted,
        )
        target = Target.model_validate(summary.target_definition) if summary.target_definition else None
        state, ctx = prepare(config, reporter, target=target)
        if cold:
            check_cold(ctx)
        predicted = summary.predicted_latency_ms or math.nan
        plan = Plan((), predicted, math.inf, 0.0)
        state = replace(state, emitted=student, plan=plan, costs=CostTable((), summary.teacher.latency_ms or 1.0, 0.0))
        state, _ = run_passes((Load(), Normalize(), Verify()), state, ctx)
        behind = measure_cold([Verify.teachers(state, ctx)[0], student], ctx) if cold else []
        reporter.log_path = None
    if summary.device.cpu != ctx.capabilities.device.cpu:
        notes.append(f"the run was measured on {summary.device.cpu}, this is {ctx.capabilities.device.cpu}")
    found = compare(summary, {**(state.summary or {})}, same_data=ctx.data is not None or summary.data is None)
    changed = [] if state.model_hash == summary.model_hash else [f"the teacher {teacher} has changed since the run"]
    if ctx.data is not None and summary.data is not None and ctx.data.fingerprint != summary.data.fingerprint:
        changed.append(f"the data {wanted['data']} has changed since the run")
    differences = [*changed, *found.pop("differences")]
    if behind:
        found["cold"] = {n: t.median_ms for n, t in zip(("teacher_ms", "student_ms"), behind, strict=True)}
        found["cold"]["speedup"] = behind[0].median_ms / behind[1].median_ms
    return {"run": str(folder), "ok": not differences, "differences": differences, "notes": notes, **found}


def _teacher_file(folder: Path, summary: Summary) -> Path:
    for place in (summary.options.get("model"), summary.model):
        if place and Path(place).is_file():
            return Path(place)
    raise UsageError(
        f"the run's teacher, {summary.model}, is no longer there",
        where=str(folder),
        hint="put the file back, or run hantc on it again",
    )


def compare(summary: Summary, facts: Mapping[str, Any], *, same_data: bool) -> dict[str, Any]:
    """Figures measured now against recorded ones: both, and a line for each that differs by too much."""
    keys = ("speedup", "accuracy_drop", "agreement", "max_relative_difference")
    nets = {k: {f: facts[k][f] for f in ("latency_ms", "latency_iqr_ms", "accuracy")} for k in ("teacher", "student")}
    now = {**nets, **{k: facts[k] for k in keys}}
    recorded = {**{k: {f: getattr(getattr(summary, k), f) for f in nets[k]} for k in nets}}
    recorded |= {k: getattr(summary, k) for k in keys}
    if not same_data:
        now |= {"accuracy_drop": None, "agreement": None, "max_relative_difference": None}
    differences = []
    if facts["kept_original"]:
        differences.append("the student is slower than its teacher")
    was, is_ = summary.speedup, now["speedup"]
    if was is not None and abs(is_ / was - 1) > SPEED_TOLERANCE:
        differences.append(f"speed-up {is_:.2f}×, recorded {was:.2f}× (tolerance {SPEED_TOLERANCE:.0%})")
    pairs = [(f"{k} accuracy", nets[k]["accuracy"], getattr(summary, k).accuracy) for k in nets]
    shares = [None if v is None else 100 * v for v in (now["agreement"], summary.agreement)]
    pairs.append(("agreement", shares[0], shares[1]))
    for name, a, b in pairs if same_data else ():
        if a is not None and b is not None and abs(a - b) > ACCURACY_TOLERANCE:
            differences.append(f"{name} {a:.2f} %, recorded {b:.2f} % (tolerance {ACCURACY_TOLERANCE} points)")
    half = {"fp16", "bf16"} & set(summary.target_definition.get("precisions", ()))
    if summary.data is None and facts["max_relative_difference"] > (_EXACT_FP16 if half else _EXACT):
        differences.append(
            f"outputs differ by {facts['max_relative_difference']:.1e} relative, though no data was given"
        )
    tolerance = {"speed": SPEED_TOLERANCE, "accuracy_points": ACCURACY_TOLERANCE}
    return {**now, "recorded": recorded, "tolerance": tolerance, "differences": differences}


__all__ = [
    "BudgetError",
    "HantcError",
    "Run",
    "compile",
    "compile_config",
    "default_store",
    "load_run",
    "make_config",
    "prepare",
    "profile_config",
    "verify_run",
]
