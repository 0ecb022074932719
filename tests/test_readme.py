"""Every command and every Python example of the README runs, in a folder that has what they name."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
from PIL import Image

import hantc.run
from hantc.backends.registry import available
from hantc.cli import COMMANDS
from hantc.core.config import CompileConfig
from hantc.core.progress import Reporter

if TYPE_CHECKING:
    from tests.conftest import Compiled, Result, Tiny

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
COMMAND_LINES = [
    line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.startswith("hantc ")
]
EXAMPLES = [text for kind, text in BLOCKS if kind == "python"]
PLACES = {"../shared/models/cifar10_resnet56.onnx", "../shared/models/efficientnet_b0_cifar10_64.onnx"}


@pytest.fixture
def workplace(tiny: Tiny, compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the README speaks of, all of them tiny."""
    home = tmp_path / "project"
    for name in ("model.onnx", *PLACES):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny.model, home / name)
    dynamic = onnx.load(str(tiny.model))
    for axis in (2, 3):
        dynamic.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"size{axis}"
    onnx.save(dynamic, str(home / "dynamic.onnx"))
    (home / "../shared/data").mkdir()
    for name in ("set.npz", "../shared/data/cifar10_lossless.npz"):
        shutil.copy(tiny.data, home / name)
    for name in ("images", "cifar10_jpeg", "cifar10_train", "more"):
        for i, (image, label) in enumerate(zip(tiny.images, tiny.labels, strict=True)):
            folder = home / name / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            other = 255 - image if name == "cifar10_train" else image  # the same images again would be left out
            Image.fromarray(other).save(folder / f"{i}.png")
    for name in ("model.hantc", "other.hantc"):
        shutil.copytree(compiled.folder, home / name)
    for name in ("table.json", "table2.json"):
        shutil.copy(compiled.folder / "lut.json", home / name)
    (home / "board.toml").write_text('backend = "onnxruntime"\nprecisions = ["fp32"]\nthreads = 1\n')
    monkeypatch.chdir(home)
    monkeypatch.setenv("HANTC_STORE", str(compiled.store))
    return home


@pytest.fixture
def compiles(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> list[CompileConfig]:
    """Compiling stops once all options and inputs are checked and read; the shared run is the answer."""
    seen: list[CompileConfig] = []

    def check(config: CompileConfig, reporter: Reporter, **rest: Any) -> hantc.run.Run:
        state, ctx = hantc.run.prepare(config, reporter, rest.get("model"))
        assert state.model is not None and (ctx.data is not None) == (config.data is not None)
        seen.append(config)
        return hantc.run.load_run(compiled.folder)

    monkeypatch.setattr(hantc.run, "compile_config", check)
    return seen


def test_the_readme_has_commands() -> None:
    named = {shlex.split(line)[1] for line in COMMAND_LINES}
    assert named >= set(COMMANDS)  # each command is shown
    assert len(COMMAND_LINES) > len(COMMANDS) + 4 and len(EXAMPLES) == 2


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command(
    line: str, workplace: Path, compiles: list[CompileConfig], cli: Callable[..., Result], compiled: Compiled
) -> None:
    words = shlex.split(line, comments=True)[1:]
    heavy = words[0] not in COMMANDS
    if "openvino" in words and not available()["openvino"].available:
        pytest.skip("OpenVINO is not installed")
    if "xeon-bf16" in words and "bf16" not in available()["openvino"].precisions:
        pytest.skip("OpenVINO is not installed, or this CPU has no BF16")
    if "l4" in words and not available()["tensorrt"].available:
        pytest.skip("tensorrt_rtx is not installed")
    if words[0] == "profile":
        words += ["--effort", "quick", "--threads", "1"]
    if "imagenet" in words:  # the tiny teacher was not trained on such pixels
        words[words.index("imagenet")] = "none"
    result = cli(*words)
    assert result.code in ((0, 1) if heavy or words[0] == "verify" else (0,)), result.err
    assert result.out and "Traceback" not in result.err
    assert len(compiles) == heavy


@pytest.mark.parametrize("text", EXAMPLES, ids=["compile", "pass"])
def test_python_example(text: str, workplace: Path, compiles: list[CompileConfig]) -> None:
    names: dict[str, Any] = {}
    exec(compile(text, "README.md", "exec"), names)
    assert len(compiles) == 1
    assert names["student"].graph is not None
    assert compiles[0].budget is not None and compiles[0].budget.fraction == 0.5


def test_links_lead_somewhere() -> None:
    root = Path(__file__).resolve().parent.parent
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not link.startswith("http") and not (root / link).exists()] == []


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).resolve().parent.parent / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)\b", README)):
        assert f"\n{target}:" in makefile or f"{target}:" in makefile.splitlines()[0], target
