"""INT8 imitated in float, against what ONNX Runtime makes of the emitted QDQ file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper
from torch import Tensor, fx

from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Binary
from hantc.dialect.emitter import emit
from hantc.dialect.fakequant import (
    ActivationQuant,
    QuantizedBinary,
    QuantizedProduct,
    fake_quantize,
    observing,
    quantize_weight,
)
from hantc.dialect.importer import import_model
from hantc.dialect.linear import Linear
from hantc.dialect.qdq import QuantSpec, quantize

if TYPE_CHECKING:
    from tests.dialect.conftest import Models

Array = np.ndarray[Any, Any]


@pytest.fixture
def network(models: Models) -> fx.GraphModule:
    """Convolutions (one depthwise, one strided), a residual sum, and a linear head; no norms."""
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], pads=[1] * 4, group=8),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"]),
        helper.make_node("Add", ["c2", "r0"], ["s"]),
        helper.make_node("Conv", ["s", "w3", "b3"], ["c3"], strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["c3"], ["r3"]),
        helper.make_node("GlobalAveragePool", ["r3"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], transB=1),
    ]
    sizes: dict[str, tuple[int, ...]] = {
        "w0": (8, 3, 3, 3), "b0": (8,), "w1": (8, 1, 3, 3), "b1": (8,), "w2": (8, 8, 1, 1),
        "w3": (16, 8, 3, 3), "b3": (16,), "w4": (5, 16), "b4": (5,),
    }  # fmt: skip
    constants = {name: models.weight(*shape) for name, shape in sizes.items()}
    return import_model(models.make(nodes, {"x": ("N", 3, 10, 10)}, {"y": ("N", 5)}, constants))


def test_a_few_images_far_beyond_the_rest_do_not_blur_them() -> None:
    x = torch.randn(64, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    x[9] *= 1000.0
    quant = ActivationQuant()
    quant(x)
    quant.observing = False
    others = torch.cat([x[:9], x[10:]])
    assert float((quant(others) - others).abs().max()) < 0.03
    assert float(quant(x)[9].max()) == pytest.approx(float(quant.high), rel=0.01), "what is cut off stays at the end"


def test_windows_beside_the_images_are_taken_together() -> None:
    """(images · windows, tokens, channels): one window in an image of many is none that most images do without."""
    x = torch.randn(16, 9, 4, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 50.0
    quant = ActivationQuant()
    with observing(quant, 16):
        quant(x.flatten(0, 1))
    assert float(quant.high) == float(x.max())


def images(count: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def run(module: fx.GraphModule, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = module(x)
    return out


def run_file(model: ModelProto, x: Tensor, *, fused: bool = False) -> Tensor:
    """In float arithmetic between Q and DQ as the file is written, or in the engine's INT8 kernels, which
    saturate on machines without VNNI unless weights keep to 7 bits."""
    options, level = ort.SessionOptions(), ort.GraphOptimizationLevel
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = level.ORT_ENABLE_ALL if fused else level.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def rms(t: Tensor) -> float:
    """Root mean square."""
    return float(t.square().mean().sqrt())


def calibrated(
    network: fx.GraphModule, x: Tensor, *, reduce_range: bool = False, symmetric: bool = False, share: bool = False
) -> fx.GraphModule:
    made = fake_quantize(network, QuantSpec(reduce_range=reduce_range, symmetric=symmetric), share=share)
    with observing(made):
        run(made, x)
    return made


@pytest.mark.parametrize(("reduce_range", "symmetric"), [(False, False), (True, False), (False, True)])
def test_it_is_close_to_the_emitted_file(network: fx.GraphModule, reduce_range: bool, symmetric: bool) -> None:
    """Ranges and grids are the same; only the results of products that nothing quantised reads are rounded in the
    file and not here. Tolerance (root mean square): half of the rounding error, and 2 % of the outputs' spread."""
    x, seen = images(64, 1), images(32, 0)
    spec = QuantSpec(reduce_range=reduce_range, symmetric=symmetric)
    file = quantize(emit(network).model, None, [{"x": seen.numpy()}], spec)
    made = calibrated(network, seen, reduce_range=reduce_range, symmetric=symmetric)
    plain, mine, theirs = run(network, x), run(made, x), run_file(file, x)
    assert rms(mine - plain) > 0.002 * rms(plain), "it rounds"
    assert rms(mine - theirs) < 0.02 * float(plain.std())
    assert rms(mine - theirs) < 0.5 * rms(theirs - plain)


