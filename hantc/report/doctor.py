"""What this machine can do, for `hantc doctor`."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hantc.backends.learning import learning_device, multiplies_bf16
from hantc.backends.registry import available, get_backend
from hantc.backends.targets import Target, targets
from hantc.core.atomic import write_text
from hantc.core.backend_api import Capabilities
from hantc.core.errors import HantcError, UsageError
from hantc.passes.ceilings import measure_ceilings

_PREDICTED = ("fp32", "int8", "fp16")  # what a target file of the roofline model has peaks of
_PACKAGES = ("torch", "onnx", "onnxruntime", "onnx-graphsurgeon", "networkx", "pulp", "highspy")


def doctor_data() -> dict[str, Any]:
    """Cores, instruction sets, backends and library versions as plain data."""
    backends = {name: asdict(c) for name, c in available().items()}
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    device = backends["onnxruntime"]["device"]
    flags = set(device["flags"])
    return {
        "cpu": device["cpu"],
        "cores": device["cores"],
        "flags": sorted(flags),
        "vnni": bool(flags & {"avx512_vnni", "avx_vnni"}),
        "amx": any(f.startswith("amx") for f in flags),
        "backends": backends,
        "training": _training(),
        "versions": versions,
    }


def _training() -> dict[str, Any]:
    place, notes = learning_device("auto")
    return {"device": "CPU" if place.type == "cpu" else "GPU", "bf16": multiplies_bf16(place), "notes": notes}


def doctor_table(data: dict[str, Any]) -> RenderableType:
    """The same for the terminal."""
    machine = Table(title="this machine", show_header=False)
    machine.add_row("CPU", Text(str(data["cpu"])))
    machine.add_row("physical cores", str(data["cores"]))
    machine.add_row("instruction sets", " ".join(data["flags"]) or "none of interest")
    machine.add_row("VNNI (fast INT8)", "yes" if data["vnni"] else "no: INT8 gains less, weights keep to 7 bits")
    machine.add_row("AMX", "yes" if data["amx"] else "no")
    trains = data["training"]
    how = f"on the {trains['device']}, products in {'BF16' if trains['bf16'] else 'FP32'}"
    machine.add_row("training", Text("; ".join((how, *trains["notes"]))))
    backends = Table("backend", "usable", "precisions", "figures", "remarks", title="backends")
    for name, c in data["backends"].items():
        remarks = "; ".join((c["reason"], *c["notes"]))
        backends.add_row(
            name,
            "yes" if c["available"] else "no",
            " ".join(c["precisions"]),
            "" if not c["available"] else "measured" if c["measures"] else "predicted",
            remarks,
        )
    packages = Table("library", "version", title="libraries")
    for name, v in data["versions"].items():
        packages.add_row(name, v)
    return Group(machine, backends, packages)


def calibrated(backend: str, out: Path | None) -> dict[str, Any]:
    """The ceilings of this machine as `backend` reaches them, and as a target in TOML; written to `out` if one is
    given. UsageError for an engine that cannot be timed here, or a file that cannot be written."""
    if out is not None and (out.suffix != ".toml" or out.is_dir() or not out.absolute().parent.is_dir()):
        raise UsageError("must be a .toml file in a folder that exists", where=f"--out {out}")
    engine = get_backend(backend)
    can = engine.capabilities()
    if not (can.available and can.measures):
        raise UsageError(f"cannot be timed here: {can.reason}", where=f"--backend {backend}")
    found = measure_ceilings(engine, can.device.cores)
    peaks = {f"peak_{precision}": value for precision, value in found.peaks if precision in _PREDICTED}
    facts = {
        **peaks,
        "bandwidth": found.bandwidth,
        "bandwidth_max": found.bandwidth_max,
        "op_overhead_s": found.op_overhead_s,
        "parallel_efficiency": found.parallel_efficiency,
    }
    name = f"{can.device.cpu}, {backend}"
    text = _as_target(name, found.cores, facts)
    if out is not None:
        write_text(out, text)
    note = "further cores added next to nothing: is the machine busy? measure again" if found.doubtful else ""
    where = str(out) if out else None
    return {"name": name, "cores": found.cores, "ceilings": facts, "toml": text, "out": where, "note": note}


def _as_target(name: str, cores: int, facts: dict[str, float]) -> str:
    quoted = '"' + name.replace("\\", " ").replace('"', " ") + '"'
    lines = "".join(f"{key} = {value:.4g}\n" for key, value in facts.items())
    head = f'backend = "roofline"\nprecisions = ["fp32", "int8"]\nthreads = {cores}\n'
    return f"# measured by hantc doctor --calibrate\n{head}\n[ceilings]\nname = {quoted}\n{lines}"


def ceilings_table(data: dict[str, Any]) -> RenderableType:
    """The same for the terminal."""
    rows = Table(title=f"ceilings: {data['name']}", show_header=False)
    c = data["ceilings"]
    for precision in (k.removeprefix("peak_") for k in c if k.startswith("peak_")):
        rows.add_row(f"peak {precision}, one core", f"{c['peak_' + precision] / 1e9:.1f} GFLOP/s")
    rows.add_row("each further core adds", f"{100 * c['parallel_efficiency']:.0f} %")
    rows.add_row("bytes, one core", f"{c['bandwidth'] / 1e9:.1f} GB/s")
    rows.add_row(f"bytes, {data['cores']} core(s)", f"{c['bandwidth_max'] / 1e9:.1f} GB/s")
    rows.add_row("starting an operation", f"{1e6 * c['op_overhead_s']:.1f} µs")
    where = f"written to {data['out']}" if data["out"] else "--out FILE.toml writes it as a target"
    return Group(rows, Text(where), *([Text(f"note: {data['note']}")] if data["note"] else []))


def targets_data() -> list[dict[str, Any]]:
    """Every target, and whether it can be compiled for here."""
    found = available()
    told = []
    for name, t in targets().items():
        if isinstance(t, HantcError):
            broken = {"name": name, "backend": "", "precisions": [], "description": "", "available": False}
            told.append({**broken, "reason": t.message})
            continue
        usable, reason = _usable(t, found.get(t.backend))
        told.append({**t.model_dump(mode="json"), "available": usable, "reason": reason})
    return told


def _usable(target: Target, here: Capabilities | None) -> tuple[bool, str]:
    """Whether a target can be compiled for, given what its backend can do here; and why, or why not."""
    if here is None:
        return False, f"no backend {target.backend!r}"
    if here.available and target.compute_capability is not None:
        try:
            here = target.make_backend().capabilities()  # engines cannot be built for every GPU
        except HantcError as e:
            return False, e.message
    floats = [p for p in target.precisions if p != "int8"]
    if here.available and not set(floats) & set(here.precisions):
        return False, f"{target.backend} has no {' or '.join(floats)} on this CPU"
    return here.available, here.reason


def targets_table() -> RenderableType:
    """The same for the terminal."""
    table = Table("target", "backend", "precisions", "here", "what")
    for t in targets_data():
        here = "yes" if t["available"] else f"no: {t['reason']}"
        table.add_row(t["name"], t["backend"], " ".join(t["precisions"]), here, t["description"])
    return table
