"""Every family: shapes, training, emission, counts."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from hantc.core.types import CandidateSpec, Shape, Signature
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Add
from hantc.dialect.emitter import emit
from hantc.dialect.graph import count_params, module_macs
from hantc.dialect.norm import BatchNorm
from hantc.dialect.rewrites.normalize import normalize
from hantc.ops import registry
from hantc.ops.family import Family
from hantc.ops.layers import SKIP_GAMMA
from hantc.ops.registry import FAMILIES

SPECS = (
    CandidateSpec("identity"),
    CandidateSpec.make("cb_stack", k=1, w=0.5),
    CandidateSpec.make("cb_stack", k=5, w=2.0),
    CandidateSpec.make("cb_bottle", k=3, w=0.25),
    CandidateSpec.make("cb_bottle", k=7, w=1.0, act="hardswish"),
    CandidateSpec.make("cb_res", k=3, w=0.5),
    CandidateSpec.make("conv_cs", k=5, w=1.0),
    CandidateSpec.make("repvgg", k=3, w=1.0),
    CandidateSpec.make("efn", e=1, k=3, se=0.0),
    CandidateSpec.make("efn", e=3, k=5, se=0.25),
    CandidateSpec.make("efnv2", e=1, k=1, se=0.04),
    CandidateSpec.make("efnv2", e=3, k=3, se=0.25),
    CandidateSpec.make("tresnet", block="basic", w=0.5, se=0.25),
    CandidateSpec.make("tresnet", block="bottle", w=1.0, se=0.0),
    CandidateSpec.make("s2d", k=3),
    CandidateSpec.make("dense_conv", k=3, w=1.0),
    CandidateSpec.make("vit", depth=2, dim=32, heads=4),
    CandidateSpec.make("bot_trans", e=0.5),
    CandidateSpec.make("lambda", e=1.0),
)
BRANCHED = {"repvgg", "vit", "bot_trans", "dense_conv", "s2d"}  # with sums of their own, or none at all
SIGNATURES = (
    Signature((8, 8, 8), (8, 8, 8), "relu"),
    Signature((8, 8, 8), (16, 4, 4), "silu"),
    Signature((8, 7, 7), (12, 4, 4), "relu6"),
    Signature((8, 9, 9), (8, 5, 5)),
    Signature((6, 15, 15), (10, 7, 7), "hardswish"),
    Signature((6, 15, 8), (10, 8, 8)),  # stride in one dim alone
    Signature((3, 9, 9), (8, 4, 4), "relu"),
    Signature((8, 12, 12), (8, 3, 3)),
    Signature((8, 14, 14), (8, 10, 10)),  # an unpadded 5×5 convolution
    Signature((8, 9, 7), (20, 9, 7), "relu"),
)
PAIRS = [
    pytest.param(spec, signature, id=f"{spec.name}-{signature.in_shape}-{signature.out_shape}")
    for spec, signature in itertools.product(SPECS, SIGNATURES)
    if not FAMILIES[spec.family].reject(spec, signature)
]


def _built(spec: CandidateSpec, signature: Signature) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    module = registry.build(spec, signature)
    for m in module.modules():  # statistics as after training, so that norms do something
        if isinstance(m, BatchNorm):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    return module


def test_most_pairs_fit() -> None:
    everywhere = [s for s in SPECS if s.family not in ("dense_conv", "s2d")]
    assert len(PAIRS) >= 0.8 * len(everywhere) * len(SIGNATURES)


@pytest.mark.parametrize(("spec", "signature"), PAIRS)
def test_builds_trains_and_emits(spec: CandidateSpec, signature: Signature) -> None:
    module = _built(spec, signature)
    assert not module.training
    x = torch.randn(2, *signature.in_shape)
    expected = module(x).detach()
    assert tuple(expected.shape) == (2, *signature.out_shape)

    model = emit(module).model
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x.numpy()})
    scale = float(expected.abs().max())
    np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=1e-4 * scale)

    assert registry.estimate(spec, signature) == (module_macs(module, signature.in_shape), count_params(module))

    module.train()
    trained = module(x)
    assert tuple(trained.shape) == (2, *signature.out_shape)
    weights = list(module.parameters())
    if weights:
        trained.square().sum().backward()
        assert all(w.grad is not None and torch.isfinite(w.grad).all() for w in weights)


@pytest.mark.parametrize(
    "signature",
    [
        Signature((16, 6, 6), (16, 6, 6), "relu"),
        Signature((24, 9, 7), (40, 5, 4)),
        Signature((4, 4, 4), (8, 2, 2)),
        Signature((3, 10, 10), (9, 6, 6), "silu"),
    ],
)
def test_formula_equals_counting_for_every_spec(signature: Signature) -> None:
    for spec in registry.propose(signature, among=FAMILIES):
        family = FAMILIES[spec.family]
        assert family.estimate(spec, signature) == Family.estimate(family, spec, signature), spec.name


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("final", ["relu", "relu6", "sigmoid"])
def test_final_activation(spec: CandidateSpec, final: str) -> None:
    out = {"dense_conv": (24, 16, 16), "s2d": (8, 8, 8)}.get(spec.family, (8, 16, 16))
    signature = Signature((8, 16, 16), out, final)
    y = _built(spec, signature)(10 * torch.randn(2, 8, 16, 16))
    if spec.family == "identity" and final == "sigmoid":
        assert y.min() < -1  # applying it twice would not be the identity
        return
    assert y.min() >= 0
    assert y.max() <= {"relu": float("inf"), "relu6": 6, "sigmoid": 1}[final]
    plain = _built(spec, Signature((8, 16, 16), out))(10 * torch.randn(2, 8, 16, 16))
    assert plain.min() < 0


@pytest.mark.parametrize("spec", [s for s in SPECS[1:] if s.family not in BRANCHED], ids=lambda s: s.name)
def test_skip_connection_only_where_shapes_match(spec: CandidateSpec) -> None:
    shape: Shape = (8, 8, 8)
    for out, skips in ((shape, 1), ((16, 8, 8), 0), ((8, 4, 4), 0)):
        module = registry.build(spec, Signature(shape, out))
        assert sum(isinstance(m, Add) for m in module.modules()) == skips
        norms = [m for m in module.modules() if isinstance(m, BatchNorm)]
        first = {n.weight[0].item() for n in norms[:-1]}
        assert first <= {1.0}
        assert norms[-1].weight[0].item() == pytest.approx(SKIP_GAMMA if skips else 1.0)


def _convs(spec: CandidateSpec, signature: Signature) -> list[Conv]:
    return [m for m in registry.build(spec, signature).modules() if isinstance(m, Conv)]


@pytest.mark.parametrize(
    "signature",
    [Signature((16, 8, 8), (16, 8, 8), "relu"), Signature((8, 8, 8), (16, 4, 4)), Signature((8, 7, 9), (12, 4, 5))],
)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_repvgg_is_two_convolutions_when_deployed(signature: Signature, k: int) -> None:
    module = _built(CandidateSpec.make("repvgg", k=k, w=1.0), signature)
    folded, _, _ = normalize(module)
    assert sum(isinstance(m, Conv) for m in folded.modules()) == 2
    assert not any(isinstance(m, BatchNorm) for m in folded.modules())
    x = torch.randn(2, *signature.in_shape)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), module(x), atol=1e-4, rtol=1e-4)


def test_repvgg_wants_branches_that_look_at_the_same_pixel() -> None:
    signature = Signature((8, 14, 14), (8, 10, 10))  # an unpadded 5×5 convolution
    assert "branch" in FAMILIES["repvgg"].reject(CandidateSpec.make("repvgg", k=5, w=1.0), signature)


def test_tresnet_blurs_before_it_skips_pixels() -> None:
    module = registry.build(
        CandidateSpec.make("tresnet", block="basic", w=1.0, se=0.0), Signature((8, 8, 8), (8, 4, 4))
    )
    strided = [m for m in module.modules() if isinstance(m, Conv) and max(m.stride) > 1]
    assert len(strided) == 1 and strided[0].groups == 8
    kernel = strided[0].weight[0, 0]
    assert kernel.sum().item() == pytest.approx(1.0) and kernel[1, 1].item() == pytest.approx(0.25)


def test_dense_conv_keeps_its_input() -> None:
    module = _built(CandidateSpec.make("dense_conv", k=3, w=1.0), Signature((8, 6, 6), (20, 6, 6)))
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(module(x)[:, :8], x)


def test_s2d_reads_blocks_at_the_low_resolution() -> None:
    (conv,) = _convs(CandidateSpec.make("s2d", k=3), Signature((3, 32, 32), (16, 8, 8), "relu"))
    assert tuple(conv.weight.shape) == (16, 48, 3, 3) and conv.stride == (1, 1)
    for signature, why in (
        (Signature((3, 33, 33), (16, 17, 17)), "blocks"),
        (Signature((3, 32, 16), (16, 16, 16)), "blocks"),
        (Signature((32, 32, 32), (32, 16, 16)), "stems"),
        (Signature((3, 32, 32), (16, 32, 32)), "resolution stays"),
    ):
        assert why in FAMILIES["s2d"].reject(CandidateSpec.make("s2d", k=1), signature)


def test_cb_stack_structure() -> None:
    first, second = _convs(CandidateSpec.make("cb_stack", k=3, w=0.5), Signature((8, 8, 8), (24, 4, 4)))
    assert tuple(first.weight.shape) == (16, 8, 3, 3)  # 12 rounded to a multiple of eight
    assert tuple(second.weight.shape) == (24, 16, 3, 3)
    assert (first.stride, second.stride) == ((2, 2), (1, 1))
    assert first.bias is None and second.bias is None


def test_cb_bottle_structure() -> None:
    reduce, middle, expand = _convs(CandidateSpec.make("cb_bottle", k=5, w=1.0), Signature((8, 8, 8), (16, 4, 4)))
    shapes = [tuple(c.weight.shape) for c in (reduce, middle, expand)]
    assert shapes == [(16, 8, 1, 1), (16, 16, 5, 5), (16, 16, 1, 1)]
    assert [c.stride[0] for c in (reduce, middle, expand)] == [1, 2, 1]


def test_efn_structure() -> None:
    signature = Signature((16, 8, 8), (24, 4, 4))
    expand, depthwise, reduce, excite, project = _convs(CandidateSpec.make("efn", e=6, k=3, se=0.25), signature)
    assert tuple(expand.weight.shape) == (96, 16, 1, 1)
    assert (depthwise.groups, depthwise.stride) == (96, (2, 2))
    assert tuple(reduce.weight.shape) == (4, 96, 1, 1)  # a quarter of the block's 16 input channels
    assert reduce.bias is not None and excite.bias is not None
    assert tuple(project.weight.shape) == (24, 96, 1, 1)
    assert len(_convs(CandidateSpec.make("efn", e=1, k=3, se=0.0), signature)) == 2  # no expansion


def test_efnv2_structure() -> None:
    expand, project = _convs(CandidateSpec.make("efnv2", e=3, k=3, se=0.0), Signature((16, 8, 8), (24, 4, 4)))
    assert (tuple(expand.weight.shape), expand.groups, expand.stride) == ((48, 16, 3, 3), 1, (2, 2))
    assert tuple(project.weight.shape) == (24, 48, 1, 1)


def test_build_is_repeatable() -> None:
    def weights() -> list[torch.Tensor]:
        return list(_built(SPECS[3], SIGNATURES[0]).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(), strict=True))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
@pytest.mark.parametrize(
    ("signature", "reason"),
    [
        (Signature((8,), (8,)), "feature vector"),
        (Signature((8, 7, 7), (10,)), "feature vector"),
        (Signature((8, 16), (8, 16)), "(C, H, W)"),
        (Signature((8, 4, 4, 4), (8, 4, 4, 4)), "(C, H, W)"),
        (Signature((8, 0, 4), (8, 0, 4)), "empty"),
        (Signature((8, 4, 4), (8, 8, 8)), "grows"),
        (Signature((8, 32, 32), (8, 20, 20)), "no integer stride"),
        (Signature((8, 8, 8), (8, 8, 8), "mish?"), "unknown final activation"),
    ],
)
def test_signatures_that_no_family_serves(family: Family, signature: Signature, reason: str) -> None:
    rows = family.survey(signature)
    if len(signature.in_shape) == 2 and family.name in ("identity", "mixer"):
        assert family.specs(signature), "a sequence of tokens"
        return
    if family.name == "mixer":
        reason = "(T, C)"
    if family.name == "dense_conv" and reason in ("grows", "no integer stride"):
        reason = "at one resolution"
    assert family.specs(signature) == []
    assert all(reason in why for _, why in rows), rows[0]


def test_kernels_that_see_only_padding_are_rejected() -> None:
    small = Signature((8, 2, 2), (8, 1, 1))
    assert {spec.kwargs["k"] for spec in FAMILIES["cb_stack"].specs(small)} == {1}  # its second convolution is at 1×1
    assert {spec.kwargs["k"] for spec in FAMILIES["cb_bottle"].specs(small)} == {1, 3}


def test_single_position_can_be_trained() -> None:
    module = registry.build(CandidateSpec.make("cb_bottle", k=1, w=1.0), Signature((8, 1, 1), (8, 1, 1))).train()
    assert module(torch.randn(4, 8, 1, 1)).shape == (4, 8, 1, 1)
