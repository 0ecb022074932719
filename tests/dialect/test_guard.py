"""Hostile and broken files: refused before anything of them runs, with what is wrong by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, external_data_helper, helper, numpy_helper

from hantc.core.errors import ModelError
from hantc.dialect.importer import import_file, load_onnx

if TYPE_CHECKING:
    from tests.dialect.conftest import Models

node = helper.make_node
Loader = Callable[[ModelProto], ModelProto]


@pytest.fixture
def load(tmp_path: Path) -> Loader:
    def through_a_file(model: ModelProto) -> ModelProto:
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return load_onnx(path)

    return through_a_file


def small(models: Models, *nodes: Any, constants: dict[str, Any] | None = None, x: Any = ("N", 4)) -> ModelProto:
    return models.make(nodes, {"x": x}, ["y"], constants)


def test_a_sound_model_passes(models: Models, load: Loader) -> None:
    model = small(models, node("Relu", ["x"], ["a"]), node("Exp", ["a"], ["y"]))
    assert load(model).graph.node[1].op_type == "Exp"


def test_unsorted_nodes_are_no_cycle(models: Models, load: Loader) -> None:
    assert load(small(models, node("Exp", ["a"], ["y"]), node("Relu", ["x"], ["a"]))).graph.node


def test_cycle(models: Models, load: Loader) -> None:
    model = small(
        models, node("Add", ["x", "b"], ["a"], name="one"), node("Relu", ["a"], ["b"]), node("Exp", ["b"], ["y"])
    )
    with pytest.raises(ModelError, match=r"model\.onnx: the graph has a cycle: '\w*' waits for its own result"):
        load(model)


def test_tensor_made_twice(models: Models, load: Loader) -> None:
    with pytest.raises(ModelError, match="'y' is made twice"):
        load(small(models, node("Relu", ["x"], ["y"]), node("Exp", ["x"], ["y"])))


def test_tensor_never_made(models: Models, load: Loader) -> None:
    with pytest.raises(ModelError, match="'ghost' is used but never made"):
        load(small(models, node("Add", ["x", "ghost"], ["y"])))


def test_weight_that_the_file_does_not_hold(models: Models, load: Loader) -> None:
    model = small(models, node("Add", ["x", "w"], ["y"]), constants={"w": np.zeros(4, np.float32)})
    model.graph.initializer[0].dims[:] = [1 << 40, 1 << 20]
    with pytest.raises(ModelError, match="weight 'w' declares the shape"):
        load(model)


def test_input_that_no_memory_holds(models: Models, load: Loader) -> None:
    with pytest.raises(ModelError, match=r"tensor 'x' would have 1e\+18 elements"):
        load(small(models, node("Relu", ["x"], ["y"]), x=("N", 10**9, 10**9)))


@pytest.mark.parametrize("op", ["ConstantOfShape", "Expand", "Tile"])
def test_few_bytes_that_grow(models: Models, load: Loader, op: str) -> None:
    huge = np.array([1 << 20, 1 << 20], np.int64)
    inputs = ["k"] if op == "ConstantOfShape" else ["one", "k"]
    nodes = (node(op, inputs, ["big"]), node("ReduceSum", ["big"], ["s"], keepdims=0), node("Add", ["x", "s"], ["y"]))
    with pytest.raises(ModelError, match=r"'big' would have 1\.1e"):
        load(small(models, *nodes, constants={"k": huge, "one": np.ones((1, 1), np.float32)}))


def test_few_bytes_that_grow_behind_a_claim(models: Models, load: Loader) -> None:
    nodes = (node("ConstantOfShape", ["k"], ["big"]), node("ReduceSum", ["big"], ["s"], keepdims=0))
    model = small(
        models, *nodes, node("Add", ["x", "s"], ["y"]), constants={"k": np.array([1 << 20, 1 << 20], np.int64)}
    )
    model.graph.value_info.append(helper.make_tensor_value_info("big", TensorProto.FLOAT, [1]))
    with pytest.raises(ModelError, match=r"'big' would have 1\.1e"):
        load(model)


def _calls(name: str, callee: str, times: int) -> onnx.FunctionProto:
    nodes = [node(callee, ["x" if k == 0 else f"v{k}"], [f"v{k + 1}"], domain="bomb") for k in range(times - 1)]
    nodes.append(node(callee, [f"v{times - 1}"], ["y"], domain="bomb"))
    return helper.make_function("bomb", name, ["x"], ["y"], nodes, [helper.make_opsetid("bomb", 1)])


def test_functions_that_double_and_double(models: Models, load: Loader) -> None:
    last = helper.make_function("bomb", "f0", ["x"], ["y"], [node("Relu", ["x"], ["y"])], [helper.make_opsetid("", 17)])
    functions = [last, *(_calls(f"f{k + 1}", f"f{k}", 4) for k in range(12))]
    model = models.make(
        [node("f12", ["x"], ["y"], domain="bomb")], {"x": [4]}, ["y"], domains={"bomb": 1}, functions=functions
    )
    with pytest.raises(ModelError, match=r"functions expand to \d+ nodes"):
        load(model)


def test_function_that_calls_itself(models: Models, load: Loader) -> None:
    model = models.make(
        [node("f", ["x"], ["y"], domain="bomb")],
        {"x": [4]},
        ["y"],
        domains={"bomb": 1},
        functions=[_calls("f", "f", 2)],
    )
    with pytest.raises(ModelError, match="'f' calls itself"):
        load(model)


def test_graphs_within_graphs(models: Models, load: Loader) -> None:
    def nested(depth: int) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"o{depth}", TensorProto.FLOAT, None)
        inner = (
            node("If", ["c"], [f"o{depth}"], then_branch=nested(depth - 1), else_branch=nested(0))
            if depth
            else node("Relu", ["x"], [f"o{depth}"])
        )
        return helper.make_graph([inner], "g", [], [out])

    fork = node("If", ["c"], ["y"], then_branch=nested(20), else_branch=nested(0))
    model = small(models, fork, constants={"c": np.array(True)})
    with pytest.raises(ModelError, match="subgraphs lie more than 16 deep"):
        load(model)


def test_more_subgraphs_than_anybody_writes(models: Models, load: Loader) -> None:
    """Twelve deep they are 4,094 already; each takes time."""
    names = itertools.count()

    def forked(depth: int) -> onnx.GraphProto:
        name = f"o{next(names)}"
        inner = node("Relu", ["x"], [name])
        if depth:
            inner = node("If", ["c"], [name], then_branch=forked(depth - 1), else_branch=forked(depth - 1))
        return helper.make_graph([inner], "g", [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])

    fork = node("If", ["c"], ["y"], then_branch=forked(11), else_branch=forked(11))
    with pytest.raises(ModelError, match="8,190 subgraphs"):
        load(small(models, fork, constants={"c": np.array(True)}))


def _loop(*nodes: Any, weights: Any = ()) -> Any:
    """A Loop over x whose body makes "c2", whether to go on, and "v2"."""
    types = {"i": (TensorProto.INT64, []), "c": (TensorProto.BOOL, []), "v": (TensorProto.FLOAT, [4])}
    ends = {k: helper.make_tensor_value_info(k, t, d) for k, (t, d) in types.items()}
    outs = [helper.make_tensor_value_info(f"{k}2", *types[k]) for k in ("c", "v")]
    body = helper.make_graph([*nodes, node("Exp", ["v"], ["v2"])], "body", list(ends.values()), outs, weights)
    return node("Loop", ["m", "t", "x"], ["y"], body=body)


ENDLESS_TENSOR = numpy_helper.from_array(np.array(True))
ENDLESS = {"m": np.array((1 << 63) - 1), "t": np.array(True)}


def test_loop_without_end(models: Models, load: Loader) -> None:
    with pytest.raises(ModelError, match="turns over a million times"):
        load(small(models, _loop(node("Identity", ["c"], ["c2"])), constants=ENDLESS))


def test_loop_without_end_by_a_constant_node(models: Models, load: Loader) -> None:
    turns = node("Constant", [], ["m"], value_int=(1 << 63) - 1)
    with pytest.raises(ModelError, match="turns over a million times"):
        load(small(models, turns, _loop(node("Identity", ["c"], ["c2"])), constants={"t": np.array(True)}))


def test_loop_without_end_behind_an_identity(models: Models, load: Loader) -> None:
    turns = node("Identity", ["k"], ["m"])
    constants = {"t": np.array(True), "k": np.array(1 << 40)}
    with pytest.raises(ModelError, match="turns over a million times"):
        load(small(models, turns, _loop(node("Identity", ["c"], ["c2"])), constants=constants))


def test_loop_without_any_end(models: Models, load: Loader) -> None:
    loop = _loop(node("Identity", ["c"], ["c2"]))
    loop.input[0] = ""
    with pytest.raises(ModelError, match="turns over a million times"):
        load(small(models, loop, constants={"t": np.array(True)}))


def test_loops_within_a_loop(models: Models, load: Loader) -> None:
    """Two thousand turns each, four million together; the number comes from the graph around."""
    inner = _loop(node("Identity", ["c"], ["c2"]))
    inner.input[2], inner.output[0] = "v", "w"
    outer = _loop(node("Identity", ["c"], ["c2"]), inner)
    constants = {"m": np.array(2000), "t": np.array(True)}
    with pytest.raises(ModelError, match="turns over a million times"):
        load(small(models, outer, constants=constants))
    assert load(small(models, outer, constants=constants | {"m": np.array(200)})).graph.node


def test_loop_without_end_in_a_function(models: Models, load: Loader) -> None:
    body = [node("Constant", [], ["m"], value_int=1 << 40), node("Constant", [], ["t"], value=ENDLESS_TENSOR)]
    loop = _loop(node("Identity", ["c"], ["c2"]))
    function = helper.make_function("bomb", "f", ["x"], ["y"], [*body, loop], [helper.make_opsetid("", 17)])
    model = models.make(
        [node("f", ["x"], ["y"], domain="bomb")], {"x": [4]}, ["y"], domains={"bomb": 1}, functions=[function]
    )
    with pytest.raises(ModelError, match="turns over a million times"):
        load(model)


def test_loop_that_a_condition_ends(models: Models, load: Loader) -> None:
    """How exporters write `while`: as many turns as there can be."""
    three = numpy_helper.from_array(np.array(3), "three")
    model = small(models, _loop(node("Less", ["i", "three"], ["c2"]), weights=[three]), constants=ENDLESS)
    assert load(model).graph.node[0].op_type == "Loop"


def test_minus_one_is_an_open_size(models: Models, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(small(models, node("Relu", ["x"], ["y"]), x=(-1, 4)).SerializeToString())
    assert import_file(tmp_path / "m.onnx").meta["info"].inputs[0].shape[1] == 4


def test_sparse_weights_are_refused_by_name(models: Models, load: Loader) -> None:
    model = small(models, node("Add", ["x", "w"], ["y"]))
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([2]), "at"), [4])
    )
    with pytest.raises(ModelError, match="holds sparse weights"):
        load(model)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "link"])
def test_external_data_stays_in_the_folder(models: Models, tmp_path: Path, location: str) -> None:
    """Nothing outside the model's folder is read, links out of it included."""
    (tmp_path / "secret").write_bytes(bytes(16))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    model = small(models, node("Add", ["x", "w"], ["y"]), constants={"w": np.zeros(4, np.float32)})
    external_data_helper.set_external_data(model.graph.initializer[0], location)
    model.graph.initializer[0].ClearField("raw_data")
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"model\.onnx"):
        load_onnx(folder / "model.onnx")


