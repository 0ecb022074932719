"""The command line. The only place that reads the environment, prints, or decides exit codes."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from hantc import __version__
from hantc.core.config import EFFORTS, CompileConfig
from hantc.core.errors import HantcError, UsageError
from hantc.core.progress import Bar, Reporter
from hantc.report.text import fmt_seconds

DONE, MISSED, USAGE, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 130
_TELL_S = 30.0  # between progress lines where there is no terminal
_PIPE_WIDTH = 160
_EFFORT_HELP = ", ".join(f"{name} ≈ {fmt_seconds(e.time_limit_s)}" for name, e in EFFORTS.items())

_EPILOG = """\
Commands:
  hantc MODEL --target T ...       make MODEL faster; all options are above
  hantc regions MODEL              what can be replaced, and why the rest cannot
  hantc pool [--family F]          the candidate operations
  hantc profile MODEL --lut FILE   measure only, into a table for --lut
  hantc inspect RUN                a finished run's figures and choices
  hantc explain RUN REGION         a region's candidates: cost, score, why not taken
  hantc diff RUN_A RUN_B           what two runs chose differently
  hantc verify RUN                 measure a run's file again, beside its teacher
  hantc targets                    what can be compiled for
  hantc doctor                     what this machine can do
Each of them takes --help, and --json for scripts.

Examples:
  hantc model.onnx --target xeon
      exact rewrites only: no data needed, same outputs
  hantc model.onnx --target xeon --data images/
      half the latency; images in one folder per class
  hantc model.onnx --target xeon --data set.npz --budget 0.3 --time-limit 30m
      a third of the latency, the best accuracy that half an hour gives
  hantc model.onnx --target xeon --data images/ --max-drop 0.5%
      as fast as half a point of accuracy allows

The run folder (--out, default MODEL.hantc/) then holds model.onnx, which runs in plain
onnxruntime, summary.json, and report.html with the reason for every choice.

Exit codes: 0 done; 1 the result misses the budget or the allowed drop; 2 bad option or
input; 3 internal error; 130 interrupted (the same command again reuses finished work).
"""


class RichReporter(Reporter):
    """Progress with time left, on standard error: bars on a terminal, plain lines elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__()
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        """A bar with share done, time spent and time left."""
        total = max(total, 1e-9)
        if not self.console.is_terminal:
            lines = _Lines(self, title, total)
            yield lines
            lines.finish()
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<42}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=total)
            yield _RichBar(progress, task)
            progress.update(task, completed=total)

    def say(self, text: str) -> None:
        """A plain line."""
        self.console.print(text, highlight=False, markup=False)

    def warn(self, text: str) -> None:
        """A warning line, also in the log."""
        super().warn(text)
        self.console.print(f"warning: {text}", style="yellow", highlight=False, markup=False)


class _RichBar:
    def __init__(self, progress: Any, task: Any) -> None:
        self.progress, self.task = progress, task

    def advance(self, n: float = 1) -> None:
        self.progress.advance(self.task, n)


