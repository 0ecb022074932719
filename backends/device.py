"""The CPU's fingerprint: model, instruction sets that matter for inference, physical cores."""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from functools import cache
from pathlib import Path

from hantc.core.backend_api import Capabilities
from hantc.core.types import Device

# what MLAS (ONNX Runtime's kernel library) chooses its kernels by, on x86 and on ARM
_FLAGS = ("avx2", "avx512", "avx_vnni", "amx", "asimddp", "i8mm", "sve")
_VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")


def fingerprint(versions: tuple[tuple[str, str], ...], cpuinfo: str | None = None) -> Device:
    """This machine's Device, given the engine's library versions. `cpuinfo`: text of /proc/cpuinfo (tests)."""
    text = read_cpuinfo() if cpuinfo is None else cpuinfo
    records = parse_cpuinfo(text)
    first = records[0] if records else {}
    name = first.get("model name") or platform.processor() or platform.machine()
    words = (first.get("flags") or first.get("Features") or "").split()
    flags = tuple(sorted({w for w in words if w.startswith(_FLAGS)}))
    return Device(cpu=" ".join(name.split()), flags=flags, cores=physical_cores(text), versions=versions)


def cpu_capabilities(engine: str, package: str, version: str | None) -> Capabilities:
    """FP32 and INT8 (QDQ) on this machine's CPU with an inference engine; `version` None: it is not installed."""
    if version is None:
        reason = f"the package {package} is not installed (pip install {package})"
        return Capabilities(False, reason, (), fingerprint(()), measures=False)
    device = fingerprint(((package, version),))
    reduce_range = needs_reduced_range(device)
    notes = ("no VNNI: INT8 weights use a reduced range (7 bits), INT8 gains less",) if reduce_range else ()
    return Capabilities(
        available=True,
        reason=f"{engine} {version} on {device.cpu}, {device.cores} core(s)",
        precisions=("fp32", "int8"),
        device=device,
        measures=True,
        notes=notes,
        reduce_range=reduce_range,
    )


def has_vnni(device: Device) -> bool:
    """Whether 8-bit products accumulate in 32 bits in one instruction (x86)."""
    return any(f in _VNNI for f in device.flags)


def trains_in_bf16(cpuinfo: str | None = None) -> bool:
    """Whether this CPU multiplies BF16 numbers in one instruction (AVX512-BF16): mixed precision then trains faster.
    Where it has AMX too torch takes kernels that nobody has tried here. `cpuinfo` as in `fingerprint`."""
    flags = fingerprint((), cpuinfo).flags
    return "avx512_bf16" in flags and not any(f.startswith("amx") for f in flags)


def channel_block(device: Device) -> int:
    """Channels in the blocks that ONNX Runtime holds float activations in, on x86: as many as a register has floats."""
    if any(f.startswith("avx512") for f in device.flags):
        return 16
    return 8 if "avx2" in device.flags else 0


def needs_reduced_range(device: Device) -> bool:
    """Whether INT8 weights must keep to 7 bits: x86 without VNNI adds pairs of u8·s8 products in saturating
    16 bits (`vpmaddubsw`), so full-range weights give wrong sums. ARM kernels do not saturate."""
    return platform.machine().lower() in ("x86_64", "amd64", "i686") and not has_vnni(device)


def physical_cores(cpuinfo: str | None = None, allowed: frozenset[int] | None = None) -> int:
    """Physical cores that this process may use: distinct (physical id, core id) pairs among the processors of
    its affinity mask, and not more than its cgroup's CPU quota. At least 1."""
    allowed = _affinity() if allowed is None else allowed
    pairs = set()
    for record in parse_cpuinfo(read_cpuinfo() if cpuinfo is None else cpuinfo):
        number = int(record["processor"])
        if number in allowed:
            # some virtual machines and ARM give no core ids: then every processor counts
            pairs.add((record.get("physical id", "0"), record.get("core id", f"p{number}")))
    count = len(pairs) or len(allowed)
    return max(1, min(count, _cgroup_cpus(Path("/sys/fs/cgroup/cpu.max")) or count))


def pick_cores(threads: int, cpuinfo: str | None = None, allowed: frozenset[int] | None = None) -> tuple[int, ...]:
    """The processors for `threads` threads to stay on, of those that this process may use: of one package if that has
    enough, each another physical core as far as there are any; all of them where they are fewer than threads."""
    allowed = _affinity() if allowed is None else allowed
    packages: dict[str, list[tuple[int, int]]] = {}  # (how many processors of its core are taken before it, number)
    seen: Counter[tuple[str, str]] = Counter()
    records = {int(r["processor"]): r for r in parse_cpuinfo(read_cpuinfo() if cpuinfo is None else cpuinfo)}
    for number in sorted(allowed):
        record = records.get(number, {})
        package = record.get("physical id", "0")
        core = (package, record.get("core id", f"p{number}"))
        packages.setdefault(package, []).append((seen[core], number))
        seen[core] += 1
    # a package that has a core for each thread before one that has not, the one with more cores before the other
    order = sorted(packages.values(), key=lambda p: -min(threads, sum(rank == 0 for rank, _ in p)))
    best = [(rank, k, number) for k, package in enumerate(order) for rank, number in package]
    return tuple(sorted(number for _, _, number in sorted(best)[:threads]))


def parse_cpuinfo(text: str) -> list[dict[str, str]]:
    """One dict per logical processor of /proc/cpuinfo's text."""
    records = []
    for block in text.split("\n\n"):
        pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
        record = {k.strip(): v.strip() for k, v in pairs}
        if record.get("processor", "").isdigit():
            records.append(record)
    return records


@cache
def read_cpuinfo() -> str:
    """Text of /proc/cpuinfo, or "" where there is none."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _cgroup_cpus(path: Path) -> int | None:
    """Whole CPUs of a cgroup v2 quota ("200000 100000" → 2), None without one."""
    try:
        quota, period = path.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return None
