"""A tiny network with its data, and one run of it through the command line, shared by the end-to-end tests."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, fx, nn

from hantc.cli import main
from hantc.dialect.activation import activation
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Add
from hantc.dialect.emitter import emit
from hantc.dialect.graph import trace
from hantc.dialect.linear import Linear
from hantc.dialect.pool import GlobalPool
from hantc.dialect.shape import Flatten

Array = np.ndarray[Any, Any]
SIDE, WIDTH, CLASSES, TRAIN, VAL = 16, 32, 4, 240, 80
torch.set_num_threads(1)  # the networks are tiny; hantc takes no more than whoever embeds it
QUICK = ("--effort", "quick", "--time-limit", "24s", "--threads", "1")


@dataclass(frozen=True)
class Tiny:
    """A small teacher that is right on all of its data. Inputs are (N, 3, 16, 16) pixels over 255."""

    model: Path
    data: Path
    unlabelled: Path
    images: Array  # (VAL, 16, 16, 3), uint8
    labels: Array

    def feeds(self, n: int = 16) -> Array:
        """Validation images as the network takes them."""
        return as_input(self.images[:n])


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Compiled:
    """A finished run of the tiny network, and what the command printed (`--json`)."""

    folder: Path
    store: Path
    argv: tuple[str, ...]
    result: Result


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.relu, self.second = (
            Conv(channels, channels, 3),
            activation("relu"),
            Conv(channels, channels, 3),
        )
        self.add, self.last = Add(), activation("relu")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.add(self.second(self.relu(self.first(x))), x))
        return out


class TinyNet(nn.Module):
    """Stem, two residual blocks of one shape (so that the second's candidates need no measuring), linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_act = Conv(3, WIDTH, 3), activation("relu")
        self.blocks = nn.Sequential(_Block(WIDTH), _Block(WIDTH))
        self.pool, self.flat, self.head = GlobalPool(), Flatten(), Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 16, 16) → (N, 4)."""
        x = self.blocks(self.stem_act(self.stem(x)))
        out: Tensor = self.head(self.flat(self.pool(x)))
        return out


def smooth_images(n: int, seed: int) -> Array:
    """(n, 16, 16, 3) uint8: a few random waves each, so that a network tells them apart."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (n, 4, 4, 3))
    fine = np.repeat(np.repeat(coarse, SIDE // 4, 1), SIDE // 4, 2) + rng.normal(0, 8, (n, SIDE, SIDE, 3))
    images: Array = np.clip(fine, 0, 255).astype(np.uint8)
    return images


def as_input(images: Array) -> Array:
    """uint8 NHWC → float32 NCHW, over 255."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / np.float32(255)


def tiny_network(images: Array) -> fx.GraphModule:
    """The network with a head that spreads `images` evenly over its classes."""
    torch.manual_seed(0)
    net = TinyNet().eval()
    x = torch.from_numpy(as_input(images))
    with torch.no_grad():
        logits = net(x)
        net.head.weight.div_(logits.std(0).unsqueeze(1) / 3)
        net.head.bias -= net(x).mean(0)
    return trace(net, (3, SIDE, SIDE), (CLASSES,))


def run_model(path: str | Path, x: Array) -> Array:
    """First output of an ONNX file in plain ONNX Runtime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (out, *_) = session.run(None, {session.get_inputs()[0].name: x})
    result: Array = out
    return result


def run_cli(*argv: str | Path) -> Result:
    """Run `hantc argv` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(a) for a in argv])
    return Result(code, out.getvalue(), err.getvalue())


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's log, oldest first."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny teacher and its data, on disk."""
    folder = tmp_path_factory.mktemp("tiny")
    images = smooth_images(TRAIN + VAL, 1)
    network = tiny_network(images)
    model = folder / "tiny.onnx"
    onnx.save(emit(network).model, str(model))
    labels = run_model(model, as_input(images)).argmax(1)
    x, y, x_val, y_val = images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:]
    np.savez(folder / "data.npz", x=x, y=y, x_val=x_val, y_val=y_val)
    np.savez(folder / "unlabelled.npz", x=x, x_val=x_val)
    return Tiny(model, folder / "data.npz", folder / "unlabelled.npz", x_val, y_val)


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    """`hantc …` in this process."""
    return run_cli


@pytest.fixture(scope="session")
def compiled(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """One run with labelled data, through the command line."""
    folder = tmp_path_factory.mktemp("compiled")
    out, store = folder / "run", folder / "store"
    given = ("--target", "xeon", "--data", str(tiny.data), "--budget", "0.9", *QUICK)
    argv = (str(tiny.model), *given, "--store", str(store), "--out", str(out))
    return Compiled(out, store, argv, run_cli(*argv, "--json"))


@pytest.fixture(scope="session", name="run_model")
def _run_model() -> Callable[..., Array]:
    return run_model


@pytest.fixture(scope="session", name="events")
def _events() -> Callable[..., list[dict[str, Any]]]:
    return events


@pytest.fixture
def attempt(cli: Callable[..., Result], tiny: Tiny, tmp_path: Path) -> Callable[..., Result]:
    """`hantc` with a fresh run folder and store; `model` and `data` in place of the good ones."""

    def run(*options: str | Path, model: Path | None = None, data: Path | None = None, code: int = 2) -> Result:
        given = [] if "--out" in options else ["--out", tmp_path / "run"]
        argv = [model or tiny.model, "--data", data or tiny.data, "--store", tmp_path / "store", *given, *options]
        result = cli(*argv)
        assert result.code == code, result.err
        assert result.out == "" and "Traceback" not in result.err
        assert result.err.splitlines()[-2 if "\n  hint:" in result.err else -1].startswith("hantc: ")
        assert not (tmp_path / "run" / "model.onnx").exists() and not (tmp_path / "run" / "summary.json").exists()
        assert not list(tmp_path.rglob("*.tmp"))
        return result

    return run


class _Named(nn.Module):
    """What the stand-in for timm makes: a convolution, a norm, a head."""

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))
        return out


def _named(name: str, *, pretrained: bool, num_classes: int = 7) -> nn.Module:
    if name == "net" and pretrained:
        raise OSError("no network\nand more")
    return _Named(num_classes)


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in with timm's interface: it is no dependency, and imports torchvision. `tools/bench/timm_coverage.py`
    runs the real one."""
    facts = {
        "input_size": (3, 16, 16),
        "interpolation": "bicubic",
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.2, 0.2),
        "crop_pct": 0.8,
        "crop_mode": "center",
    }
    stand_in: Any = SimpleNamespace(
        is_model=lambda name: name in ("net", "efficientnet_b0"),
        list_models=lambda pattern: ["net"] if "n" in pattern else [],
        create_model=_named,
        get_pretrained_cfg_value=lambda name, key: "fc",
        data=SimpleNamespace(resolve_model_data_config=lambda module: facts),
        Net=_Named,
        FACTS=facts,
    )
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    return stand_in