@pytest.mark.parametrize("reduce_range", [False, True])
def test_weights_lie_on_the_emitted_files_grid(network: fx.GraphModule, reduce_range: bool) -> None:
    """What training gets used to is what will run."""
    file = quantize(emit(network).model, None, [{"x": images().numpy()}], QuantSpec(reduce_range=reduce_range))
    stored = {i.name: numpy_helper.to_array(i) for i in file.graph.initializer}
    weights = [n for n in file.graph.node if n.op_type == "DequantizeLinear" and "weight" in n.name]
    assert len(weights) == 5
    named = dict(network.named_parameters())
    for node in weights:
        levels, scale = (torch.from_numpy(stored[i].astype(np.float32)) for i in node.input[:2])
        theirs = levels * scale.reshape(-1, *[1] * (levels.dim() - 1))
        plain = named[node.name.removesuffix("_DequantizeLinear")]
        mine = quantize_weight(plain.detach(), bits=7 if reduce_range else 8)
        assert float((mine - theirs).abs().max()) < 1e-5


def test_seven_bits_are_what_a_machine_without_vnni_computes_right(network: fx.GraphModule) -> None:
    """There, kernels that onnxruntime fuses agree with the graph's own arithmetic; elsewhere they do so anyway."""
    file = quantize(emit(network).model, None, [{"x": images().numpy()}], QuantSpec(reduce_range=True))
    x = images(16, 1)
    fused, plain = run_file(file, x, fused=True), run_file(file, x)
    assert rms(fused - plain) < 0.02 * float(plain.std())


def test_while_observing_it_is_the_network_itself(network: fx.GraphModule) -> None:
    made, x = fake_quantize(network, QuantSpec(reduce_range=False)), images()
    assert torch.equal(run(made, x), run(network, x)), "fresh ones observe"
    with observing(made):
        assert torch.equal(run(made, x), run(network, x))
    assert not torch.equal(run(made, x), run(network, x))


def test_what_is_rounded(network: fx.GraphModule) -> None:
    made = fake_quantize(network, QuantSpec(reduce_range=False))
    kinds = [type(m) for m in made.modules()]
    leaves = list(network.modules())
    assert kinds.count(QuantizedProduct) == sum(isinstance(m, (Conv, Linear)) for m in leaves) == 5
    assert kinds.count(QuantizedBinary) == sum(isinstance(m, Binary) for m in leaves) == 1
    assert not any(isinstance(m, (QuantizedProduct, QuantizedBinary)) for m in network.modules())


def test_a_copy_owns_its_weights_and_a_shared_one_does_not(network: fx.GraphModule) -> None:
    own, shared = (fake_quantize(network, QuantSpec(reduce_range=False), share=s) for s in (False, True))
    ids = {id(p) for p in network.parameters()}
    assert not ids & {id(p) for p in own.parameters()}
    assert {id(p) for p in shared.parameters()} == ids
    x = images()
    assert torch.equal(run(calibrated(network, x), x), run(calibrated(network, x, share=True), x))


