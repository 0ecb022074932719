"""The command line. With `hantc.commands` the only place that reads the environment, prints, or decides exit codes."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hantc import __version__
from hantc.commands import (
    COMMANDS,
    DONE,
    MISSED,
    MODEL_HELP,
    REGION_HELP,
    config_of,
    machine_options,
    make_console,
    make_parser,
    model_file,
    named_out,
    store_option,
)
from hantc.core.config import EFFORTS
from hantc.core.errors import HantcError, UsageError

__all__ = ["COMMANDS", "DONE", "INTERNAL", "INTERRUPTED", "MISSED", "USAGE", "compile_parser", "config_of", "main"]

USAGE, INTERNAL, INTERRUPTED = 2, 3, 130
_INSIST_S = 1.0
_EFFORT_HELP = "time limit: " + ", ".join(f"{n} {e.time_limit_s / 60:g} min" for n, e in EFFORTS.items())
_POOL_HELP = "candidates from scratch: a sample of each family, or all (measuring them takes minutes, training longer)"
_DEVICE_HELP = "where candidates and students learn; auto: on an NVIDIA GPU if there is one and torch is built for it"
_TRAIN_HELP = "what training multiplies in; auto: bf16 on GPUs that have it, and on CPUs with AVX512-BF16 but no AMX"
_RECIPE_HELP = "how candidates are trained; paper: as published (SGD, an epoch each; far slower, no limit)"

_EPILOG = """\
Commands:
  hantc MODEL --target T ...       make MODEL faster; all options are above
  hantc regions MODEL              what can be replaced, and why the rest cannot
  hantc pool [--family F]          the candidate operations
  hantc profile MODEL --lut FILE   measure only, into a table for --lut
  hantc lut show|merge|diff FILE   latency tables: what is in them, joined, compared
  hantc inspect RUN                a finished run's figures and choices
  hantc explain RUN REGION         one region's candidates, and why not taken
  hantc diff RUN_A RUN_B           what two runs chose differently
  hantc verify RUN                 measure a run's file again
  hantc store ls|gc                what is kept between runs, and clearing it
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

The run folder (--out, default MODEL.hantc/) then holds model.onnx, which runs
in plain onnxruntime, summary.json, and report.html, which explains each choice.

