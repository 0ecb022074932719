"""Corrected biases of quantised products: images' channel means are the float model's, in the median."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hantc.core.errors import HantcError
from hantc.dialect import qdq_bias
from hantc.dialect.qdq import QuantSpec, quantize
from hantc.dialect.qdq_bias import correct_biases
from tests.dialect.test_qdq import SPEC, SYMMETRIC, Array, Net, cnn, feeds, relative_error, run

SPECS = [SPEC, QuantSpec(True, per_channel=False), SYMMETRIC]


def outputs(model: onnx.ModelProto) -> Array:
    """First output over all feeds."""
    return np.concatenate([run(model, f)[0] for f in feeds()])


def shift(model: onnx.ModelProto, int8: onnx.ModelProto) -> float:
    """How far outputs are from the float model's in the median of all images, relative to their size."""
    got, want = (outputs(m).astype(np.float64) for m in (int8, model))
    return float(np.linalg.norm(np.median(got - want, axis=0)) / np.linalg.norm(want.mean(axis=0)))


def biases(model: onnx.ModelProto) -> dict[str, Array]:
    """What quantised products add, by node, as the file has it."""
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    makers = {o: n for n in model.graph.node for o in n.output}
    found = {}
    for n in model.graph.node:
        if n.op_type in ("Conv", "Gemm") and len(n.input) > 2:
            name = n.input[2]
            found[n.name] = constants[makers[name].input[0] if name in makers else name]
    return found


@pytest.mark.parametrize("opset", [14, 17, 18, 21])
@pytest.mark.parametrize("spec", SPECS)
def test_the_middle_becomes_that_of_the_floats(opset: int, spec: QuantSpec) -> None:
    model = cnn(opset)
    int8, fixed = (quantize(model, None, feeds(), spec) for _ in range(2))
    correct_biases(model, fixed, feeds())
    onnx.checker.check_model(fixed)
    assert shift(model, fixed) < 1e-3 < shift(model, int8)  # the last product's result is in floats
    assert relative_error(outputs(fixed), outputs(model)) < 0.9 * relative_error(outputs(int8), outputs(model))


def test_a_deep_network_is_corrected_throughout() -> None:
    n = Net()
    x = "x"
    for k in range(45):
        x = n.node("Relu", [n.conv(x, f"conv{k}")], f"relu{k}")
    x = n.node("Flatten", [n.node("GlobalAveragePool", [x], "gap")], "flat")
    n.node("Gemm", [x, n.const("w", n.rng.standard_normal((8, 3))), n.const("b", np.ones(3))], "y")
    model = n.model(("y", ["N", 3]))
    int8, fixed = (quantize(model, None, feeds(), SPEC) for _ in range(2))
    correct_biases(model, fixed, feeds())
    assert shift(model, fixed) < 0.8 * shift(model, int8)


def test_what_few_images_lose_is_theirs() -> None:
    model, usual, far = cnn(), feeds(5), feeds(1, 1)[0]
    far["x"] *= 40  # cut off by ranges that do not know it
    int8, fixed = (quantize(model, None, usual, SPEC) for _ in range(2))
    correct_biases(model, fixed, [*usual, far])
    errors = [relative_error(outputs(m), outputs(model)) for m in (fixed, int8)]
    assert errors[0] < errors[1]


def test_few_feeds_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    model, many = cnn(), feeds()
    few, first = (quantize(model, None, many, SPEC) for _ in range(2))
    monkeypatch.setattr(qdq_bias, "_MOST_BYTES", 2 * many[0]["x"].nbytes)
    correct_biases(model, few, many)
    monkeypatch.undo()
    correct_biases(model, first, many[:2])
    assert len(many) > 2 and few == first
    monkeypatch.setattr(qdq_bias, "_MOST_BYTES", 1)
    one, alone = (quantize(model, None, many, SPEC) for _ in range(2))
    correct_biases(model, one, many)
    correct_biases(model, alone, many[:1])
    assert one == alone != first


def test_only_biases_change() -> None:
    model = cnn()
    int8, fixed = (quantize(model, None, feeds(), SPEC) for _ in range(2))
    correct_biases(model, fixed, feeds())
    changed = {a.name for a, b in zip(int8.graph.initializer, fixed.graph.initializer, strict=True) if a != b}
    old, new = biases(int8), biases(fixed)
    assert old.keys() == new.keys() == {"conv1", "conv2", "conv3", "conv4", "y"}
    assert len(changed) == len(old) and all((old[n] != new[n]).any() for n in old)
    assert {n: (b.dtype, b.shape) for n, b in old.items()} == {n: (b.dtype, b.shape) for n, b in new.items()}
    del int8.graph.initializer[:], fixed.graph.initializer[:]
    assert int8 == fixed


