"""The commands beside compiling: each a parser, a call and a view."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

from hantc.core.config import EFFORTS, CompileConfig, parse_size
from hantc.core.errors import UsageError

DONE, MISSED = 0, 1
_PIPE_WIDTH = 160
_NAMED = "timm:"
REGION_HELP = "replace just this part as a whole: from behind node FROM to TO, as hantc regions --json names them"
MODEL_HELP = "the trained network: an .onnx file, or timm:NAME, timm:NAME@FILE.safetensors, timm:NAME@random"
_RUN = "a run folder, as --out named it"


class _Parser(argparse.ArgumentParser):
    """Tells which option a misspelt one may have been meant for."""

    def error(self, message: str) -> NoReturn:
        """As argparse, with a hint."""
        for word in message.removeprefix("unrecognized arguments: ").split() if "unrecognized" in message else ():
            known = [name for name in self._option_string_actions if name.startswith("--")]
            near = difflib.get_close_matches(word.split("=")[0], known, n=1) if word.startswith("-") else []
            if near:
                message += f"\n  hint: did you mean {near[0]}?"
        super().error(message)


def make_parser(prog: str, description: str, **kwargs: Any) -> argparse.ArgumentParser:
    """A parser with plain help, and with --json, which every command takes."""
    from rich_argparse import RawDescriptionRichHelpFormatter

    class Formatter(RawDescriptionRichHelpFormatter):
        """Plain text: brackets are part of the help, not markup."""

        help_markup = text_markup = False
        highlights: ClassVar[list[str]] = []
        group_name_formatter = str.capitalize

    p = _Parser(prog=prog, description=description, formatter_class=Formatter, allow_abbrev=False, **kwargs)
    p.add_argument("--json", action="store_true", help="machine-readable output, and nothing else on standard output")
    return p


def shape_option(p: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--input-shape",
        action="append",
        metavar="[NAME=]CxHxW",
        help="sizes that the file leaves open, without the batch: 3x224x224",
    )


def machine_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("machine")
    g.add_argument(
        "--target",
        default="xeon",
        help="what to compile for: a name that hantc targets lists, or a .toml file; default xeon",
    )
    g.add_argument("--backend", metavar="B", help="inference engine; default the target's (hantc doctor lists them)")
    g.add_argument(
        "--precision",
        choices=("auto", "fp32", "int8", "fp16", "bf16"),
        default="auto",
        help="precisions to choose from",
    )
    g.add_argument("--batch", type=int, metavar="N", help="images at a time; default the target's, mostly 1")
    g.add_argument("--threads", type=int, metavar="N", help="default: physical cores")
    g.add_argument("--pin", action="store_true", help="keep to as many cores while something is timed (Linux)")
    shape_option(g)


def store_option(g: argparse._ArgumentGroup) -> None:
    g.add_argument(
        "--store", metavar="DIR", help="measurements and weights shared by runs; default $HANTC_STORE or ~/.cache/hantc"
    )


def named_out(text: str) -> str | None:
    """The run folder of one of timm's models if no other is given; None for files."""
    return f"{text.removeprefix(_NAMED).partition('@')[0].replace('/', '_')}.hantc" if text.startswith(_NAMED) else None


def model_file(text: str, folder: Path, *, quiet: bool) -> str:
    """The MODEL argument as a file: one of timm's is exported into `folder` first."""
    if not text.startswith(_NAMED):
        return text
    from hantc.inputs import check_folder
    from hantc.integrations.zoo import export_named
    from hantc.report.live import RichReporter

    check_folder(folder, f"--out {folder}")
    with RichReporter(quiet=quiet).bar(f"exporting {text}", 1) as bar:
        path = export_named(text, folder)
        bar.advance()
    return str(path)


def config_of(args: argparse.Namespace) -> CompileConfig:
    """Validated configuration from parsed options; UsageError names the option."""
    from hantc.inputs import make_config

    options = {k: v for k, v in vars(args).items() if k not in ("model", "json")}
    options["store"] = options.get("store") or os.environ.get("HANTC_STORE")
    return make_config(args.model, **options)


