"""What a run needs before it begins: options, model, data, device; every one checked, then one state and context."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from pydantic import ValidationError

from hantc.backends.device import channel_block, needs_reduced_range, physical_cores, pick_cores
from hantc.backends.learning import learning_device, multiplies_bf16
from hantc.backends.registry import available, get_backend
from hantc.backends.targets import Target, get_target
from hantc.core.backend_api import Backend, Capabilities, Optimizer
from hantc.core.config import EFFORTS, Budget, Cap, CompileConfig, parse_drop, parse_duration, parse_shapes, parse_size
from hantc.core.errors import UsageError
from hantc.core.lut import read_lut
from hantc.core.pinning import can_pin
from hantc.core.progress import Reporter
from hantc.core.store import Store
from hantc.core.types import ModelInfo, digest
from hantc.data.dataset import Dataset, Split, load_dataset
from hantc.data.preprocess import Preprocess, load_preprocess
from hantc.dialect.dequantize import dequantized, is_quantized
from hantc.dialect.examples import example_inputs
from hantc.dialect.floats import unmarked
from hantc.dialect.importer import load_onnx, model_info, only_tensors
from hantc.dialect.input_shape import fix_inputs
from hantc.dialect.unfuse import unfused
from hantc.dialect.widen import is_half, widened
from hantc.passes.place import CPU
from hantc.passes.state import Clock, Context, State

_CAPS = ("budget_params", "budget_macs", "budget_memory")


def default_store() -> Path:
    """Where measurements and trained weights are kept between runs, if nothing else is said."""
    return Path.home() / ".cache" / "hantc"


def make_config(model: str | os.PathLike[str], **options: Any) -> CompileConfig:
    """Options by the command line's names (underscores for dashes), as text or as values, checked.

    None means not given. UsageError names the option that is wrong, unknown or excluded by another.
    """
    path = Path(model)
    given = {k: v for k, v in options.items() if v is not None}
    shape = given.get("input_shape")
    if isinstance(shape, (tuple, list)) and shape and all(isinstance(d, int) for d in shape):
        given["input_shape"] = {"": tuple(shape)}
    elif isinstance(shape, (str, tuple, list)):
        given["input_shape"] = parse_shapes(shape)
    if "budget" in given and "max_drop" in given:
        raise UsageError("--budget and --max-drop exclude each other", hint="give one of them")
    parse: dict[str, Callable[[str], object]] = {
        "budget": Budget.parse,
        **{k: partial(Cap.parse, option="--" + k.replace("_", "-")) for k in _CAPS},
        "max_drop": parse_drop,
        "time_limit": parse_duration,
        "store_limit": lambda text: parse_size(text, "--store-limit"),
        "memory": lambda text: parse_size(text, "--memory"),
    }
    given |= {k: f(str(given[k])) for k, f in parse.items() if k in given}
    if str(given.get("target", "")).endswith(".toml"):  # a run is verified from anywhere
        given["target"] = str(Path(given["target"]).expanduser().absolute())
    given |= {k: os.fspath(given[k]) for k in ("data", "val", "unlabelled", "preprocess") if k in given}
    given = {"out": path.with_suffix(".hantc"), "store": default_store(), **given}
    try:
        return CompileConfig(model=path, **given)
    except ValidationError as error:
        first = error.errors()[0]
        where = "--" + "-".join(map(str, first["loc"])).replace("_", "-")
        message = "no such option" if first["type"] == "extra_forbidden" else first["msg"]
        raise UsageError(message, where=where, hint="hantc --help lists the options") from error


def prepare(
    config: CompileConfig,
    reporter: Reporter,
    model: ModelProto | None = None,
    *,
    measure_only: bool = False,
    target: Target | None = None,
) -> tuple[State, Context]:
    """Check every option and input before any work is done; UsageError names the one that is wrong.

    `target`: what `config.target` was when a run began; else it is looked up. `measure_only`: latencies need no
    images, so random input stands in for missing data. The run folder is made last of all: a run that cannot begin
    leaves nothing behind.
    """
    target = target or get_target(config.target)
    if config.backend is not None:
        target = target.on(config.backend)
    if "batch" not in config.model_fields_set:
        config = config.model_copy(update={"batch": target.batch})
    check_folder(config.out, f"--out {config.out}")
    loaded = model if model is not None else load_onnx(config.model)
    model = unfused(loaded)
    notes = [] if model is loaded else ["ONNX Runtime had optimised the file: its fused operators were taken apart"]
    only_tensors(model_info(model))
    model = unmarked(fix_inputs(model, config.input_shape))
    info = model_info(model)
    _check_model(info, config)
    backend, capabilities = _engine(config, target)
    threads = config.threads or target.threads or capabilities.device.cores
    # training takes this machine's cores, whatever the target has; fewer where whoever embeds hantc set fewer
    torch.set_num_threads(min(physical_cores(), torch.get_num_threads()))
    if config.foreign_lut:
        capabilities, there = _elsewhere(config, capabilities)
        threads = config.threads or target.threads or there
    cores = _cores(threads) if (config.pin or target.pin) and capabilities.measures else ()
    torch.manual_seed(config.seed)
    effort = EFFORTS[config.effort]
    if config.time_limit is not None:
        effort = replace(effort, time_limit_s=config.time_limit)
    data = _load_data(config, model, info, reporter)
    if data is None and measure_only:
        data = _stand_in(info)
    if data is None and config.budget_memory is not None and not measure_only:
        raise UsageError(
            "needs --data: exact rewrites alone do not take less memory", where="--budget-memory", hint="give images"
        )
    precisions = _precisions(config, target, capabilities, exact=data is None)
    device, (mixed, mixed_on_cpu), learning = _learning(config, trains=data is not None and not measure_only)
    store = Store(config.store)
    _begin(config, reporter)
    given, model, more = _in_floats(model, data is not None, reporter)
    if given is not None:  # the file itself, and not what was made of it
        given = unmarked(fix_inputs(loaded, config.input_shape))
    ctx = Context(
        config=config,
        effort=effort,
        backend=backend,
        capabilities=capabilities,
        precisions=precisions,
        store=store,
        reporter=reporter,
        clock=Clock(effort.time_limit_s),
        threads=threads,
        out=config.out,
        data=data,
        device=device,
        mixed=mixed,
        mixed_on_cpu=mixed_on_cpu,
        cores=cores,
        rivals=_rivals(backend, capabilities),
        target=target.model_dump(mode="json"),
    )
    if config.pin and not cores:
        notes.append("--pin: nothing is timed here, so that no thread was pinned")
    for note in (*capabilities.notes, *learning, *(data.notes if data else ()), *notes, *more, *_admitted(ctx)):
        ctx.note(note)
    return State(model=model, model_hash=_hash(model), given=given, given_hash=_hash(given) if given else ""), ctx


def _learning(config: CompileConfig, *, trains: bool) -> tuple[torch.device, tuple[bool, bool], list[str]]:
    """(where candidates and students learn, whether their products are in BF16 there and on the CPU, notes)."""
    device, notes = learning_device(config.train_device if trains else "cpu")
    fast = multiplies_bf16(device)
    if config.train_precision == "bf16" and not fast:
        slow = "this CPU has no AVX512-BF16, or AMX beside it, where it was not tried"
        why = slow if device == CPU else "this GPU does not multiply BF16 numbers by itself"
        notes = [*notes, f"--train-precision bf16: {why}"]
    wanted = {"bf16": (True, True), "fp32": (False, False), "auto": (fast, multiplies_bf16(CPU))}
    return device, wanted[config.train_precision], notes


def _engine(config: CompileConfig, target: Target) -> tuple[Backend, Capabilities]:
    """The target's backend and what it can do here. UsageError where that is not what the options ask for."""
    backend = target.make_backend()
    capabilities = backend.capabilities()
    if not capabilities.available:
        where = "--target" if config.backend is None else "--backend"
        raise UsageError(
            f"target {target.name} cannot be used with {backend.name} here: {capabilities.reason}", where=where
        )
    if config.optimized and (config.foreign_lut or not isinstance(backend, Optimizer)):
        why = "the table is of another machine" if config.foreign_lut else f"{backend.name} writes no such file"
        raise UsageError(f"cannot be had: {why}", where="--optimized", hint="leave it out")
    return backend, capabilities


