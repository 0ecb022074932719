"""One run of the compiler, from options to a run folder; and finished runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto
from torch import fx, nn

import hantc
from hantc.backends.registry import get_backend
from hantc.backends.targets import get_target
from hantc.core.atomic import write_bytes, write_json
from hantc.core.config import EFFORTS, Budget, CompileConfig, parse_drop, parse_duration
from hantc.core.errors import BudgetError, HantcError, UsageError
from hantc.core.progress import Reporter
from hantc.core.store import Store
from hantc.core.types import digest
from hantc.data.dataset import load_dataset
from hantc.data.preprocess import load_preprocess
from hantc.dialect.importer import import_file, load_onnx, model_info
from hantc.passes.state import Clock, Context, State
from hantc.pipeline import COMPILE, Passes, run_passes
from hantc.report.html import write_report
from hantc.report.summary import Summary, load

_OVER_BUDGET = 1.05  # measured over asked latency: more than the noise of two measurements


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


def default_store() -> Path:
    """Where measurements and trained weights are kept between runs, if nothing else is said."""
    return Path.home() / ".cache" / "hantc"


def prepare(config: CompileConfig, reporter: Reporter, model: ModelProto | None = None) -> tuple[State, Context]:
    """Check every option and input before any work is done; UsageError names the one that is wrong."""
    target = get_target(config.target)
    _check_out(config.out)
    model = model if model is not None else load_onnx(config.model)
    backend = get_backend(target.backend)
    capabilities = backend.capabilities()
    if not capabilities.available:
        raise UsageError(f"target {target.name} cannot be used here: {capabilities.reason}", where="--target")
    precisions = tuple(p for p in target.precisions if p in capabilities.precisions)
    if config.precision not in ("auto", *precisions):
        raise UsageError(
            f"target {target.name} has no {config.precision} here", where="--precision", hint="one of: auto, " + ", ".join(precisions)
        )
    if config.precision == "fp32" or config.data is None:  # rounding is no exact rewrite
        precisions = ("fp32",)
    threads = config.threads or capabilities.device.cores
    torch.set_num_threads(max(1, min(threads, os.cpu_count() or 1)) if config.threads else capabilities.device.cores)
    torch.manual_seed(config.seed)
    effort = EFFORTS[config.effort]
    if config.time_limit is not None:
        effort = replace(effort, time_limit_s=config.time_limit)
    config.out.mkdir(parents=True, exist_ok=True)
    reporter.log_path = config.out / "log.jsonl"
    info = model_info(model)
    data = None
    if config.data is not None:
        if not info.inputs:
            raise UsageError("the model has no inputs", where=str(config.model))
        preprocess = load_preprocess(config.preprocess, config.model, info.inputs[0])
        data = load_dataset(
            config.data,
            config.val,
            preprocess,
            info.inputs[0],
            seed=config.seed,
            num_classes=_classes(model),
            reporter=reporter,
        )
    ctx = Context(
        config=config,
        effort=effort,
        backend=backend,
        capabilities=capabilities,
        precisions=precisions,
        store=Store(config.store),
        reporter=reporter,
        clock=Clock(effort.time_limit_s),
        threads=threads,
        out=config.out,
        data=data,
    )
    for note in (*capabilities.notes, *(data.notes if data else ())):
        ctx.note(note)
    if data is None:
        ctx.note("no --data: only exact rewrites were admitted; with images (labels optional) regions are replaced and quantised")
    return State(model=model, model_hash=digest(model.SerializeToString().hex())), ctx


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError("is a file, not a folder", where=f"--out {out}")
    parent = out if out.exists() else next(p for p in [out, *out.absolute().parents] if p.exists())
    if not os.access(parent, os.W_OK):
        raise UsageError("cannot be written to", where=f"--out {out}", hint="choose another folder with --out")


def _classes(model: ModelProto) -> int | None:
    shape = model_info(model).outputs[0].shape
    last = shape[-1] if len(shape) == 2 else None
    return last if isinstance(last, int) and last > 1 else None


def compile_config(
    config: CompileConfig, reporter: Reporter, *, model: ModelProto | None = None, passes: Passes = COMPILE
) -> Run:
    """Run the whole pipeline and write the run folder. Raises HantcError subclasses with exit codes."""
    state, ctx = prepare(config, reporter, model)
    state, timings = run_passes(passes, state, ctx)
    summary = _summary(state, ctx, timings)
    _write(state, ctx, summary)
    assert state.student is not None
    return Run(config.out, summary, state.student)


def _summary(state: State, ctx: Context, timings: Mapping[str, float]) -> Summary:
    assert state.summary is not None and state.plan is not None and state.match is not None
    device, config = ctx.capabilities.device, ctx.config
    facts = {k: v for k, v in state.summary.items() if k not in ("kept_original", "max_relative_difference")}
    return Summary.model_validate(
        {
            "hantc_version": hantc.__version__,
            "model": str(config.model),
            "target": config.target,
            "device": {**asdict(device), "threads": ctx.threads, "notes": list(ctx.capabilities.notes)},
            "data": None
            if ctx.data is None
            else {
                "source": ctx.data.source,
                "labelled": ctx.data.labelled,
                "counts": {"train": len(ctx.data.train), "search": len(ctx.data.search), "val": len(ctx.data.val)},
                "notes": list(ctx.data.notes),
            },
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
            "predicted": not ctx.capabilities.measures,
            **facts,
        }
    )


def _status(state: State, ctx: Context) -> str:
    facts: Any = state.summary
    budget, drop = ctx.config.budget, facts["accuracy_drop"]
    if budget is not None:
        allowed = budget.in_ms(facts["teacher"]["latency_ms"])
        if facts["student"]["latency_ms"] > _OVER_BUDGET * allowed:
            return "budget_missed"
    if ctx.config.max_drop is not None and drop is not None and drop > ctx.config.max_drop:
        return "drop_exceeded"
    return "done"


def _write(state: State, ctx: Context, summary: Summary) -> None:
    """Put every file in place atomically; `summary.json`, which makes a folder a run, comes last but one."""
    assert state.emitted is not None and state.match is not None and state.costs is not None
    out = ctx.out
    write_bytes(out / "model.onnx", state.emitted.SerializeToString())
    write_json(out / "plan.json", state.plan)
    skipped = tuple((r, c, "*", why) for r, c, why in state.skipped)
    write_json(out / "lut.json", replace(state.costs, skipped=skipped + state.costs.skipped))
    write_json(out / "scores.json", {"rows": list(state.scores or ())})
    write_json(out / "regions.json", {"regions": state.match.regions, "rejections": state.match.rejections})
    write_json(
        out / "front.json",
        {
            "solutions": [
                {
                    "predicted_ms": e.plan.predicted_latency_ms,
                    "measured_ms": e.measured_ms,
                    "score": e.plan.predicted_score,
                    "accuracy": e.accuracy,
                    "chosen": e.chosen,
                }
                for e in state.evaluated
            ]
        },
    )
    write_json(out / "history.json", {"finetune": [dict(h) for h in state.history]})
    summary.save(out)
    write_report(out)


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

    `model`: path of an ONNX file, or a torch module (then `example_input`, a batch of one, is needed).
    `budget`: fraction of the teacher's latency (0.5) or milliseconds ("8ms"). Other options are those of the
    command line with underscores: `val`, `preprocess`, `max_drop`, `effort`, `time_limit` ("30m" or seconds),
    `precision`, `threads`, `batch`, `lut`, `out`, `store`, `seed`. Raises what the command line exits with:
    UsageError (2), BudgetError (1), HantcError (3).
    """
    proto: ModelProto | None = None
    if isinstance(model, nn.Module):
        from hantc.dialect.torch_export import export_module

        if example_input is None:
            raise UsageError("a torch module needs example_input, a tensor of one sample", where="hantc.compile")
        proto = export_module(model, example_input)
        path = Path(options.pop("name", type(model).__name__) + ".onnx")
    else:
        path = Path(model)
    if "time_limit" in options and isinstance(options["time_limit"], str):
        options["time_limit"] = parse_duration(options["time_limit"])
    if isinstance(options.get("max_drop"), str):
        options["max_drop"] = parse_drop(options["max_drop"])
    options.setdefault("out", path.with_suffix(".hantc"))
    options.setdefault("store", default_store())
    config = CompileConfig(
        model=path,
        target=target,
        data=None if data is None else str(data),
        budget=None if budget is None else Budget.parse(str(budget)),
        **options,
    )
    return compile_config(config, reporter or Reporter(), model=proto)


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Open a finished run folder; UsageError if it is none."""
    path = Path(folder)
    return Run(path, load(path), import_file(path / "model.onnx"))


__all__ = ["BudgetError", "HantcError", "Run", "compile", "compile_config", "default_store", "load_run", "prepare"]