def make_console() -> Any:
    """Standard output. Where it is no terminal nothing is folded at 80 columns, for grep's sake."""
    from rich.console import Console

    plain = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(emoji=False) if plain else Console(emoji=False, width=_PIPE_WIDTH)  # "data.npz:x:" is none


def print_json(value: Any) -> int:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
    return DONE


def show(args: argparse.Namespace, data: Callable[[], Any], view: Callable[[], Any]) -> int:
    """The data on --json, else the view."""
    if args.json:
        return print_json(data())
    make_console().print(view())
    return DONE


def cmd_regions(argv: Sequence[str]) -> int:
    """`hantc regions MODEL`."""
    p = make_parser("hantc regions", "What can be replaced in a model, and why the rest cannot.")
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("--region", action="append", default=[], metavar="FROM:TO", help=REGION_HELP)
    shape_option(p)
    p.add_argument("--why", action="store_true", help="also what nearly was a region, or nearly fitted a pattern")
    args = p.parse_args(argv)
    from tempfile import TemporaryDirectory

    from hantc.core.config import parse_shapes
    from hantc.dialect.dequantize import dequantized
    from hantc.dialect.importer import import_model, load_onnx, model_info, only_tensors
    from hantc.dialect.input_shape import fix_inputs
    from hantc.dialect.pattern import installed
    from hantc.dialect.rewrites.normalize import normalize
    from hantc.passes.load import check_runs, survives
    from hantc.passes.match import match_regions
    from hantc.report.regions import regions_json, regions_table

    with TemporaryDirectory() as place:
        file = model_file(args.model, Path(place), quiet=args.json)
        model = load_onnx(file)
        only_tensors(model_info(model))
        survives(model, file)
        model = fix_inputs(model, parse_shapes(args.input_shape or ()))
        network = import_model(dequantized(model).model, where=file)
    check_runs(network, file)
    found = match_regions(normalize(network)[0], named=args.region, patterns=installed())
    return show(args, lambda: regions_json(found), lambda: regions_table(found, why=args.why))


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
    p = make_parser("hantc pool", "The candidate operations; with --in, each one's size for a region of that shape.")
    p.add_argument("--family", help="only this family")
    p.add_argument("--in", dest="in_shape", metavar="CxHxW", help="the region's input, such as 64x56x56")
    p.add_argument("--out", dest="out_shape", metavar="CxHxW", help="its output; default: as the input")
    args = p.parse_args(argv)
    from hantc.ops.catalog import families_data, families_table, pool_data, pool_table
    from hantc.ops.registry import get_family

    if args.family:
        get_family(args.family)
    if args.in_shape is None and args.family is None:
        return show(args, families_data, families_table)
    shape = _shape(args.in_shape or "64x28x28")
    out = _shape(args.out_shape) if args.out_shape else shape
    return show(args, lambda: pool_data(args.family, shape, out), lambda: pool_table(args.family, shape, out))


def cmd_profile(argv: Sequence[str]) -> int:
    """`hantc profile MODEL --lut FILE`."""
    p = make_parser(
        "hantc profile", "Measure the candidates of a model's regions and write the latency table for --lut."
    )
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("--lut", metavar="FILE", required=True, help="the table to write")
    machine_options(p)
    g = p.add_argument_group("how much work")
    g.add_argument("--effort", choices=tuple(EFFORTS), default="standard", help="how many candidates; default standard")
    g.add_argument("--pool", choices=("sample", "whole"), default="sample", help="whole: all of a region's candidates")
    store_option(g)
    args = p.parse_args(argv)
    from tempfile import TemporaryDirectory

    from hantc.core.lut import write_lut
    from hantc.inputs import check_folder
    from hantc.report.live import RichReporter
    from hantc.run import profile_config

    lut = Path(args.lut)
    if lut.is_dir():
        raise UsageError("is a folder, not a file", where=f"--lut {lut}")
    check_folder(lut.absolute().parent, f"--lut {lut}")
    with TemporaryDirectory() as place:  # a run's log and graph dumps, which nobody asked for
        args.lut, args.out = None, place
        args.model = model_file(args.model, Path(place) / "named", quiet=args.json)
        costs, device, notes = profile_config(config_of(args), RichReporter(quiet=args.json))
    write_lut(lut, costs, device)
    if args.json:
        facts = {"lut": str(lut), "rows": len(costs.rows), "teacher_ms": costs.teacher_ms}
        return print_json({**facts, "predicted": sum(r.predicted for r in costs.rows), "notes": notes})
    how = " (predicted, not measured)" if any(r.predicted for r in costs.rows) else ""
    sys.stdout.write(f"{len(costs.rows)} rows, teacher {costs.teacher_ms:.3f} ms{how}: {lut}\n")
    sys.stdout.writelines(f"note: {text}\n" for text in notes)
    return DONE