def _admitted(ctx: Context) -> list[str]:
    """Notes on what the options leave to choose from."""
    if ctx.data is None:
        rounds = "; the student computes in BF16, which rounds what the teacher computes in FP32"
        return [
            "no --data: only exact rewrites were admitted; with images (labels optional) regions are replaced and "
            "quantised" + rounds * ("bf16" in ctx.precisions)
        ]
    if ctx.config.precision == "int8":
        return ["--precision int8 admits INT8 everywhere; regions that are better or faster in FP32 stay in FP32"]
    return []


def _in_floats(model: ModelProto, trains: bool, reporter: Reporter) -> tuple[ModelProto | None, ModelProto, list[str]]:
    """(the file as given where it is quantised already or in FP16, the teacher, notes). Regions can be replaced and
    trained in FP32 only; without images there is nothing to gain by that."""
    if trains and is_half(model) and not is_quantized(model):
        note = "the model is in FP16: the teacher is the same in FP32, and the file as given a baseline"
        return model, widened(model), [note]
    if not is_quantized(model):
        return None, model, []
    if not trains:
        return None, model, ["the model is quantised already: with --data its dequantised form is compiled"]
    made = dequantized(model)
    if made.reason:
        return None, model, [f"the model is quantised already, and stays as it is: {made.reason}"]
    reporter.event("dequantized", ranges=dict(made.ranges))
    note = "the model is quantised already: the teacher is its dequantised form, and the file as given a baseline"
    return model, made.model, [note]