class _Lines:
    """A bar for logs: one line at the end, and one every half minute before."""

    def __init__(self, reporter: Reporter, title: str, total: float) -> None:
        self.reporter, self.title, self.total, self.done = reporter, title, total, 0.0
        self.begun = self.told = time.monotonic()

    def advance(self, n: float = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.told >= _TELL_S and 0 < self.done < self.total:
            self.told = now
            left = (now - self.begun) * (self.total / self.done - 1)
            self.reporter.say(f"{self.title}: {self.done / self.total:.0%}, {fmt_seconds(left)} left")

    def finish(self) -> None:
        self.reporter.say(f"{self.title}: done in {fmt_seconds(time.monotonic() - self.begun)}")


def _parser(prog: str, description: str, usage: str, **kwargs: Any) -> argparse.ArgumentParser:
    from rich_argparse import RawDescriptionRichHelpFormatter

    class Formatter(RawDescriptionRichHelpFormatter):
        """Plain text: brackets are part of the help, not markup."""

        help_markup = text_markup = False
        highlights: ClassVar[list[str]] = []
        group_name_formatter = str.capitalize  # type: ignore[assignment]

    return argparse.ArgumentParser(
        prog=prog, description=description, usage=usage, formatter_class=Formatter, allow_abbrev=False, **kwargs
    )


def compile_parser() -> argparse.ArgumentParser:
    """Options of `hantc MODEL`."""
    p = _parser(
        "hantc",
        "Make a trained vision network fast on the machine it will run on.",
        "hantc MODEL --target TARGET [--data PATH] [--budget 0.5 | --max-drop 0.5%] [--out DIR] [options]",
        epilog=_EPILOG,
    )
    p.add_argument("model", metavar="MODEL", help="the trained network, an .onnx file")
    _machine(p)
    g = p.add_argument_group("data")
    _data(g)
    g.add_argument("--val", metavar="PATH", help="validation images, same forms; default: from --data")
    g = p.add_argument_group("what is wanted")
    g.add_argument("--budget", metavar="0.5|8ms", help="latency: share of the teacher's, or milliseconds; default 0.5")
    g.add_argument("--max-drop", metavar="0.5%", help="instead of --budget: the most accuracy to lose, in points")
    g = p.add_argument_group("how much work")
    g.add_argument("--effort", choices=tuple(EFFORTS), default="standard", help=_EFFORT_HELP)
    g.add_argument("--time-limit", metavar="30m", help="spend at most about this long; default: the effort's")
    g.add_argument("--seed", type=int, default=0, metavar="N", help="random seed; default 0")
    g = p.add_argument_group("files")
    g.add_argument("--out", metavar="DIR", help="run folder; default MODEL.hantc/")
    g.add_argument("--lut", metavar="FILE", help="use this latency table (of hantc profile) instead of measuring")
    _store(g)
    g.add_argument("--resume", action="store_true", help="continue the log of an interrupted run; finished work is always reused")
    g.add_argument("--json", action="store_true", help="print summary.json on standard output, nothing else")
    p.add_argument("--version", action="version", version=f"hantc {__version__}", help="print the version and exit")
    return p


def _machine(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("machine")
    g.add_argument("--target", default="xeon", help="what to compile for (hantc targets lists them); default xeon")
    g.add_argument("--precision", choices=("auto", "fp32", "int8", "fp16"), default="auto", help="precisions to choose from")
    g.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time; default 1")
    g.add_argument("--threads", type=int, metavar="N", help="default: physical cores")


def _data(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--data", metavar="PATH", help="image folder (a folder per class, or flat: no labels), or .npz with x [y x_val y_val]")
    g.add_argument("--preprocess", metavar="FILE|imagenet|tf|none", help="how pixels become input; default MODEL.preprocess.json, else pixels/255")


def _store(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--store", metavar="DIR", help="measurements and weights shared by runs; default $HANTC_STORE or ~/.cache/hantc")


def config_of(args: argparse.Namespace) -> CompileConfig:
    """Validated configuration from parsed options; UsageError names the option."""
    from hantc.inputs import make_config

    options = {k: v for k, v in vars(args).items() if k not in ("model", "json")}
    options["store"] = options.get("store") or os.environ.get("HANTC_STORE")
    return make_config(args.model, **options)


def _console() -> Any:
    """Standard output. Where it is no terminal nothing is folded at 80 columns, for grep's sake."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=_PIPE_WIDTH)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def cmd_compile(argv: Sequence[str]) -> int:
    """`hantc MODEL`."""
    args = compile_parser().parse_args(argv)
    config = config_of(args)
    reporter = RichReporter(quiet=args.json)
    from hantc.run import compile_config

    run = compile_config(config, reporter)
    summary = run.summary
    if args.json:
        sys.stdout.write(summary.to_json())
    else:
        from rich.console import Console

        from hantc.report.terminal import choices_table, summary_table

        console = Console()
        console.print(choices_table(summary))
        console.print(summary_table(summary))
        for note in summary.notes:
            console.print(f"note: {note}", highlight=False, markup=False)
        console.print(f"model  {run.model_path}\nreport {run.report_path}", highlight=False, markup=False)
    if summary.status != "done":
        reporter.say(f"[red]{summary.status.replace('_', ' ')}[/]: see the table; --effort thorough searches longer")
        return MISSED
    return DONE


def cmd_regions(argv: Sequence[str]) -> int:
    """`hantc regions MODEL`."""
    p = _parser("hantc regions", "What can be replaced in a model, and why the rest cannot.")
    p.add_argument("model", metavar="MODEL")
    p.add_argument("--json", action="store_true", help="machine-readable")
    args = p.parse_args(argv)
    from dataclasses import asdict

    from hantc.dialect.importer import import_file
    from hantc.dialect.rewrites.normalize import normalize
    from hantc.passes.match import match_regions
    from hantc.report.regions import regions_table

    found = match_regions(normalize(import_file(args.model))[0])
    if args.json:
        _print_json(asdict(found))
    else:
        from rich.console import Console

        Console().print(regions_table(found))
    return DONE


def _shape(text: str) -> tuple[int, ...]:
    try:
        dims = tuple(int(d) for d in text.lower().split("x"))
    except ValueError:
        dims = ()
    if len(dims) != 3 or min(dims) < 1:
        raise UsageError(f"{text!r} is not a shape", hint="write channels x height x width: 64x56x56")
    return dims


def cmd_pool(argv: Sequence[str]) -> int:
    """`hantc pool`."""
    p = _parser("hantc pool", "The candidate operations; with --in, each one's size for a region of that shape.")
    p.add_argument("--family", help="only this family")
    p.add_argument("--in", dest="in_shape", metavar="CxHxW", help="the region's input, such as 64x56x56")
    p.add_argument("--out", dest="out_shape", metavar="CxHxW", help="its output; default: as the input")
    p.add_argument("--json", action="store_true", help="machine-readable")
    args = p.parse_args(argv)
    from rich.console import Console

    from hantc.ops.catalog import families_data, families_table, pool_data, pool_table
    from hantc.ops.registry import get_family

    if args.family:
        get_family(args.family)
    if args.in_shape is None and args.family is None:
        _print_json(families_data()) if args.json else Console().print(families_table())
        return DONE
    shape = _shape(args.in_shape or "64x28x28")
    out = _shape(args.out_shape) if args.out_shape else shape
    _print_json(pool_data(args.family, shape, out)) if args.json else Console().print(pool_table(args.family, shape, out))
    return DONE


def cmd_profile(argv: Sequence[str]) -> int:
    """`hantc profile MODEL --lut FILE`."""
    p = compile_parser()
    p.prog, p.description = "hantc profile", "Measure the candidates of a model's regions; write the latency table."
    args = p.parse_args(argv)
    if not args.lut:
        raise UsageError("hantc profile needs --lut FILE, the table to write")
    lut = Path(args.lut)
    args.lut = None
    config = config_of(args)
    from hantc.core.atomic import write_json
    from hantc.pipeline import PROFILE, run_passes
    from hantc.run import prepare

    state, ctx = prepare(config, RichReporter(quiet=args.json))
    state, _ = run_passes(PROFILE, state, ctx)
    write_json(lut, state.costs)
    assert state.costs is not None
    line = {"lut": str(lut), "rows": len(state.costs.rows), "teacher_ms": state.costs.teacher_ms}
    _print_json(line) if args.json else print(f"{line['rows']} rows, teacher {line['teacher_ms']:.3f} ms: {lut}")
    return DONE


def _run_view(name: str, argv: Sequence[str]) -> int:
    """`inspect`, `explain`, `diff`: views of finished runs."""
    descriptions = {
        "inspect": "A finished run: figures, choices, notes.",
        "explain": "Every candidate considered for one region: cost, score, why it was not taken.",
        "diff": "What two runs chose differently.",
    }
    operands = {"inspect": ("run",), "explain": ("run", "region"), "diff": ("run_a", "run_b")}[name]
    p = _parser(f"hantc {name}", descriptions[name])
    for operand in operands:
        p.add_argument(operand, metavar=operand.upper())
    p.add_argument("--json", action="store_true", help="machine-readable")
    args = p.parse_args(argv)
    from rich.console import Console

    from hantc.report import facts, terminal

    values = [getattr(args, o) for o in operands]
    data = {"inspect": facts.inspect_run_data, "explain": facts.explain_region_data, "diff": facts.diff_runs_data}
    views = {"inspect": terminal.inspect_run, "explain": terminal.explain_region, "diff": terminal.diff_runs}
    if args.json:
        _print_json(data[name](*values))  # type: ignore[operator]
    else:
        Console().print(views[name](*values))  # type: ignore[operator]
    return DONE


def cmd_verify(argv: Sequence[str]) -> int:
    """`hantc verify RUN`."""
    p = _parser("hantc verify", "Measure a finished run's file again, beside its teacher.")
    p.add_argument("run", metavar="RUN")
    p.add_argument("--json", action="store_true", help="machine-readable")
    args = p.parse_args(argv)
    from hantc.run import verify_run

    found = verify_run(Path(args.run), RichReporter(quiet=args.json))
    if args.json:
        _print_json(found)
    else:
        from rich.console import Console

        from hantc.report.terminal import verification_table

        Console().print(verification_table(found))
    return DONE if found["ok"] else MISSED


def cmd_targets(argv: Sequence[str]) -> int:
    """`hantc targets`."""
    p = _parser("hantc targets", "What can be compiled for.")
    p.add_argument("--json", action="store_true", help="machine-readable")
    args = p.parse_args(argv)
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from hantc.backends.registry import available
    from hantc.backends.targets import TARGETS

    caps = available()
    if args.json:
        _print_json([{**asdict(t), "available": caps[t.backend].available} for t in TARGETS])
        return DONE
    table = Table("target", "backend", "precisions", "batch", "here", "what")
    for t in TARGETS:
        here = "yes" if caps[t.backend].available else f"no: {caps[t.backend].reason}"
        table.add_row(t.name, t.backend, " ".join(t.precisions), str(t.batch), here, t.description)
    Console().print(table)
    return DONE


def cmd_doctor(argv: Sequence[str]) -> int:
    """`hantc doctor`."""
    p = _parser("hantc doctor", "What this machine can do.")
    p.add_argument("--json", action="store_true", help="machine-readable")
    args = p.parse_args(argv)
    from hantc.report.doctor import doctor_data, doctor_table

    data = doctor_data()
    if args.json:
        _print_json(data)
    else:
        from rich.console import Console

        Console().print(doctor_table(data))
    return DONE


_COMMANDS = {
    "regions": cmd_regions,
    "pool": cmd_pool,
    "profile": cmd_profile,
    "inspect": lambda a: _run_view("inspect", a),
    "explain": lambda a: _run_view("explain", a),
    "diff": lambda a: _run_view("diff", a),
    "verify": cmd_verify,
    "targets": cmd_targets,
    "doctor": cmd_doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    command = _COMMANDS.get(args[0]) if args else None
    try:
        if command is not None and not Path(args[0]).is_file():
            return command(args[1:])
        return cmd_compile(args)
    except HantcError as error:
        kind = type(error).__name__.removesuffix("Error").lower()
        sys.stderr.write(f"hantc: {kind} error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("hantc: interrupted; run again with the same options, finished work is reused\n")
        return INTERRUPTED
    except BrokenPipeError:
        return DONE
    except SystemExit as stop:  # argparse
        return stop.code if isinstance(stop.code, int) else USAGE
    except Exception as error:
        import traceback

        traceback.print_exc()
        sys.stderr.write(f"hantc: internal error: {type(error).__name__}: {error}\n  hint: this is a bug; log.jsonl in the run folder says how far it came\n")
        return INTERNAL


if __name__ == "__main__":
    sys.exit(main())