def cmd_lut(argv: Sequence[str]) -> int:
    """`hantc lut show|merge|diff FILE ...`."""
    p = make_parser("hantc lut", "Latency tables: what is in one, several joined into one, two compared.")
    p.add_argument("action", choices=("show", "merge", "diff"), help="show FILE; merge FILE ... --out FILE; diff A B")
    p.add_argument("files", nargs="+", metavar="FILE", help="tables of hantc profile, or the lut.json of a run")
    p.add_argument("--out", metavar="FILE", help="where merge writes")
    args = p.parse_args(argv)
    from hantc.core.lut import compare, merge, read_lut, write_lut
    from hantc.report.luts import diff_data, diff_table, lut_data, lut_table

    wanted = {"show": (1, 1), "diff": (2, 2), "merge": (2, None)}[args.action]
    if len(args.files) < wanted[0] or (wanted[1] and len(args.files) > wanted[1]):
        count = f"{wanted[0]} or more" if wanted[1] is None else wanted[0]
        raise UsageError(f"takes {count} files, was given {len(args.files)}", where=f"hantc lut {args.action}")
    if (args.out is not None) != (args.action == "merge"):
        raise UsageError("--out names the table that merge writes, and no other action has one", where="--out")
    luts = [read_lut(Path(f)) for f in args.files]
    if args.action == "diff":
        found = compare(*luts)
        return show(args, lambda: diff_data(found), lambda: diff_table(found))
    if args.action == "merge":
        write_lut(Path(args.out), merge(luts), luts[0].device)
        luts = [read_lut(Path(args.out))]
    return show(args, lambda: lut_data(luts[0]), lambda: lut_table(luts[0]))


def _run_view(name: str, description: str, operands: Mapping[str, str], argv: Sequence[str]) -> int:
    """`inspect`, `explain`, `diff`: views of finished runs."""
    p = make_parser(f"hantc {name}", description)
    for operand, text in operands.items():
        p.add_argument(operand, metavar=operand.upper(), help=text)
    args = p.parse_args(argv)
    from hantc.report import facts, terminal

    values = [getattr(args, o) for o in operands]
    data = {"inspect": facts.inspect_run_data, "explain": facts.explain_region_data, "diff": facts.diff_runs_data}
    views = {"inspect": terminal.inspect_run, "explain": terminal.explain_region, "diff": terminal.diff_runs}
    return show(args, lambda: data[name](*values), lambda: views[name](*values))  # type: ignore[operator]


def cmd_inspect(argv: Sequence[str]) -> int:
    """`hantc inspect RUN`."""
    return _run_view("inspect", "A finished run: figures, choices, notes.", {"run": _RUN}, argv)


def cmd_explain(argv: Sequence[str]) -> int:
    """`hantc explain RUN REGION`."""
    text = "Every candidate considered for one region: cost, score, why it was not taken."
    return _run_view("explain", text, {"run": _RUN, "region": "its name, as hantc inspect RUN lists them"}, argv)


def cmd_diff(argv: Sequence[str]) -> int:
    """`hantc diff RUN_A RUN_B`."""
    return _run_view("diff", "What two runs chose differently.", {"run_a": _RUN, "run_b": "another"}, argv)


