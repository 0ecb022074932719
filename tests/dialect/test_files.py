"""Reading files that are no models, or only parts of one."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest
from onnx import ModelProto, helper

from hantc.core.errors import ModelError
from hantc.dialect.emitter import emit
from hantc.dialect.importer import import_file, load_onnx

if TYPE_CHECKING:
    from tests.dialect.conftest import Models


@pytest.fixture
def model(models: Models) -> ModelProto:
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    return models.make(nodes, {"x": ["N", 3, 8, 8]}, {"y": ["N", 4, 6, 6]}, {"w": models.weight(4, 3, 3, 3)})


def _fails(path: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        import_file(path)
    assert str(path) in str(caught.value) and caught.value.hint and caught.value.exit_code == 2
    return caught.value


def test_a_good_file(tmp_path: Path, model: ModelProto) -> None:
    onnx.save(model, str(tmp_path / "m.onnx"))
    assert [n.op_type for n in emit(import_file(tmp_path / "m.onnx")).model.graph.node] == ["Conv", "Relu"]


def test_missing_file(tmp_path: Path) -> None:
    assert "no such file" in _fails(tmp_path / "none.onnx").message


def test_folder(tmp_path: Path) -> None:
    assert "no such file" in _fails(tmp_path).message


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"this is no model\n" * 50, b"\x89PNG\r\n\x1a\n" + bytes(200), bytes(64)]
)
def test_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    _fails(path)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9, 0.99])
def test_truncated(tmp_path: Path, model: ModelProto, share: float) -> None:
    whole = model.SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(whole[: int(len(whole) * share)])
    _fails(path)


def test_zip(tmp_path: Path, model: ModelProto) -> None:
    path = tmp_path / "m.onnx"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m.onnx", model.SerializeToString())
    _fails(path)


def test_missing_initialiser(tmp_path: Path, model: ModelProto) -> None:
    del model.graph.initializer[:]
    path = tmp_path / "m.onnx"
    onnx.save(model, str(path))
    assert "'w' is used but never made" in _fails(path).message


def test_external_weights(tmp_path: Path, model: ModelProto) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="m.data", size_threshold=0)
    assert [n.op_type for n in emit(import_file(path)).model.graph.node] == ["Conv", "Relu"]
    (tmp_path / "m.data").unlink()
    _fails(path)


def test_empty_graph(tmp_path: Path, model: ModelProto) -> None:
    del model.graph.node[:]
    path = tmp_path / "m.onnx"
    onnx.save(model, str(path))
    with pytest.raises(ModelError, match="no graph"):
        load_onnx(path)
