"""Files whose nodes say what makes no sense: an error that names the node, by the compiler and `hantc regions`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from tests.conftest import Result

WEIGHT = np.ones((4, 4, 3, 3), np.float32)
CASES: dict[str, tuple[str, dict[str, Any], list[np.ndarray[Any, Any]]]] = {
    "no groups": ("Conv", {"group": 0}, [WEIGHT]),
    "groups that do not divide": ("Conv", {"group": 3}, [WEIGHT]),
    "fewer groups than none": ("Conv", {"group": -1}, [WEIGHT]),
    "stride 0": ("Conv", {"strides": [0, 0]}, [WEIGHT]),
    "dilation 0": ("Conv", {"dilations": [0, 0]}, [WEIGHT]),
    "integer weights": ("Conv", {}, [WEIGHT.astype(np.int64)]),
    "a window of nothing": ("MaxPool", {"kernel_shape": [0, 0]}, []),
    "pooling at stride 0": ("AveragePool", {"kernel_shape": [2, 2], "strides": [0, 0]}, []),
    "an axis too many": ("Transpose", {"perm": [0, 1, 2, 9]}, []),
    "an axis twice": ("Transpose", {"perm": [0, 1, 1, 3]}, []),
    "softmax over axis 20": ("Softmax", {"axis": 20}, []),
    "blocks of 0": ("SpaceToDepth", {"blocksize": 0}, []),
    "blocks of -2": ("DepthToSpace", {"blocksize": -2}, []),
    "two open sizes": ("Reshape", {}, [np.array([-1, -1, 3])]),
    "as many norms as it likes": ("BatchNormalization", {}, [np.ones(9, np.float32)] * 4),
}


def model_of(op: str, attributes: dict[str, Any], constants: list[np.ndarray[Any, Any]]) -> onnx.ModelProto:
    names = [f"c{i}" for i in range(len(constants))]
    node = helper.make_node(op, ["x", *names], ["y"], name="the_culprit", **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", "a", "b", "c"])
    values = [numpy_helper.from_array(c, n) for c, n in zip(constants, names, strict=True)]
    graph = helper.make_graph([node], "g", [x], [y], values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("case", sorted(CASES))
def test_nonsense_is_the_files_fault(case: str, cli: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx"
    onnx.save(model_of(*CASES[case]), str(path))
    for argv in (("regions", path), (path, "--target", "cpu", "--out", tmp_path / "run")):
        result = cli(*argv)
        assert result.code == 2, (argv[0], result.err)
        assert "odd.onnx" in result.err and "internal error" not in result.err
        assert "the_culprit" in result.err or CASES[case][0] in result.err


@pytest.mark.parametrize("place", ["../secret.bin", "/dev/zero", "link.bin", "pipe"])
def test_weights_elsewhere_are_told_from_a_broken_file(place: str, cli: Callable[..., Result], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(WEIGHT.tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    os.mkfifo(folder / "pipe")
    model = model_of("Conv", {}, [WEIGHT])
    (weight,) = model.graph.initializer
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=place)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    result = cli("regions", folder / "m.onnx")
    assert result.code == 2 and "weights cannot be read" in result.err and "own folder" in result.err