def _elsewhere(config: CompileConfig, here: Capabilities) -> tuple[Capabilities, int]:
    """What this machine can do in the name of the one whose latency table is given: all but measure; and the threads
    that the table is for. UsageError without a table."""
    if config.lut is None:
        raise UsageError("--foreign-lut needs --lut", where="--foreign-lut", hint="name the other machine's table")
    lut = read_lut(config.lut)
    note = f"latencies are those of {config.lut}, measured on {lut.device.cpu}; nothing was timed here"
    # INT8 weights keep to 7 bits if either machine needs it: accuracy is checked here, and must hold there
    narrow = here.reduce_range or (here.measures and needs_reduced_range(lut.device))
    made = replace(here, device=lut.device, measures=False, notes=(*here.notes, note), reduce_range=narrow)
    if here.channel_block:
        made = replace(made, channel_block=channel_block(lut.device))
    return made, lut.table.rows[0].threads


def _cores(threads: int) -> tuple[int, ...]:
    """What threads keep to while something is timed. UsageError where the system cannot see to that."""
    if not can_pin():
        raise UsageError("this system does not tie threads to cores", where="--pin", hint="leave --pin away")
    return pick_cores(threads)


def _rivals(backend: Backend, capabilities: Capabilities) -> tuple[Backend, ...]:
    """The other engines that can be timed here, if this one is: what the same machine can do without it."""
    if not capabilities.measures:
        return ()
    others = {n: c for n, c in available().items() if n != backend.name and c.available and c.measures}
    here = capabilities.device
    return tuple(get_backend(n) for n, c in others.items() if (c.device.cpu, c.device.cores) == (here.cpu, here.cores))


def _hash(model: ModelProto) -> str:
    return digest(model.SerializeToString().hex())