def test_external_data_deep_in_a_function(models: Models, tmp_path: Path) -> None:
    """onnx 1.23 does not look for weights there."""
    weight = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    external_data_helper.set_external_data(weight, "/etc/hostname")
    weight.ClearField("raw_data")
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    branch = helper.make_graph([node("Add", ["x", "w"], ["o"])], "g", [], [out], [weight])
    fork = node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    truth = node("Constant", [], ["c"], value=ENDLESS_TENSOR)
    function = helper.make_function("f", "f", ["x"], ["y"], [truth, fork], [helper.make_opsetid("", 17)])
    model = models.make(
        [node("f", ["x"], ["y"], domain="f")], {"x": [4]}, ["y"], domains={"f": 1}, functions=[function]
    )
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"model\.onnx.*(another file|w)"):
        load_onnx(tmp_path / "model.onnx")


def test_external_data_in_the_folder(models: Models, tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float32)
    model = small(models, node("Add", ["x", "w"], ["y"]), constants={"w": values})
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").is_file()
    loaded = load_onnx(tmp_path / "model.onnx")
    assert np.array_equal(numpy_helper.to_array(loaded.graph.initializer[0]), values)
    assert len(list(import_file(tmp_path / "model.onnx").graph.nodes)) > 0


def test_an_input_left_out_at_the_end(models: Models, load: Loader) -> None:
    """Valid, and ONNX Runtime 1.31 crashes on it."""
    constants = {"s": np.ones(4, np.float32)}
    model = load(small(models, node("LayerNormalization", ["x", "s", ""], ["y"]), constants=constants))
    assert list(model.graph.node[0].input) == ["x", "s"]