def cmd_verify(argv: Sequence[str]) -> int:
    """`hantc verify RUN`."""
    p = make_parser(
        "hantc verify", "Measure a finished run's file again, beside its teacher; exit code 1 if it differs."
    )
    p.add_argument("run", metavar="RUN", help=_RUN)
    p.add_argument("--cold", action="store_true", help="also with cold caches, as behind other work")
    args = p.parse_args(argv)
    from hantc.report.live import RichReporter
    from hantc.report.terminal import verification_table
    from hantc.run import verify_run

    found = verify_run(Path(args.run), RichReporter(quiet=args.json), cold=args.cold)
    show(args, lambda: found, lambda: verification_table(found))
    return DONE if found["ok"] else MISSED


def cmd_store(argv: Sequence[str]) -> int:
    """`hantc store ls|gc`."""
    p = make_parser("hantc store", "What runs keep for each other: measurements, trained weights, scores.")
    p.add_argument("action", choices=("ls", "gc"), help="ls: list it by kind; gc: remove what was unused longest")
    store_option(p.add_argument_group("where"))
    g = p.add_argument_group("what gc removes")
    g.add_argument("--max-size", metavar="SIZE", help="the longest unused, until the rest fits: 500M, 2G")
    g.add_argument("--unused-for", metavar="AGE", help="what nothing used for so long: 30d, 12h")
    g.add_argument("--dry-run", action="store_true", help="only tell what would go")
    args = p.parse_args(argv)
    from hantc.core.store import Store
    from hantc.inputs import default_store
    from hantc.report.stores import parse_age, store_data, store_table

    store = Store(Path(args.store or os.environ.get("HANTC_STORE") or default_store()))
    size = parse_size(args.max_size, "--max-size") if args.max_size else None
    age = parse_age(args.unused_for) if args.unused_for else None
    if args.action == "ls":
        data = store_data(store)
        return show(args, lambda: data, lambda: store_table(data, str(store.root)))
    if size is None and age is None:
        hint = "--max-size 2G or --unused-for 30d"
        raise UsageError("gc needs to know what to keep", where="hantc store gc", hint=hint)
    removed = store_data(store, store.gc(max_bytes=size, max_age_s=age, dry_run=args.dry_run))
    return show(args, lambda: removed, lambda: store_table(removed, "would go" if args.dry_run else "removed"))


def cmd_targets(argv: Sequence[str]) -> int:
    """`hantc targets`."""
    args = make_parser("hantc targets", "What can be compiled for.").parse_args(argv)
    from hantc.report.doctor import targets_data, targets_table

    return show(args, targets_data, targets_table)


def cmd_doctor(argv: Sequence[str]) -> int:
    """`hantc doctor`."""
    p = make_parser(
        "hantc doctor",
        "What this machine can do. --calibrate measures its ceilings (multiplications and bytes a second), which the "
        "roofline model predicts latencies by.",
        epilog="  hantc doctor --calibrate --out here.toml    # ... then, on any machine:\n"
        "  hantc model.onnx --target here.toml",
    )
    p.add_argument("--calibrate", action="store_true", help="measure the ceilings: some seconds, best left undisturbed")
    p.add_argument("--backend", default="onnxruntime", metavar="B", help="engine to measure with; default onnxruntime")
    p.add_argument("--out", metavar="FILE.toml", help="write the ceilings there, as a target")
    args = p.parse_args(argv)
    from hantc.report.doctor import calibrated, ceilings_table, doctor_data, doctor_table

    if not args.calibrate:
        if args.out:
            raise UsageError("is for --calibrate", where="--out", hint="hantc doctor --calibrate --out here.toml")
        return show(args, doctor_data, lambda: doctor_table(doctor_data()))
    data = calibrated(args.backend, Path(args.out) if args.out else None)
    return show(args, lambda: data, lambda: ceilings_table(data))


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = MappingProxyType(
    {
        "regions": cmd_regions,
        "pool": cmd_pool,
        "profile": cmd_profile,
        "lut": cmd_lut,
        "inspect": cmd_inspect,
        "explain": cmd_explain,
        "diff": cmd_diff,
        "verify": cmd_verify,
        "store": cmd_store,
        "targets": cmd_targets,
        "doctor": cmd_doctor,
    }
)
