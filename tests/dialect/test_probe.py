"""What takes the machine down, or for ever, when it is run: found in a process of its own, and never folded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from hantc.core.errors import HantcError, ModelError
from hantc.dialect import guard, opaque, probe
from hantc.dialect.emitter import emit, opaque_leaves
from hantc.dialect.importer import import_model
from tests.dialect.conftest import run_ort

if TYPE_CHECKING:
    from tests.dialect.conftest import Models

node = helper.make_node
ENDLESS = {"m": np.array((1 << 63) - 1), "t": np.array(True), "s": np.ones(4, np.float32)}


def small(models: Models, *nodes: NodeProto, constants: dict[str, Any] | None = None) -> ModelProto:
    return models.make(nodes, {"x": ("N", 4)}, ["y"], constants)


def loop(*nodes: NodeProto, turns: str = "m", start: str = "s", out: str = "l") -> NodeProto:
    """A Loop from `start` whose body takes "c" and makes "c2", whether to go on."""
    types = {"i": (TensorProto.INT64, []), "c": (TensorProto.BOOL, []), "v": (TensorProto.FLOAT, [4])}
    ends = {k: helper.make_tensor_value_info(k, t, d) for k, (t, d) in types.items()}
    outs = [helper.make_tensor_value_info(f"{k}2", *types[k]) for k in ("c", "v")]
    body = helper.make_graph([*nodes, node("Relu", ["v"], ["v2"])], "body", list(ends.values()), outs)
    return node("Loop", [turns, "t", start], [out], body=body)


ON = node("Identity", ["c"], ["c2"])
WAYS = {
    "turns by arithmetic": [node("Mul", ["m", "m2"], ["mm"]), loop(ON, turns="mm")],
    "a condition by Or": [loop(node("Or", ["c", "c"], ["c2"]))],
    "a condition by Not": [loop(node("Not", ["c"], ["n"]), node("Not", ["n"], ["c2"]))],
    "a condition by Cast": [
        loop(node("Cast", ["c"], ["n"], to=TensorProto.INT64), node("Cast", ["n"], ["c2"], to=TensorProto.BOOL))
    ],
}
LONG = ENDLESS | {"m": np.array(1 << 40), "m2": np.array(1 << 10)}


@pytest.mark.parametrize("nodes", WAYS.values(), ids=WAYS)
def test_a_loop_without_end_is_not_folded(
    models: Models, nodes: list[NodeProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opaque, "_LONGEST", 0.3)
    network = import_model(small(models, *nodes, node("Add", ["x", "l"], ["y"]), constants=LONG))
    assert [leaf.proto.op_type for _, leaf in opaque_leaves(network)] == ["Loop"]


def test_a_loop_in_a_branch_is_not_folded(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """graphsurgeon folds in branches that are never taken, too."""
    monkeypatch.setattr(opaque, "_LONGEST", 0.3)
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, [4])
    bad = helper.make_graph([loop(node("Or", ["c", "c"], ["c2"]), out="o")], "bad", [], [out])
    good = helper.make_graph([node("Exp", ["s"], ["o"])], "good", [], [out])
    fork = node("If", ["t"], ["l"], then_branch=good, else_branch=bad)
    import_model(small(models, fork, node("Add", ["x", "l"], ["y"]), constants=LONG))


def test_a_dead_loop_is_not_run(models: Models) -> None:
    network = import_model(small(models, *WAYS["a condition by Or"], node("Relu", ["x"], ["y"]), constants=LONG))
    assert opaque_leaves(network) == []


def test_what_stands_beside_a_loop_is_folded(models: Models) -> None:
    """graphsurgeon makes such a Loop invalid when it folds it, and then folds nothing at all."""
    sums = [node("Mul", ["k", "k"], ["kk"]), node("Add", ["x", "kk"], ["xk"])]
    model = small(
        models,
        *sums,
        loop(ON),
        node("Add", ["xk", "l"], ["y"]),
        constants=LONG | {"m": np.array(5), "k": np.ones(4, np.float32)},
    )
    network = import_model(model)
    assert [n.op for n in network.graph.nodes if "mul" in n.name] == []
    feeds = models.feeds(model)
    np.testing.assert_array_equal(run_ort(emit(network).model, feeds)[0], run_ort(model, feeds)[0])


def test_running_a_loop_without_end_stops(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opaque, "_LONGEST", 0.3)
    network = import_model(small(models, *WAYS["a condition by Or"], node("Add", ["x", "l"], ["y"]), constants=LONG))
    with pytest.raises(HantcError, match="Loop failed in ONNX Runtime"):
        opaque_leaves(network)[0][1]()


def test_a_model_that_never_ends_is_an_error(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_PROBE_S", 5)
    model = small(models, *WAYS["a condition by Not"], node("Add", ["x", "l"], ["y"]), constants=LONG)
    with pytest.raises(ModelError, match="still at it 5 s after"):
        guard.check_survives(model)


def test_a_loop_that_ends_on_images_passes(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which it would not on zeros."""
    monkeypatch.setattr(guard, "_PROBE_S", 30)
    less = [node("ReduceMax", ["v"], ["top"], keepdims=0), node("Less", ["top", "most"], ["c2"])]
    types: dict[str, tuple[int, Any]] = {
        "i": (TensorProto.INT64, []),
        "c": (TensorProto.BOOL, []),
        "v": (TensorProto.FLOAT, None),
    }
    ends = {k: helper.make_tensor_value_info(k, t, d) for k, (t, d) in types.items()}
    outs = [helper.make_tensor_value_info(f"{k}2", *types[k]) for k in ("c", "v")]
    body = helper.make_graph([*less, node("Add", ["v", "v"], ["v2"])], "body", list(ends.values()), outs)
    turning = node("Loop", ["", "t", "x"], ["y"], body=body)
    guard.check_survives(small(models, turning, constants={"t": np.array(True), "most": np.array(50, np.float32)}))


def test_more_memory_than_there_is_is_an_error(models: Models) -> None:
    """The size is computed, so that inference has nothing to say about it."""
    nodes = [
        node("Mul", ["m", "m2"], ["d"]),
        node("ConstantOfShape", ["d"], ["l"]),
        node("ReduceSum", ["l"], ["r"]),
        node("Add", ["x", "r"], ["y"]),
    ]
    huge = {"m": np.array([1 << 20]), "m2": np.array([1 << 20])}
    with pytest.raises(ModelError, match=r"needs more than this machine's \d+ GiB of memory"):
        guard.check_survives(small(models, *nodes, constants=huge))
    guard.check_survives(small(models, *nodes, constants={k: v >> 16 for k, v in huge.items()}))


def test_a_crash_of_onnxruntime_is_an_error(models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(probe, "__file__", str(tmp_path / "probe.py"))
    with pytest.raises(ModelError, match=r"crashes on it \(SIGSEGV\)"):
        guard.check_survives(small(models, node("Relu", ["x"], ["y"])))


def test_an_error_of_onnxruntime_is_left_to_the_backend(models: Models) -> None:
    guard.check_survives(small(models, node("NoSuchOperator", ["x"], ["y"])))


def test_the_probe_runs_the_model(models: Models, tmp_path: Path) -> None:
    """Not only loads it: a Loop in it is entered."""
    path = tmp_path / "model.onnx"
    onnx.save(small(models, node("Relu", ["x"], ["y"])), path)
    argv = [sys.executable, "-P", probe.__file__, str(path), str(64 << 30)]
    done = subprocess.run(argv, capture_output=True, check=False, env={**os.environ, "PYTHONPATH": ""})
    assert (done.returncode, done.stderr) == (0, b"")
