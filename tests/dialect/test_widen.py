"""Models in FP16 become the same in FP32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from hantc.dialect.importer import import_model
from hantc.dialect.widen import is_half, widened
from tests.dialect.conftest import run_ort

if TYPE_CHECKING:
    from onnx import ModelProto

    from tests.dialect.conftest import Models


def network(models: Models, kind: int) -> ModelProto:
    """Convolution, norm, a constant and a product in FP16, with inputs and outputs of `kind`."""
    half: Any = np.float16
    casts = kind != TensorProto.FLOAT16
    nodes = [
        *([helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16)] if casts else []),
        helper.make_node("Conv", ["h" if casts else "x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]),
        helper.make_node("Constant", [], ["k"], value=helper.make_tensor("k", TensorProto.FLOAT16, [], [0.5])),
        helper.make_node("Mul", ["n", "k"], ["u"]),
        helper.make_node("GlobalAveragePool", ["u"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "g"], ["z" if casts else "y"]),
        *([helper.make_node("Cast", ["z"], ["y"], to=TensorProto.FLOAT)] if casts else []),
    ]
    rng = np.random.default_rng(0)
    constants = {"w": rng.standard_normal((4, 3, 3, 3)).astype(half), "g": rng.standard_normal((4, 2)).astype(half)}
    constants |= {k: (abs(rng.standard_normal(4)) + 0.5).astype(half) for k in "sbmv"}
    model = models.make(nodes, {"x": ("N", 3, 6, 6)}, ["y"], constants)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    return model


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16], ids=["FP32 border", "FP16 border"])
def test_the_same_in_fp32(models: Models, kind: int) -> None:
    given = network(models, kind)
    made = widened(given)
    assert is_half(given) and not is_half(made)
    assert [v.type.tensor_type.elem_type for v in (*made.graph.input, *made.graph.output)] == [kind] * 2
    x = np.random.default_rng(1).standard_normal((2, 3, 6, 6)).astype(helper.tensor_dtype_to_np_dtype(kind))
    wanted, found = (run_ort(m, {"x": x})[0] for m in (given, made))
    assert found.dtype == wanted.dtype and np.allclose(found, wanted, rtol=1e-2, atol=1e-2)
    inside = import_model(made)
    assert {str(p.dtype) for p in inside.parameters()} == {"torch.float32"}


def test_graphs_within(models: Models) -> None:
    """What branches read from outside has its new name there too."""
    out = helper.make_tensor_value_info("t", TensorProto.FLOAT16, None)
    then, other = (helper.make_graph([helper.make_node(op, ["x"], ["t"])], op, [], [out]) for op in ("Relu", "Neg"))
    fork = helper.make_node("If", ["c"], ["i"], then_branch=then, else_branch=other)
    nodes = [fork, helper.make_node("Mul", ["i", "k"], ["y"])]
    constants = {"c": np.array(True), "k": np.full(3, 0.25, np.float16)}
    given = models.make(nodes, {"x": ("N", 3)}, ["y"], constants)
    for value in (*given.graph.input, *given.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    x = {"x": np.array([[1, -2, 3]], np.float16)}
    assert np.array_equal(run_ort(widened(given), x)[0], run_ort(given, x)[0])


def test_single_numbers_do_not_make_a_model_half(models: Models) -> None:
    nodes = [helper.make_node("Cast", ["k"], ["q"], to=1), helper.make_node("Mul", ["x", "q"], ["y"])]
    assert not is_half(models.make(nodes, {"x": ("N", 3)}, ["y"], {"k": np.array(0.5, np.float16)}))