Exit codes: 0 done; 1 the result misses the budget or the allowed drop, or no
engine could be built; 2 bad option or input; 3 internal error; 130 interrupted (the same command again
reuses finished work).
"""


def compile_parser() -> argparse.ArgumentParser:
    """Options of `hantc MODEL`."""
    p = make_parser(
        "hantc",
        "Make a trained vision network fast on the machine it will run on.",
        usage="hantc MODEL [--target T] [--data PATH] [--budget B | --max-drop D] ...",
        epilog=_EPILOG,
    )
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    machine_options(p)
    g = p.add_argument_group("data")
    _data(g)
    g.add_argument("--val", metavar="PATH", help="validation images, same forms; default: from --data")
    g.add_argument("--unlabelled", metavar="PATH", help="further images to train on, same forms; labels are not used")
    g = p.add_argument_group("what is wanted")
    g.add_argument("--budget", metavar="0.5|8ms", help="latency: share of the teacher's, or milliseconds; default 0.5")
    for what, text in (("params", "weights"), ("macs", "multiply-accumulates"), ("memory", "bytes of activations")):
        metavar = "0.5|5M" if what != "memory" else "0.5|2MiB"
        g.add_argument(f"--budget-{what}", metavar=metavar, help=f"also: {text}; share of the teacher's, or so many")
    g.add_argument("--max-drop", metavar="0.5%", help="instead of --budget: the most accuracy to lose, in points")
    g = p.add_argument_group("how much work")
    g.add_argument("--effort", choices=tuple(EFFORTS), default="standard", help=_EFFORT_HELP)
    g.add_argument("--time-limit", metavar="30m", help="spend at most about this long; default: the effort's")
    g.add_argument("--pool", choices=("sample", "whole"), default="sample", help=_POOL_HELP)
    g.add_argument("--region", action="append", metavar="FROM:TO", help=REGION_HELP)
    g.add_argument("--recipe", choices=("hantc", "paper"), default="hantc", help=_RECIPE_HELP)
    g.add_argument("--train-device", choices=("auto", "cpu", "cuda"), default="auto", help=_DEVICE_HELP)
    g.add_argument("--train-precision", choices=("auto", "fp32", "bf16"), default="auto", help=_TRAIN_HELP)
    g.add_argument("--memory", metavar="8G", help="RAM to stay below while training; default half of the machine's")
    g.add_argument("--seed", type=int, default=0, metavar="N", help="random seed; default 0")
    g = p.add_argument_group("files")
    g.add_argument("--out", metavar="DIR", help="run folder; default MODEL.hantc/")
    g.add_argument(
        "--optimized",
        action="store_true",
        help="also write model.optimized.onnx, as ONNX Runtime rewrites it for this very CPU: it loads sooner",
    )
    g.add_argument("--lut", metavar="FILE", help="use this latency table (of hantc profile) instead of measuring")
    g.add_argument(
        "--foreign-lut",
        action="store_true",
        help="the --lut is of another machine, which is compiled for: its latencies count, nothing is timed here",
    )
    store_option(g)
    g.add_argument("--store-limit", metavar="10G", help="the store's size after the run, at most; default 10G")
    g.add_argument(
        "--resume", action="store_true", help="continue the log of an interrupted run; finished work is always reused"
    )
    p.add_argument("--version", action="version", version=f"hantc {__version__}", help="print the version and exit")
    return p


def _data(g: argparse._ArgumentGroup) -> None:
    g.add_argument(
        "--data",
        metavar="PATH",
        help="image folder (a folder per class, or flat: no labels), or .npz with x [y x_val y_val]",
    )
    g.add_argument(
        "--preprocess",
        metavar="FILE|imagenet|tf|none",
        help="how pixels become input; default MODEL.preprocess.json, else pixels/255",
    )


def cmd_compile(argv: Sequence[str]) -> int:
    """`hantc MODEL`."""
    args = compile_parser().parse_args(argv)
    args.out = args.out or named_out(args.model)
    args.model = model_file(args.model, Path(args.out or "."), quiet=args.json)
    config = config_of(args)
    from hantc.report.live import RichReporter
    from hantc.run import compile_config

    reporter = RichReporter(quiet=args.json)
    run = compile_config(config, reporter)
    summary = run.summary
    if args.json:
        sys.stdout.write(summary.to_json())
    else:
        from hantc.report.terminal import choices_table, summary_table

        console = make_console()
        console.print(choices_table(summary))
        console.print(summary_table(summary))
        for note in summary.notes:
            console.print(f"note: {note}", highlight=False, markup=False)
        engine = f"\nengine {run.folder / summary.engine['file']}" if summary.engine and summary.engine["file"] else ""
        paths = f"model  {run.model_path}{engine}\nreport {run.report_path}"
        console.print(paths, highlight=False, markup=False, soft_wrap=True)
    if summary.status == "done":
        return DONE
    missed = {
        "budget_missed": "the budget was missed",
        "drop_exceeded": "the allowed drop was exceeded",
        "engine_missing": "no engine could be built",
    }
    advice = "--effort thorough searches longer" if summary.data else "--data lets regions be replaced"
    if summary.status == "engine_missing":
        advice = "a note says why"
    sys.stderr.write(f"hantc: {missed.get(summary.status, summary.status)}: see the table; {advice}\n")
    return MISSED


def _dispatch(args: Sequence[str]) -> int:
    if not args:
        compile_parser().print_help(sys.stderr)
        return USAGE
    command = COMMANDS.get(args[0])
    if command is not None and not Path(args[0]).is_file():
        return command(args[1:])
    near = difflib.get_close_matches(args[0], COMMANDS, n=1)
    if near and not Path(args[0]).exists():
        raise UsageError(f"there is no command {args[0]!r}, and no such model file", hint=f"did you mean {near[0]}?")
    return cmd_compile(args)


@contextmanager
def _insistent() -> Iterator[None]:
    """Ctrl-C is raised again each second until it gets out: libraries with a bare `except:` (onnx-graphsurgeon's
    importer has one) swallow the first. On the main thread of systems with timers; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, _INSIST_S)
        raise KeyboardInterrupt

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    try:
        with _insistent():
            return _dispatch(sys.argv[1:] if argv is None else argv)
    except HantcError as error:
        kind = type(error).__name__.removesuffix("Error").lower()
        sys.stderr.write(f"hantc: {kind} error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("hantc: interrupted; run again with the same options, finished work is reused\n")
        return INTERRUPTED
    except BrokenPipeError:
        # the reader has gone (head, less): keep Python from complaining when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except SystemExit as stop:  # argparse
        return stop.code if isinstance(stop.code, int) else USAGE
    except Exception as error:
        import traceback

        traceback.print_exc()
        sys.stderr.write(
            f"hantc: internal error: {type(error).__name__}: {error}\n"
            "  hint: this is a bug; log.jsonl in the run folder says how far it came\n"
        )
        return INTERNAL


if __name__ == "__main__":
    sys.exit(main())
