"""What this machine can do, for `hantc doctor`."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hantc.backends.registry import available
from hantc.backends.targets import targets
from hantc.core.errors import HantcError

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
        "versions": versions,
    }


def doctor_table(data: dict[str, Any]) -> RenderableType:
    """The same for the terminal."""
    machine = Table(title="this machine", show_header=False)
    machine.add_row("CPU", Text(str(data["cpu"])))
    machine.add_row("physical cores", str(data["cores"]))
    machine.add_row("instruction sets", " ".join(data["flags"]) or "none of interest")
    machine.add_row("VNNI (fast INT8)", "yes" if data["vnni"] else "no: INT8 gains less, weights keep to 7 bits")
    machine.add_row("AMX", "yes" if data["amx"] else "no")
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


def targets_data() -> list[dict[str, Any]]:
    """Every target, and whether it can be compiled for here."""
    found = available()
    told = []
    for name, t in targets().items():
        if isinstance(t, HantcError):
            broken = {"name": name, "backend": "", "precisions": [], "description": "", "available": False}
            told.append({**broken, "reason": t.message})
            continue
        here = found.get(t.backend)
        usable, reason = (here.available, here.reason) if here else (False, f"no backend {t.backend!r}")
        told.append({**t.model_dump(mode="json"), "available": usable, "reason": reason})
    return told


def targets_table() -> RenderableType:
    """The same for the terminal."""
    table = Table("target", "backend", "precisions", "here", "what")
    for t in targets_data():
        here = "yes" if t["available"] else f"no: {t['reason']}"
        table.add_row(t["name"], t["backend"], " ".join(t["precisions"]), here, t["description"])
    return table
