"""Random small CNNs made of leaves: trace → emit → import → the same values, also after normalising."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hantc.dialect.activation import activation
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Add, Mul
from hantc.dialect.emitter import emit, opaque_leaves
from hantc.dialect.graph import module_macs, trace
from hantc.dialect.importer import import_model
from hantc.dialect.leaf import Leaf
from hantc.dialect.linear import Linear
from hantc.dialect.norm import BatchNorm
from hantc.dialect.pool import GlobalPool, Pool, Reduce
from hantc.dialect.rewrites.normalize import normalize
from hantc.dialect.shape import Concat, Flatten, Pad, Reshape, Transpose

if TYPE_CHECKING:
    from tests.dialect.conftest import Models

ACTIVATIONS = ("relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "leakyrelu")
SIZE = 8


class Residual(nn.Module):
    """x + body(x), joined by another leaf where asked for."""

    def __init__(self, body: nn.Module, join: str) -> None:
        super().__init__()
        self.body = body
        joins: dict[str, Leaf] = {"add": Add(), "mul": Mul(), "concat": Concat(1, 2)}
        self.join = joins[join]

    def forward(self, x: Tensor) -> Tensor:
        joined: Tensor = self.join(x, self.body(x))
        return joined


def _norm(channels: int) -> BatchNorm:
    norm = BatchNorm(channels)
    for value in (norm.weight.data, norm.bias.data, norm.running_mean):
        value.normal_()
    norm.running_var.uniform_(0.3, 2)
    return norm


@st.composite
def convs(draw: st.DrawFn, channels: int, size: int) -> tuple[nn.Module, int, int]:
    """One convolution; returns it with its output's channels and size."""
    kernel = draw(st.sampled_from([k for k in (1, 2, 3, 5) if k <= size]))
    stride = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
    out = groups * draw(st.integers(1, 3))
    dilation = draw(st.integers(1, 2)) if (kernel - 1) * 2 + 1 <= size else 1
    pads = draw(st.lists(st.integers(0, kernel - 1), min_size=4, max_size=4))
    bias = draw(st.booleans())
    conv = Conv(channels, out, kernel, stride, groups=groups, bias=bias, dilation=dilation, pads=pads)
    if conv.bias is not None:
        nn.init.normal_(conv.bias)
    sizes = [(size + pads[i] + pads[i + 2] - dilation * (kernel - 1) - 1) // stride + 1 for i in (0, 1)]
    return (conv, out, sizes[0]) if sizes[0] == sizes[1] else (Conv(channels, out, bias=bias), out, size)


@st.composite
def layers(draw: st.DrawFn, channels: int, size: int) -> tuple[nn.Module, int, int]:
    """One layer that keeps maps square."""
    kind = draw(st.sampled_from(["conv", "conv", "norm", "act", "pool", "pad", "block", "transpose"]))
    if kind == "conv":
        return draw(convs(channels, size))
    if kind == "norm":
        return _norm(channels), channels, size
    if kind == "pool" and size >= 4:
        op = draw(st.sampled_from(["MaxPool", "AveragePool"]))
        return Pool(op, (3, 3), (2, 2), (1, 1, 1, 1), count_include_pad=draw(st.booleans())), channels, (size + 1) // 2
    if kind == "pad" and size < 10:
        mode = draw(st.sampled_from(["constant", "edge"]))
        return Pad((0, 0, 1, 0, 0, 0, 0, 1), mode), channels, size + 1
    if kind == "block" and channels < 16:
        inner = nn.Sequential(Conv(channels, channels, 3), activation(draw(st.sampled_from(ACTIVATIONS))))
        join = draw(st.sampled_from(["add", "mul", "concat"]))
        return Residual(inner, join), channels * (2 if join == "concat" else 1), size
    if kind == "transpose":
        perm = draw(st.sampled_from([(0, 2, 3, 1), (0, 1, 3, 2)]))
        back = [perm.index(i) for i in range(4)]
        return nn.Sequential(Transpose(perm), Transpose(back)), channels, size
    return activation(draw(st.sampled_from(ACTIVATIONS))), channels, size


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, int]:
    """A network for (N, 3, SIZE, SIZE) images, and its number of outputs."""
    channels, size = 3, SIZE
    body: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 6))):
        layer, channels, size = draw(layers(channels, size))
        body.append(layer)
    heads: dict[str, list[Leaf]] = {
        "global": [GlobalPool(), Flatten()],
        "mean": [Reduce("ReduceMean", (2, 3), keepdims=False)],
        "max": [GlobalPool("GlobalMaxPool"), Reshape((channels,), keep_batch=True)],
    }
    body += heads[draw(st.sampled_from(sorted(heads)))]
    outputs = draw(st.integers(1, 4))
    body.append(Linear(channels, outputs, bias=draw(st.booleans()), gemm=draw(st.booleans())))
    return nn.Sequential(*body).eval(), outputs


def _close(wanted: Tensor, got: Tensor) -> bool:
    return wanted.shape == got.shape and float((wanted - got).abs().max()) <= 1e-4 * max(1.0, float(wanted.abs().max()))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(drawn=networks(), seed=st.integers(0, 2**31), batch=st.integers(1, 3))
def test_random_networks(models: Models, drawn: tuple[nn.Module, int], seed: int, batch: int) -> None:
    network, outputs = drawn
    module = trace(network, (3, SIZE, SIZE), (outputs,))
    emitted = emit(module).model
    onnx.checker.check_model(emitted, full_check=True)
    x = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    again = import_model(emitted)
    made, applied, _ = normalize(again)
    with torch.no_grad():
        wanted = network(x)
        assert _close(wanted, again(x)), "imported"
        assert _close(wanted, made(x)), f"normalised: {[a.note for a in applied]}"
    assert opaque_leaves(again) == []
    assert module_macs(again, (3, SIZE, SIZE)) == module_macs(module, (3, SIZE, SIZE))
    models.trip(emitted, batch=batch)