def test_ranges_are_those_seen_and_hold_zero() -> None:
    quant = ActivationQuant()
    for low, high in ((1.0, 2.0), (-0.5, 3.0), (0.0, 1.0)):
        quant(torch.tensor([low, high]))
    assert (float(quant.low), float(quant.high)) == (-0.5, 3.0)
    quant.observing = False
    x = torch.linspace(-2, 5, 4001)
    y = quant(x)
    step = 3.5 / 255
    inside = (x >= -0.5) & (x <= 3.0)
    assert float((y - x)[inside].abs().max()) <= step / 2 * 1.01 + step / 2, "half a step, and where zero came to lie"
    assert float(y.min()) >= -0.5 - step
    assert float(y.max()) <= 3.0 + step
    assert len(y.unique()) <= 256
    assert float(quant(torch.zeros(1))) == 0.0, "zero stays zero, as padding needs it"


@pytest.mark.parametrize("value", [0.0, 1e-20])
def test_a_tensor_that_is_always_nothing_is_no_trouble(value: float) -> None:
    quant = ActivationQuant()
    quant(torch.full((4,), value))
    quant.observing = False
    assert torch.isfinite(quant(torch.full((4,), value))).all()


@pytest.mark.parametrize("bits", [7, 8])
def test_weights_are_symmetric_per_channel_in_their_bits(bits: int) -> None:
    weight = torch.randn(6, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    weight *= torch.tensor([1e-3, 1.0, 50.0, 1.0, 1.0, 0.0]).reshape(-1, 1, 1, 1)
    rounded = quantize_weight(weight, bits=bits)
    coarsest = 2 ** (bits - 1) - 1  # steps to a side, one more in onnxruntime's 7 bits
    for channel, plain in zip(rounded, weight, strict=True):
        largest = float(plain.abs().max())
        assert float((channel - plain).abs().max()) <= largest / coarsest / 2 * 1.001
        assert float(channel.abs().max()) == pytest.approx(largest)
        assert len(channel.unique()) <= 2 * (coarsest + 1) + 1
        assert torch.allclose(quantize_weight(-plain[None], bits=bits)[0], -channel)
    assert not rounded[5].any()
    assert len(rounded[1].unique()) > coarsest / 2


def test_a_machine_without_vnni_gets_seven_bits(network: fx.GraphModule) -> None:
    x = images()
    seven, eight = (calibrated(network, x, reduce_range=r) for r in (True, False))
    assert {m.bits for m in seven.modules() if isinstance(m, QuantizedProduct)} == {7}
    assert {m.bits for m in eight.modules() if isinstance(m, QuantizedProduct)} == {8}
    plain = run(network, x)
    assert (run(seven, x) - plain).square().mean() > (run(eight, x) - plain).square().mean()


def test_gradients_pass_the_rounding(network: fx.GraphModule) -> None:
    x = images(8)
    made = calibrated(network, images(64, 0), share=True)
    made(x).square().mean().backward()
    rounded = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    assert set(rounded) == {n for n, _ in network.named_parameters()}
    network.zero_grad()
    network(x).square().mean().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None
        cosine = torch.nn.functional.cosine_similarity(rounded[name].flatten(), p.grad.flatten(), dim=0)
        assert float(cosine) > 0.95, f"{name}: straight through, so nearly the plain network's gradient"


def test_training_through_it_lowers_the_rounded_loss(network: fx.GraphModule) -> None:
    x = images(64)
    target = run(network, x)
    student = fake_quantize(network, QuantSpec(reduce_range=True))
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * p.abs().mean() * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    with observing(student):
        run(student, x)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.mse_loss(student(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_rounding_can_be_off_without_looking_for_ranges(network: fx.GraphModule) -> None:
    made = calibrated(network, images())
    quants = [m for m in made.modules() if isinstance(m, ActivationQuant)]
    before, x = [(float(q.low), float(q.high)) for q in quants], 10 * images(16, 1)
    rounded = run(made, x)
    for q in quants:
        q.rounding = False
    assert torch.equal(run(made, x), run(network, x))
    assert [(float(q.low), float(q.high)) for q in quants] == before
    for q in quants:
        q.rounding = True
    assert torch.equal(run(made, x), rounded)
