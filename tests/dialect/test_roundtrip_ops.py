"""Every operator family, at the opsets where its form changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import NodeProto, TensorProto, helper

if TYPE_CHECKING:
    from tests.dialect.conftest import Array, Models


def _newest_opset() -> int:
    """The newest opset that both onnx and onnxruntime here know."""
    for opset in range(onnx.defs.onnx_opset_version(), 20, -1):
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y")]
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", ends[:1], ends[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        try:
            ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        except Exception:  # onnxruntime raises several unrelated types
            continue
        return opset
    return 20


OPSETS = sorted({7, 9, 11, 13, 15, 17, 18, 20, _newest_opset()})
IMAGE = ("N", 4, 8, 8)


@dataclass(frozen=True)
class Case:
    """Nodes from "x" (and "z") to "y"."""

    nodes: Sequence[NodeProto]
    constants: Mapping[str, Any] = field(default_factory=dict)
    x: Sequence[int | str] = IMAGE
    z: Sequence[int | str] | None = None
    since: int = 7
    native: bool = True
    positive: bool = False
    out_dtype: int | None = None


def node(op: str, inputs: Sequence[str] = ("x",), outputs: Sequence[str] = ("y",), **attrs: Any) -> NodeProto:
    return helper.make_node(op, list(inputs), list(outputs), **attrs)


def _w(*shape: int, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.4).astype(np.float32)


def _ints(*values: int) -> Array:
    return np.array(values, np.int64)


def _conv(**attrs: Any) -> Callable[[int], Case]:
    def build(opset: int) -> Case:
        groups = int(attrs.get("group", 1))
        return Case(
            [node("Conv", ["x", "w", "b"], **attrs)],
            {"w": _w(6 if groups == 1 else 4, 4 // groups, 3, 3), "b": _w(6 if groups == 1 else 4)},
        )

    return build


def _with_axes(op: str, axes: list[int], since: int, **attrs: Any) -> Callable[[int], Case]:
    """An op whose axes moved from an attribute to an input at opset `since`."""

    def build(opset: int) -> Case:
        x = ("N", 4, 1, 1) if op == "Squeeze" else IMAGE
        if opset >= since:
            return Case([node(op, ["x", "axes"], **attrs)], {"axes": _ints(*axes)}, x=x)
        return Case([node(op, axes=axes, **attrs)], x=x)

    return build


def _clip(low: float | None, high: float | None) -> Callable[[int], Case]:
    def build(opset: int) -> Case:
        if opset < 11:
            attrs: dict[str, Any] = {k: v for k, v in (("min", low), ("max", high)) if v is not None}
            return Case([node("Clip", **attrs)])
        constants = {k: np.float32(v) for k, v in (("low", low), ("high", high)) if v is not None}
        names = ["x", "low" if low is not None else "", *(["high"] if high is not None else [])]
        return Case([node("Clip", names)], constants)

    return build


def _pad(mode: str, pads: list[int], value: float | None = None) -> Callable[[int], Case]:
    def build(opset: int) -> Case:
        if opset < 11:
            attrs: dict[str, Any] = {"value": value} if value is not None else {}
            return Case([node("Pad", mode=mode, pads=pads, **attrs)])
        constants: dict[str, Any] = {"pads": _ints(*pads)}
        names = ["x", "pads"]
        if value is not None:
            constants["value"] = np.float32(value)
            names.append("value")
        return Case([node("Pad", names, mode=mode)], constants)

    return build


def _slice(opset: int) -> Case:
    if opset < 10:
        return Case([node("Slice", starts=[1, 0], ends=[-1, 5], axes=[2, 3])])
    constants = {"s": _ints(1, 0), "e": _ints(-1, 2**62), "a": _ints(2, -1), "t": _ints(1, 2)}
    return Case([node("Slice", ["x", "s", "e", "a", "t"])], constants)


def _gemm(opset: int) -> Case:
    constants = {"w": _w(4, 3), "b": _w(1, 3)}
    return Case([node("Gemm", ["x", "w", "b"], alpha=0.5, beta=2.0)], constants, x=("N", 4))


def _gemm_transposed(opset: int) -> Case:
    return Case([node("Gemm", ["x", "w", "b"], transB=1)], {"w": _w(3, 4), "b": _w(3)}, x=("N", 4))


def _norm(opset: int) -> Case:
    constants = {"s": _w(4), "b": _w(4), "m": _w(4), "v": np.abs(_w(4)) + 0.5}
    return Case([node("BatchNormalization", ["x", "s", "b", "m", "v"], epsilon=1e-3)], constants)


def _dropout(opset: int) -> Case:
    if opset < 12:
        return Case([node("Dropout", outputs=["d", "mask"], ratio=0.3), node("Relu", ["d"])])
    return Case(
        [node("Dropout", ["x", "r", "t"], ["d"]), node("Relu", ["d"])], {"r": np.float32(0.3), "t": np.array(False)}
    )


def _binary(op: str, *, reverse: bool = False) -> Callable[[int], Case]:
    def build(opset: int) -> Case:
        constant = np.abs(_w(4, 1, 1)) + 0.5
        return Case([node(op, ["c", "x"] if reverse else ["x", "c"])], {"c": constant}, positive=op == "Pow")

    return build


def _unary(op: str, since: int = 7) -> Callable[[int], Case]:
    return lambda opset: Case([node(op)], since=since, positive=op in ("Log", "Sqrt", "Reciprocal"))


def _simple(
    op: str, since: int = 7, native: bool = True, x: Sequence[int | str] = IMAGE, **attrs: Any
) -> Callable[[int], Case]:
    return lambda opset: Case([node(op, **attrs)], since=since, native=native, x=x)


def _constant_node(opset: int) -> Case:
    value = helper.make_tensor("v", TensorProto.FLOAT, [4, 1, 1], [1.0, 2.0, 3.0, 4.0])
    return Case([node("Constant", [], ["c"], value=value), node("Mul", ["x", "c"])])


CASES: dict[str, Callable[[int], Case]] = {
    "conv": _conv(),
    "conv_geometry": _conv(strides=[2, 1], pads=[1, 0, 2, 1], dilations=[1, 2]),
    "conv_groups": _conv(group=4, pads=[1, 1, 1, 1]),
    "conv_same_upper": _conv(auto_pad="SAME_UPPER", strides=[2, 2]),
    "conv_same_lower": _conv(auto_pad="SAME_LOWER", strides=[2, 2]),
    "conv_valid": _conv(auto_pad="VALID"),
    "conv_1d": lambda o: Case([node("Conv", ["x", "w"], pads=[1, 1])], {"w": _w(5, 3, 3)}, x=("N", 3, 9)),
    "conv_3d": lambda o: Case([node("Conv", ["x", "w"])], {"w": _w(2, 1, 3, 3, 3)}, x=("N", 1, 5, 5, 5)),
    "batch_norm": _norm,
    "gemm": _gemm,
    "gemm_transposed": _gemm_transposed,
    "gemm_no_bias": lambda o: Case([node("Gemm", ["x", "w"])], {"w": _w(4, 3)}, x=("N", 4), since=11),
    "matmul_weight": lambda o: Case([node("MatMul", ["x", "w"])], {"w": _w(8, 3)}),
    "matmul_weight_left": lambda o: Case([node("MatMul", ["w", "x"])], {"w": _w(3, 8)}),
    "matmul": lambda o: Case([node("MatMul", ["x", "z"])], z=("N", 4, 8, 3)),
    "add": _binary("Add"),
    "sub_reverse": _binary("Sub", reverse=True),
    "mul": _binary("Mul"),
    "div": _binary("Div"),
    "pow": _binary("Pow"),
    "add_broadcast": lambda o: Case([node("Add", ["x", "z"])], z=("N", 4, 1, 1)),
    "square": lambda o: Case([node("Mul", ["x", "x"])]),
    "relu": _unary("Relu"),
    "sigmoid": _unary("Sigmoid"),
    "tanh": _unary("Tanh"),
    "softplus": _unary("Softplus"),
    "softsign": _unary("Softsign"),
    "erf": _unary("Erf", 9),
    "exp": _unary("Exp"),
    "log": _unary("Log"),
    "sqrt": _unary("Sqrt"),
    "reciprocal": _unary("Reciprocal"),
    "neg": _unary("Neg"),
    "abs": _unary("Abs"),
    "floor": _unary("Floor"),
    "ceil": _unary("Ceil"),
    "clip": _clip(0.0, 6.0),
    "clip_low": _clip(-0.5, None),
    "clip_high": _clip(None, 0.5),
    "hard_sigmoid": _simple("HardSigmoid", alpha=0.3, beta=0.4),
    "hard_sigmoid_default": _simple("HardSigmoid"),
    "hard_swish": _simple("HardSwish", 14),
    "leaky_relu": _simple("LeakyRelu", alpha=0.2),
    "softmax_last": _simple("Softmax", x=("N", 6), axis=1),
    "softmax_default": _simple("Softmax", x=("N", 6)),
    "softmax_negative": _simple("Softmax", 11, axis=-1),
    "softmax_channels": _simple("Softmax", axis=1),
    "max_pool": _simple("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 0, 1, 1]),
    "max_pool_dilated": _simple("MaxPool", 10, kernel_shape=[3, 3], dilations=[2, 1]),
    "max_pool_ceil": _simple("MaxPool", 10, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "max_pool_same": _simple("MaxPool", kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
    "max_pool_1d": _simple("MaxPool", x=("N", 2, 9), kernel_shape=[3]),
    "average_pool": _simple("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "average_pool_padded": _simple("AveragePool", kernel_shape=[3, 2], pads=[1, 0, 2, 1], count_include_pad=1),
    "average_pool_ceil": _simple("AveragePool", 10, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "global_average_pool": _simple("GlobalAveragePool"),
    "global_max_pool": _simple("GlobalMaxPool"),
    "reduce_mean": _with_axes("ReduceMean", [2, 3], 18),
    "reduce_mean_dropped": _with_axes("ReduceMean", [3], 18, keepdims=0),
    "reduce_max": _with_axes("ReduceMax", [1], 18),
    "reduce_min": _with_axes("ReduceMin", [2], 18, keepdims=0),
    "reduce_sum": _with_axes("ReduceSum", [1, 3], 13),
    "reduce_mean_all": _simple("ReduceMean", keepdims=0),
    "reshape": lambda o: Case([node("Reshape", ["x", "s"])], {"s": _ints(0, -1)}),
    "reshape_inferred_batch": lambda o: Case([node("Reshape", ["x", "s"])], {"s": _ints(-1, 16, 16)}),
    "reshape_into_batch": lambda o: Case([node("Reshape", ["x", "s"])], {"s": _ints(-1, 8)}),
    "flatten": _simple("Flatten"),
    "flatten_2": _simple("Flatten", axis=2),
    "flatten_0": _simple("Flatten", axis=0),
    "flatten_negative": _simple("Flatten", 11, axis=-1),
    "transpose": _simple("Transpose", perm=[0, 2, 3, 1]),
    "transpose_default": _simple("Transpose"),
    "squeeze": _with_axes("Squeeze", [2, 3], 13),
    "unsqueeze": _with_axes("Unsqueeze", [1, 4], 13),
    "pad": _pad("constant", [0, 0, 1, 2, 0, 0, 0, 1]),
    "pad_value": _pad("constant", [0, 1, 1, 2, 0, 0, 0, 1], 1.5),
    "pad_negative": _pad("constant", [0, 0, -1, 0, 0, 0, 0, -2]),
    "pad_reflect": _pad("reflect", [0, 0, 0, 2, 0, 0, 0, 1]),
    "pad_edge": _pad("edge", [0, 0, 1, 0, 0, 0, 2, 0]),
    "pad_axes": lambda o: Case(
        [node("Pad", ["x", "p", "", "a"])], {"p": _ints(1, 0, 2, 1), "a": _ints(-1, 2)}, since=18
    ),
    "slice": _slice,
    "concat": lambda o: Case([node("Concat", ["x", "z", "x"], axis=1)], z=("N", 2, 8, 8)),
    "concat_constant": lambda o: Case([node("Concat", ["x", "c"], axis=3)], {"c": _w(2, 4, 8, 1)}, x=(2, 4, 8, 8)),
    "space_to_depth": _simple("SpaceToDepth", blocksize=2),
    "depth_to_space": _simple("DepthToSpace", blocksize=2),
    "depth_to_space_by_columns": _simple("DepthToSpace", 11, blocksize=2, mode="CRD"),
    "cast": lambda o: Case([node("Cast", to=TensorProto.DOUBLE)], out_dtype=TensorProto.DOUBLE),
    "cast_int": lambda o: Case([node("Cast", to=TensorProto.INT64)], out_dtype=TensorProto.INT64),
    "dropout": _dropout,
    "identity": lambda o: Case([node("Relu", outputs=["r"]), node("Identity", ["r"])]),
    "constant_node": _constant_node,
}


@pytest.mark.parametrize(
    ("name", "opset"), [(name, opset) for name in CASES for opset in OPSETS if opset >= CASES[name](opset).since]
)
def test_round_trip(models: Models, name: str, opset: int) -> None:
    case = CASES[name](opset)
    inputs = {"x": case.x} | ({"z": case.z} if case.z else {})
    model = models.make(case.nodes, inputs, ["y"], case.constants, opset=opset, out_dtype=case.out_dtype)
    given: dict[str, Any] = {"x": np.abs(models.feeds(model)["x"]) + 0.1} if case.positive else {}
    trip = models.trip(model, **given)
    assert bool(trip.opaque) != case.native, trip.opaque


def test_case_opsets_cover_the_newest() -> None:
    assert max(OPSETS) > 20
