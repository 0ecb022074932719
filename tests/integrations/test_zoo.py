"""Models by timm's names, made by the stand-in `timm` of conftest."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import save_file

from hantc.core.errors import ModelError, UsageError
from hantc.dialect.importer import import_file
from hantc.integrations.zoo import Wanted, export_named, preprocessing


def test_untrained(timm: Any, tmp_path: Path) -> None:
    path = export_named("timm:net@random", tmp_path)
    assert path == tmp_path / "net.onnx"
    module = import_file(path)
    torch.manual_seed(0)
    x = torch.randn(3, 3, 16, 16)  # any batch
    torch.manual_seed(0)
    assert torch.allclose(module(x), timm.Net().eval()(x), atol=1e-5)
    made = json.loads((tmp_path / "net.preprocess.json").read_text())
    assert made["resize"] == 20 and made["crop"] == [16, 16] and made["mean"] == [0.5, 0.4, 0.3]


def test_weights_of_a_file_bring_their_number_of_classes(timm: Any, tmp_path: Path) -> None:
    net = timm.Net(3).eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    x = torch.randn(2, 3, 16, 16)
    module = import_file(export_named(f"timm:net@{tmp_path / 'w.safetensors'}", tmp_path))
    assert torch.allclose(module(x), net(x), atol=1e-5)


@pytest.mark.usefixtures("timm")
def test_an_export_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export_named("timm:net@random", tmp_path)
    first = path.stat().st_mtime_ns
    assert export_named("timm:net@random", tmp_path).stat().st_mtime_ns == first
    path.write_bytes(path.read_bytes()[:100])  # cut off
    assert onnx.load(str(export_named("timm:net@random", tmp_path))).graph.node


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("timm:", "names no model"),
        ("timm:net@weights.pth", "no .safetensors file"),
        ("timm:other", "no such model"),
    ],
)
@pytest.mark.usefixtures("timm")
def test_wrong_names(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        export_named(text, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("timm")
def test_no_network(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no network") as caught:
        export_named("timm:net", tmp_path)
    assert "timm:net@random" in caught.value.hint and "\n" not in caught.value.message


@pytest.mark.usefixtures("timm")
def test_weights_of_another_model(tmp_path: Path) -> None:
    save_file({"stem": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="Error"):
        export_named(f"timm:net@{tmp_path / 'w.safetensors'}", tmp_path)


def test_timm_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="timm cannot be imported") as caught:
        export_named("timm:net@random", tmp_path)
    assert "pip install timm" in caught.value.hint


def test_names_are_parsed() -> None:
    assert Wanted.parse("timm:a.b_in1k") == Wanted("a.b_in1k", "")
    assert Wanted.parse("timm:a@random") == Wanted("a", "random")


def test_preprocessing_without_a_crop(timm: Any) -> None:
    made = preprocessing({**timm.FACTS, "crop_pct": 1.0})
    assert made["resize"] == 16 and made["crop"] == [16, 16]


def test_preprocessing_that_squashes(timm: Any) -> None:
    made = preprocessing({**timm.FACTS, "crop_mode": "squash"})
    assert made["resize"] == [20, 20] and made["crop"] == [16, 16]


@pytest.mark.usefixtures("timm")
def test_new_weights_in_the_same_file(timm: Any, tmp_path: Path) -> None:
    text, x = f"timm:net@{tmp_path / 'w.safetensors'}", torch.randn(2, 3, 16, 16)
    for _ in range(2):
        net = timm.Net(3).eval()
        save_file(net.state_dict(), tmp_path / "w.safetensors")
        assert torch.allclose(import_file(export_named(text, tmp_path))(x), net(x), atol=1e-5)
    (tmp_path / "net.preprocess.json").unlink()
    export_named(text, tmp_path)
    assert (tmp_path / "net.preprocess.json").is_file()
