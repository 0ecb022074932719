"""Files that take the same time share a digest, and no others do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from hantc.dialect.alike import work_digest


def net(seed: int = 0, prefix: str = "", width: int = 12, upper: float = 6.0, stride: int = 1) -> ModelProto:
    """Conv, Clip, Reshape."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray[Any, Any]] = {
        "w": rng.standard_normal((width, 3, 3, 3)).astype(np.float32),
        "b": rng.standard_normal(width).astype(np.float32),
        "low": np.array(0.0, dtype=np.float32),
        "high": np.array(upper, dtype=np.float32),
        "shape": np.array([0, -1], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1] * 4, strides=[stride] * 2),
        helper.make_node("Clip", ["c", "low", "high"], ["r"]),
        helper.make_node("Reshape", ["r", "shape"], ["y"]),
    ]
    for node in nodes:
        node.name = prefix + node.op_type
        node.input[:] = [prefix + n for n in node.input]
        node.output[:] = [prefix + n for n in node.output]
    x = helper.make_tensor_value_info(prefix + "x", TensorProto.FLOAT, ["N", 3, 8, 8])
    y = helper.make_tensor_value_info(prefix + "y", TensorProto.FLOAT, ["N", None])
    inits = [numpy_helper.from_array(v, prefix + k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, prefix + "graph", [x], [y], inits)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def wider(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 9


def halved(model: ModelProto) -> None:
    w = numpy_helper.to_array(model.graph.initializer[0]).astype(np.float16)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(w, "w"))


def reshaped(model: ModelProto) -> None:
    model.graph.initializer[4].CopyFrom(numpy_helper.from_array(np.array([-1, 4], dtype=np.int64), "shape"))


def turned(model: ModelProto) -> None:
    model.graph.node[1].input[1], model.graph.node[1].input[2] = "high", "low"


def without_bias(model: ModelProto) -> None:
    del model.graph.node[0].input[2]


def newer(model: ModelProto) -> None:
    model.opset_import[0].version = 18


def elsewhere(model: ModelProto) -> None:
    model.graph.node[1].domain = "com.example"


def unary(model: ModelProto) -> None:
    del model.graph.node[1].input[1:]
    model.graph.node[1].op_type = "Relu"


def shared(model: ModelProto) -> None:
    model.graph.node[0].input[2] = "low"


def longer(model: ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))


def test_names_and_values_of_weights_do_not_count() -> None:
    assert work_digest(net(1, "block7/")) == work_digest(net(0))
    assert work_digest(net(1, width=4)) == work_digest(net(0, width=4)), "four biases are weights too"
    shuffled = net()
    weights = list(shuffled.graph.initializer)[::-1]
    del shuffled.graph.initializer[:]
    shuffled.graph.initializer.extend(weights)
    assert work_digest(shuffled) == work_digest(net())


@pytest.mark.parametrize(
    "change",
    [wider, halved, reshaped, turned, without_bias, newer, elsewhere, unary, shared, longer],
    ids=lambda f: f.__name__,
)
def test_what_changes_the_work_counts(change: Callable[[ModelProto], None]) -> None:
    other = net()
    change(other)
    assert work_digest(other) != work_digest(net())


@pytest.mark.parametrize("other", [{"width": 13}, {"upper": 1.0}, {"stride": 2}])
def test_settings_count(other: dict[str, int]) -> None:
    assert work_digest(net(**other)) != work_digest(net())  # type: ignore[arg-type]


def test_a_value_counts_whoever_reads_it_first() -> None:
    def clipped(bound: float) -> ModelProto:
        made = net(width=1)
        made.graph.node[0].input[2] = "high"
        made.graph.initializer[3].CopyFrom(numpy_helper.from_array(np.array([bound], dtype=np.float32), "high"))
        return made

    assert work_digest(clipped(6.0)) != work_digest(clipped(1.0))


def test_text_and_work_that_hangs_on_values_have_their_own() -> None:
    def found(seed: int, kind: str) -> ModelProto:
        made = net(seed)
        made.graph.node.append(helper.make_node(kind, ["c"], ["found"]))
        return made

    assert work_digest(found(0, "NonZero")) != work_digest(found(1, "NonZero"))
    assert work_digest(found(0, "Relu")) == work_digest(found(1, "Relu"))

    def texts(*words: str) -> ModelProto:
        made = net()
        made.graph.initializer.append(numpy_helper.from_array(np.array(words, dtype=object), "t"))
        made.graph.node.append(helper.make_node("Identity", ["t"], ["u"]))
        return made

    assert work_digest(texts("a", "b")) == work_digest(texts("a", "b")) != work_digest(texts("a", "c"))


def test_the_same_tensor_twice_is_not_two() -> None:
    def total(names: list[str]) -> ModelProto:
        x = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in ("a", "b")]
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
        return helper.make_model(helper.make_graph([helper.make_node("Add", names, ["y"])], "g", x, [y]))

    assert work_digest(total(["a", "a"])) != work_digest(total(["a", "b"]))


def test_files_with_subgraphs_and_functions_have_their_own() -> None:
    def branched(value: float) -> ModelProto:
        def branch(v: float) -> onnx.GraphProto:
            out = helper.make_tensor_value_info("o", TensorProto.FLOAT, [1])
            node = helper.make_node(
                "Constant", [], ["o"], value=numpy_helper.from_array(np.array([v], dtype=np.float32))
            )
            return helper.make_graph([node], "branch", [], [out])

        c = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch(value), else_branch=branch(0.0))
        return helper.make_model(helper.make_graph([node], "g", [c], [y]))

    assert work_digest(branched(1.0)) == work_digest(branched(1.0)) != work_digest(branched(2.0))
    made = net()
    made.functions.append(helper.make_function("d", "F", ["a"], ["b"], [], [helper.make_opsetid("", 17)]))
    assert work_digest(made) != work_digest(net())
