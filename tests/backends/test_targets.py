"""Targets: built in, from files, from third parties."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from hantc.backends import registry, targets
from hantc.backends.roofline.backend import RooflineBackend
from hantc.backends.targets import Target, get_target
from hantc.backends.tensorrt.backend import TensorRTBackend
from hantc.core.errors import HantcError, UsageError
from hantc.report.doctor import targets_data, targets_table

MINE = """
backend = "roofline"
precisions = ["fp32"]
batch = 8
threads = 4
[ceilings]
name = "my board"
peak_fp32 = 5e9
"""
GPUS = {"t4": "SM75", "a100": "SM80", "rtx30": "SM86", "l4": "SM89", "rtx50": "SM120", "h100": "SM90"}
THEIRS = Target(name="x", backend="roofline", precisions=("fp32",), description="theirs")


def test_built_in_targets_name_backends_that_exist() -> None:
    found = targets.targets()
    assert set(found) == {"cpu", "roofline", "xeon", "xeon-bf16", *GPUS}
    for name, target in found.items():
        assert isinstance(target, Target)
        assert target.name == name and target.description
        assert get_target(name) == target
        caps = registry.get_backend(target.backend).capabilities()
        of_the_cpu = {"bf16"}  # not every one has it
        assert not caps.available or set(target.precisions) - of_the_cpu <= set(caps.precisions)


@pytest.mark.parametrize(("name", "capability"), GPUS.items())
def test_gpus(name: str, capability: str) -> None:
    target = get_target(name)
    assert (target.batch, target.precisions) == (128, ("fp16", "int8"))
    made = target.make_backend()
    assert isinstance(made, TensorRTBackend) and made.capability == capability
    assert made.machine == target.ceilings and made.machine.peak_fp16 is not None
    assert made.machine.peak_fp16 > made.machine.peak_fp32
    if name == "l4":
        assert made.machine == TensorRTBackend().machine


def test_a_gpu_with_another_engine_is_another_machine() -> None:
    other = get_target("l4").on("onnxruntime")
    assert other.ceilings is None and other.compute_capability is None
    other.make_backend()


def test_the_built_in_ceilings_are_the_models_own() -> None:
    made = get_target("roofline").make_backend()
    assert isinstance(made, RooflineBackend)
    assert made.machine == RooflineBackend().machine


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match="'toaster'") as caught:
        get_target("toaster")
    assert "cpu, h100, l4" in str(caught.value.hint) and "roofline" in str(caught.value.hint)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "board.toml"
    file.write_text(MINE)
    target = get_target(str(file))
    assert (target.name, target.batch, target.threads) == ("board", 8, 4)
    backend = target.make_backend()
    assert isinstance(backend, RooflineBackend)
    assert (backend.machine.name, backend.machine.peak_fp32) == ("my board", 5e9)
    assert backend.machine.bandwidth == RooflineBackend().machine.bandwidth, "what is not given stays"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('backend = "roofline"\nprecisions = ["fp32", "fp16"]', "one of fp32, fp16 and bf16"),
        ("backend = ", "is not TOML"),
        ('precisions = ["fp32"]', "backend"),
        ('backend = "roofline"\nprecisions = ["fp3"]', "precisions.0"),
        ('backend = "roofline"\nprecisions = []', "precisions"),
        ('backend = "roofline"\nprecisions = ["int8"]', "one of fp32, fp16 and bf16"),
        (MINE + "speed = 3", "ceilings.speed"),
        (MINE.replace("5e9", "-1"), "ceilings.peak_fp32"),
        (MINE.replace("= 8", "= 0"), "batch"),
    ],
)
def test_a_bad_file_is_told_of_by_its_key(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"bad\.toml") as caught:
        get_target(str(file))
    assert told in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        get_target(str(tmp_path / "none.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not a text file"):
        get_target(str(tmp_path / "bytes.toml"))


def test_only_the_roofline_takes_ceilings(tmp_path: Path) -> None:
    file = tmp_path / "odd.toml"
    file.write_text(MINE.replace('"roofline"', '"onnxruntime"'))
    with pytest.raises(UsageError, match="ceilings are for roofline and tensorrt alone"):
        get_target(str(file)).make_backend()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('backend = "tensorrt"\nprecisions = ["fp16"]', "needs compute_capability"),
        ('backend = "tensorrt"\nprecisions = ["fp16"]\ncompute_capability = "SM89"', r"and \[ceilings\]"),
        ('backend = "roofline"\nprecisions = ["fp32"]\ncompute_capability = "SM89"', "tensorrt backend alone"),
    ],
)
def test_tensorrt_needs_to_know_its_gpu(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "gpu.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=told):
        get_target(str(file)).make_backend()


def test_third_party_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("theirs", "tests.backends.test_targets:THEIRS", targets.GROUP),
        EntryPoint("xeon", "tests.backends.test_targets:THEIRS", targets.GROUP),  # must not take over
    ]
    monkeypatch.setattr(targets, "entry_points", lambda group: points if group == targets.GROUP else [])
    assert get_target("theirs").description == "theirs" and get_target("theirs").name == "theirs"
    assert get_target("xeon").backend == "onnxruntime"
    for broken, told in (("no_such_module_at_all:X", "does not load"), ("builtins:dict", "is not a")):
        points[:] = [EntryPoint("broken", broken, targets.GROUP)]
        with pytest.raises(HantcError, match=told):
            get_target("broken")
        assert get_target("xeon").name == "xeon", "others are not concerned"
        found = targets.targets()["broken"]
        assert isinstance(found, HantcError) and told in found.message
        (row,) = [t for t in targets_data() if t["name"] == "broken"]
        assert not row["available"] and told in row["reason"]
        assert targets_table() is not None


def test_another_engine_takes_no_ceilings() -> None:
    assert get_target("roofline").on("onnxruntime").make_backend().name == "onnxruntime"
    assert get_target("roofline").on("roofline") == get_target("roofline")