def check_folder(folder: Path, where: str) -> None:
    """UsageError unless `folder` is one that can be written to, or could be made."""
    place = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    hint = "choose another folder"
    if not place.is_dir():
        same = place == folder.absolute()
        raise UsageError(
            "is a file, not a folder" if same else f"{place} is a file, not a folder", where=where, hint=hint
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError("cannot be written to", where=where, hint=hint)


def _begin(config: CompileConfig, reporter: Reporter) -> None:
    """Make the run folder and begin its log. os.access tells root that all is fine, so only trying shows."""
    log = config.out / "log.jsonl"
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        with log.open("a" if config.resume else "w"):
            reporter.log_path = log
    except OSError as error:
        hint = "choose another folder with --out"
        raise UsageError(f"cannot be written to: {error.strerror}", where=f"--out {config.out}", hint=hint) from error


def _check_model(info: ModelInfo, config: CompileConfig) -> None:
    where = str(config.model)
    if config.data is not None and len(info.inputs) != 1:
        names = ", ".join(i.name for i in info.inputs)
        raise UsageError(
            f"the model has {len(info.inputs)} inputs ({names}); --data can feed only one",
            where=where,
            hint="without --data hantc still applies exact rewrites; or export the part behind the image input",
        )
    fixed = next((i.shape[0] for i in info.inputs if i.shape and isinstance(i.shape[0], int)), None)
    if fixed is not None and fixed != config.batch and (config.batch != 1 or config.data is not None):
        raise UsageError(
            f"the model's batch is fixed at {fixed}, so it cannot run {config.batch} at a time",
            where="--batch",
            hint=f"give --batch {fixed}, or export the model with a dynamic batch",
        )


def _precisions(config: CompileConfig, target: Target, capabilities: Capabilities, *, exact: bool) -> tuple[str, ...]:
    precisions = tuple(p for p in target.precisions if p in capabilities.precisions)
    base = next((p for p in precisions if p != "int8"), None)
    if base is None:
        wanted, has = (", ".join(p) for p in (target.precisions, capabilities.precisions))
        raise UsageError(f"target {target.name} is for {wanted}, the backend has {has}", where="--backend")
    if config.precision not in ("auto", *precisions):
        raise UsageError(
            f"target {target.name} has no {config.precision} here",
            where="--precision",
            hint="one of: auto, " + ", ".join(precisions),
        )
    if config.precision == base or exact:  # rounding is no exact rewrite
        return (base,)
    return precisions


def _load_data(config: CompileConfig, model: ModelProto, info: ModelInfo, reporter: Reporter) -> Dataset | None:
    if config.data is None:
        if config.val is not None:
            raise UsageError("--val needs --data", where=f"--val {config.val}", hint="name the training images too")
        if config.unlabelled is not None:
            where, hint = f"--unlabelled {config.unlabelled}", "images without labels can be --data themselves"
            raise UsageError("--unlabelled needs --data", where=where, hint=hint)
        return None
    spec = info.inputs[0]
    preprocess = load_preprocess(config.preprocess, config.model, spec)
    classes = _classes(info)
    return load_dataset(
        config.data,
        config.val,
        preprocess,
        spec,
        seed=config.seed,
        num_classes=classes,
        unlabelled=config.unlabelled,
        reporter=reporter,
    )


def _classes(info: ModelInfo) -> int | None:
    shape = info.outputs[0].shape
    last = shape[-1] if len(shape) == 2 else None
    return last if isinstance(last, int) and last > 1 else None


def _stand_in(info: ModelInfo) -> Dataset | None:
    """Random rows of the input's shape; None for models that one float array cannot feed."""
    if len(info.inputs) != 1 or info.inputs[0].dtype != "float32":
        return None
    rows = example_inputs(info, 8)[0].numpy()
    split = Split(rows, np.arange(len(rows)), None, Preprocess())
    return Dataset(split, split, split, labelled=False, num_classes=None, fingerprint="random", source="random input")