def test_the_quantiser_does_it_where_it_is_asked_to() -> None:
    model = cnn()
    by_hand = quantize(model, None, feeds(), SPEC)
    correct_biases(model, by_hand, feeds())
    for node in model.graph.node:
        node.name = ""  # those of Convs are given by the quantiser then
    asked = quantize(model, None, feeds(), replace(SPEC, correct_biases=True))
    assert np.array_equal(outputs(asked), outputs(by_hand))


@pytest.mark.parametrize("spec", SPECS)
def test_a_bias_that_several_read_is_corrected_for_each(spec: QuantSpec) -> None:
    n = Net()
    n.node("Conv", [n.conv("x", "conv1"), "conv1.w", "conv1.b"], "conv2", pads=[1] * 4)
    n.node("Gemm", [n.node("Flatten", ["conv2"], "flat"), n.const("w", n.rng.standard_normal((1152, 3)))], "y")
    model = n.model(("y", ["N", 3]))
    fixed = quantize(model, None, feeds(), spec)
    before = biases(fixed)
    correct_biases(model, fixed, feeds())
    after = biases(fixed)
    one, two = (after[name].astype(np.float64) - before[name] for name in ("conv1", "conv2"))
    assert one.any() and two.any() and not np.array_equal(one, two)


def test_a_bias_that_floats_read_too_stays_for_them() -> None:
    n = Net()
    n.node("Add", [n.node("GlobalAveragePool", [n.conv("x", "conv1")], "gap"), n.const("one", np.ones(1))], "sum")
    n.node("Mul", ["sum", n.node("Reshape", ["conv1.b", n.const("s", [1, 8, 1, 1], np.int64)], "b")], "y")
    model = n.model(("y", ["N", 8, 1, 1]))
    for spec in SPECS:
        fixed = quantize(model, ["conv1"], feeds(), spec)
        bias = {i.name: i.raw_data for i in fixed.graph.initializer}["conv1.b"]
        correct_biases(model, fixed, feeds())
        assert bias and {i.name: i.raw_data for i in fixed.graph.initializer}["conv1.b"] == bias
        assert relative_error(outputs(fixed), outputs(model)) < 0.05


def test_a_bias_that_a_branch_reads_stays_for_it() -> None:
    n = Net()
    n.node("ReduceMax", [n.conv("x", "conv1")], "top", keepdims=0)
    n.node("Greater", ["top", n.const("zero", 0.0)], "positive")
    n.const("s", [1, 8, 1, 1], np.int64)
    branches = {}
    for op in ("Add", "Mul"):
        nodes = [helper.make_node("Reshape", ["conv1.b", "s"], ["b"]), helper.make_node(op, ["conv1", "b"], [op])]
        out = helper.make_tensor_value_info(op, TensorProto.FLOAT, None)
        branches[op] = helper.make_graph(nodes, op, [], [out])
    n.node("If", ["positive"], "y", then_branch=branches["Add"], else_branch=branches["Mul"])
    model = n.model(("y", ["N", 8, 12, 12]))
    fixed = quantize(model, ["conv1"], feeds(), SYMMETRIC)  # biases stay floats
    bias = {i.name: i.raw_data for i in fixed.graph.initializer}["conv1.b"]
    correct_biases(model, fixed, feeds())
    assert bias and {i.name: i.raw_data for i in fixed.graph.initializer}["conv1.b"] == bias


def test_products_without_a_bias_and_floats_stay() -> None:
    n = Net()
    w = n.const("w", n.rng.standard_normal((8, 8, 1, 1)))
    n.node("HardSwish", [n.node("Conv", [n.conv("x", "conv1"), w], "bare")], "y")
    model = n.model(("y", ["N", 8, 12, 12]))
    int8 = quantize(model, ["bare"], feeds(), SPEC)
    before = int8.SerializeToString(deterministic=True)
    correct_biases(model, int8, feeds())
    assert int8.SerializeToString(deterministic=True) == before


def test_channels_without_a_mean_stay_finite() -> None:
    model = cnn()
    int8 = quantize(model, None, feeds(), SPEC)
    bad = feeds(1)
    bad[0]["x"][:, 0, 0, 0] = np.nan
    before = biases(int8)
    correct_biases(model, int8, bad)
    assert all(np.array_equal(before[k], v) for k, v in biases(int8).items())


def test_feeds_that_do_not_fit_are_told() -> None:
    with pytest.raises(HantcError, match="correcting biases fails"):
        correct_biases(cnn(), quantize(cnn(), None, feeds(), SPEC), [{"nope": np.zeros(1)}])
