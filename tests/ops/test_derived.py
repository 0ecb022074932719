"""Candidates made from the teacher: what they change, that they keep the shapes, and how near they start."""

from __future__ import annotations

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, fx, nn

from hantc.core.errors import HantcError
from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.activation import Silu, Unary, activation_name
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Add, Mul
from hantc.dialect.emitter import emit
from hantc.dialect.graph import count_params, module_macs, shapes_of, trace
from hantc.dialect.pool import GlobalPool
from hantc.ops.channels import channel_groups, is_depthwise
from hantc.ops.derived import Origin, canonical, structure
from hantc.ops.merged import Merged
from hantc.ops.refit import activations, fit_conv
from hantc.ops.registry import DERIVED, build
from hantc.ops.slim import Slim, gates

SHAPE = (16, 10, 9)


class Basic(nn.Module):
    """Residual block of two 3×3 convolutions; `c_out` and `stride` for the first of a stage."""

    def __init__(self, c_in: int = 16, c_out: int = 16, inner: int = 24, stride: int = 1) -> None:
        super().__init__()
        self.a, self.act, self.b = Conv(c_in, inner, 3, stride), Unary("Relu"), Conv(inner, c_out, 3)
        self.skip = Conv(c_in, c_out, 1, stride) if (c_in, stride) != (c_out, 1) else None
        self.add, self.final = Add(), Unary("Relu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.act(self.a(x)))
        out: Tensor = self.final(self.add(y, x if self.skip is None else self.skip(x)))
        return out


class Gated(nn.Module):
    """Inverted residual with squeeze-and-excite, as EfficientNet's."""

    def __init__(self, stride: int = 1, c_out: int = 16) -> None:
        super().__init__()
        self.expand, self.act1 = Conv(16, 48), Silu()
        self.depthwise, self.act2 = Conv(48, 48, 3, stride, groups=48), Silu()
        self.pool, self.reduce, self.act3 = GlobalPool(), Conv(48, 4), Silu()
        self.restore, self.gate, self.mul = Conv(4, 48), Unary("Sigmoid"), Mul()
        self.project = Conv(48, c_out)
        self.add = Add() if (stride, c_out) == (1, 16) else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act2(self.depthwise(self.act1(self.expand(x))))
        y = self.project(self.mul(y, self.gate(self.restore(self.act3(self.reduce(self.pool(y)))))))
        out: Tensor = y if self.add is None else self.add(y, x)
        return out


def graph(module: nn.Module, in_shape: tuple[int, ...] = SHAPE, out_shape: tuple[int, ...] = SHAPE) -> fx.GraphModule:
    return trace(module, in_shape, out_shape).eval()


def origin(module: nn.Module, *blocks: nn.Module, samples: Tensor | None = None) -> Origin:
    return Origin(graph(module), tuple(map(graph, blocks)), samples)


def images(n: int = 64) -> Tensor:
    """Smooth activations: neighbouring pixels are alike, as in real ones."""
    coarse = torch.randn(n, 16, 5, 5, generator=torch.Generator().manual_seed(3))
    return nn.functional.interpolate(coarse, SHAPE[1:], mode="bilinear").relu()


def error(made: nn.Module, whole: nn.Module, x: Tensor) -> float:
    """Relative to the variance of the wanted output, on images that the fit has not seen."""
    with torch.no_grad():
        want = whole(x)
        return float((made(x) - want).square().mean() / want.var())


def slim(keep: float = 1.0, act: str = "same", se: str = "same") -> CandidateSpec:
    changes = {k: v for k, v in {"act": act, "se": se}.items() if v != "same"}
    return CandidateSpec.make("slim", keep=keep, **changes)


def leaf_kinds(module: fx.GraphModule) -> list[str]:
    found = [module.get_submodule(str(n.target)) for n in module.graph.nodes if n.op == "call_module"]
    return [activation_name(m) or type(m).__name__ for m in found]


UNSEEN = images(96)[64:]
MODULES = {"basic": Basic, "gated": Gated}


@pytest.mark.parametrize("kind", MODULES)
def test_every_derived_candidate_runs_and_is_emitted_equal(kind: str) -> None:
    torch.manual_seed(0)
    whole = MODULES[kind]()
    spans = [MODULES[kind]() for _ in range(2)]
    seen = 0
    for family in DERIVED.values():
        of = origin(whole, samples=images())
        if family.name == "merged":
            of = origin(nn.Sequential(*spans), *spans, samples=images())
        signature = Signature(SHAPE, SHAPE, "relu" if kind == "basic" else "")
        for spec in family.grid():
            if family.reject_origin(spec, signature, of):
                continue
            seen += 1
            made = build(spec, signature, origin=of)
            session = ort.InferenceSession(emit(made).model.SerializeToString())
            got = session.run(None, {"x": UNSEEN[:2].numpy()})[0]
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(got), made(UNSEEN[:2]), atol=1e-4, rtol=1e-4)
            macs, params = family.size(spec, signature, of)
            assert (macs, params) == (module_macs(made, SHAPE), count_params(made))
            assert (
                macs < module_macs(of.whole, SHAPE)
                or family.exact
                or family.name == "affine"
                or {
                    spec.kwargs.get("act", "same"),
                    spec.kwargs.get("se", "same"),
                }
                != {"same"}
            )
    assert seen >= (5 if kind == "basic" else 15)


@pytest.mark.parametrize(("keep", "channels"), [(0.75, 16), (0.5, 16), (0.25, 8)])
def test_pruning_leaves_whole_registers_of_channels(keep: float, channels: int) -> None:
    made = build(slim(keep), Signature(SHAPE, SHAPE), origin=origin(Basic()))
    first = next(m for m in made.modules() if isinstance(m, Conv))
    assert first.weight.shape[0] == channels


def test_depthwise_convolutions_and_gates_lose_the_same_channels() -> None:
    made = build(slim(0.5), Signature(SHAPE, SHAPE), origin=origin(Gated()))
    convs = [m for m in made.modules() if isinstance(m, Conv)]
    assert [tuple(c.weight.shape[:2]) for c in convs] == [(24, 16), (24, 1), (4, 24), (24, 4), (16, 24)]
    assert convs[1].groups == 24


def test_only_channels_inside_are_groups() -> None:
    block = graph(Basic(stride=2, c_out=32), SHAPE, (32, 5, 5))
    groups = channel_groups(block, shapes_of(block, [torch.zeros(1, *SHAPE)]))
    assert [(g.channels, g.makers, g.users) for g in groups] == [(24, ["a"], ["b"])]


def test_unneeded_channels_are_the_ones_that_go() -> None:
    torch.manual_seed(0)
    block = Basic()
    with torch.no_grad():
        block.b.weight[:, 16:] = 0  # eight inner channels that nobody reads
    made = build(slim(0.67), Signature(SHAPE, SHAPE), origin=origin(block, samples=images()))
    assert error(made, block, UNSEEN) < 1e-4


@pytest.mark.parametrize("spec", [slim(0.5), slim(0.75)], ids=lambda s: s.name)
def test_fitting_is_better_than_cutting(spec: CandidateSpec) -> None:
    torch.manual_seed(0)
    block = Basic()
    fitted = build(spec, Signature(SHAPE, SHAPE), origin=origin(block, samples=images()))
    cut = build(spec, Signature(SHAPE, SHAPE), origin=origin(block))
    assert error(fitted, block, UNSEEN) < 0.7 * error(cut, block, UNSEEN)


def test_a_gate_becomes_its_mean() -> None:
    torch.manual_seed(0)
    block = Gated()
    with torch.no_grad():
        block.restore.weight.zero_()  # a gate that does not look at the image
        assert block.restore.bias is not None
        block.restore.bias.normal_()
    made = build(slim(se="mean"), Signature(SHAPE, SHAPE), origin=origin(block, samples=images()))
    assert leaf_kinds(made) == ["Conv", "silu", "Conv", "silu", "Conv", "Add"]
    assert error(made, block, UNSEEN) < 1e-4


def test_smooth_activations_give_way_but_for_the_last() -> None:
    block = graph(nn.Sequential(Conv(16, 16, 3), Silu(), Conv(16, 16, 3), Silu()))
    made = build(slim(act="relu"), Signature(SHAPE, SHAPE, "silu"), origin=Origin(block, ()))
    assert leaf_kinds(made) == ["Conv", "relu", "Conv", "silu"]


@pytest.mark.parametrize(
    ("spec", "module", "reason"),
    [
        (slim(), Basic(), "the teacher itself"),
        (slim(act="relu"), Basic(), "no activation"),
        (slim(se="mean"), Basic(), "no squeeze-and-excite"),
        (slim(0.9), Basic(inner=8), "no channels inside"),
        (slim(1.5), Basic(), "not within 0 and 1"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_the_reason(spec: CandidateSpec, module: nn.Module, reason: str) -> None:
    of = origin(module)
    assert reason in Slim().reject_origin(spec, Signature(SHAPE, SHAPE), of)
    with pytest.raises(HantcError, match="derived from the teacher"):
        build(spec, Signature(SHAPE, SHAPE), origin=of)


def test_factors_of_full_rank_are_the_teacher() -> None:
    torch.manual_seed(0)
    block = Basic()
    with torch.no_grad():
        block.a.weight.copy_((torch.randn(24, 8) @ torch.randn(8, 144)).reshape(24, 16, 3, 3) / 40)  # of rank 8
        block.b.weight.copy_((torch.randn(16, 8) @ torch.randn(8, 216)).reshape(16, 24, 3, 3) / 40)
    spec = CandidateSpec.make("low_rank", rank=0.5)
    made = build(spec, Signature(SHAPE, SHAPE), origin=origin(block))
    assert [tuple(m.weight.shape) for m in made.modules() if isinstance(m, Conv)] == [
        (8, 16, 3, 3),
        (24, 8, 1, 1),
        (8, 24, 3, 3),
        (16, 8, 1, 1),
    ]
    assert error(made, block, UNSEEN) < 1e-8


@pytest.mark.parametrize("stride", [1, 2])
def test_tucker_factors_of_full_rank_are_the_teacher(stride: int) -> None:
    torch.manual_seed(0)
    block = Basic(c_out=32, inner=32, stride=stride)
    with torch.no_grad():
        for conv in (block.a, block.b):
            c_out, c_in = conv.weight.shape[:2]
            into, outof = torch.randn(c_in, 8), torch.randn(c_out, 8)
            core = torch.randn(8, 8, 3, 3) / 60
            conv.weight.copy_(torch.einsum("srhw,ir,os->oihw", core, into, outof))
            assert conv.bias is not None
            conv.bias.normal_()
    out = tuple(block(torch.zeros(1, *SHAPE)).shape[1:])
    of = Origin(graph(block, SHAPE, out), ())
    spec = CandidateSpec.make("low_rank", rank=0.4, form="tucker2")
    made = build(spec, Signature(SHAPE, out), origin=of)
    shapes = [tuple(m.weight.shape) for m in made.modules() if isinstance(m, Conv)]
    if stride == 1:  # at the stride the first factor sees four times the positions, and saves too little
        assert shapes[:3] == [(8, 16, 1, 1), (16, 8, 3, 3), (32, 16, 1, 1)]
    assert (16, 16, 3, 3) in shapes
    assert error(made, block, UNSEEN) < 1e-8


def test_tucker_is_refused_where_it_saves_nothing() -> None:
    signature, pointwise = Signature(SHAPE, SHAPE), nn.Sequential(Conv(16, 16), Conv(16, 16))
    family = DERIVED["low_rank"]
    spec = CandidateSpec.make("low_rank", rank=0.4, form="tucker2")
    assert "thinner" in family.reject_origin(spec, signature, origin(pointwise))
    assert "form=cp" in family.reject_origin(CandidateSpec.make("low_rank", rank=0.4, form="cp"), signature,
                                             origin(Basic()))  # fmt: skip


def test_fitted_factors_are_nearer_than_those_of_the_weights_alone() -> None:
    torch.manual_seed(0)
    block, spec = Basic(), CandidateSpec.make("low_rank", rank=0.5)
    fitted = build(spec, Signature(SHAPE, SHAPE), origin=origin(block, samples=images()))
    assert error(fitted, block, UNSEEN) < error(
        build(spec, Signature(SHAPE, SHAPE), origin=origin(block)), block, UNSEEN
    )


def test_a_derived_candidate_needs_its_origin() -> None:
    with pytest.raises(HantcError, match="not at hand"):
        build(slim(0.5), Signature(SHAPE, SHAPE))


def test_a_span_becomes_the_nearest_of_its_blocks() -> None:
    torch.manual_seed(0)
    still, busy = Basic(), Basic()
    with torch.no_grad():
        still.b.weight.mul_(0.01)  # nearly the identity, so that the other does all the work
    spec = CandidateSpec.make("merged", keep=1.0)
    for blocks in ((still, busy), (busy, still)):
        span = nn.Sequential(*blocks)
        made = build(spec, Signature(SHAPE, SHAPE), origin=origin(span, *blocks, samples=images()))
        assert error(made, span, UNSEEN) < 0.01
        assert module_macs(made, SHAPE) == module_macs(graph(busy), SHAPE)


def test_only_spans_with_a_block_of_their_shape_merge() -> None:
    spec = CandidateSpec.make("merged", keep=1.0)
    out = (32, 3, 3)
    first, second = Basic(c_out=24, stride=2), Basic(c_in=24, c_out=32, stride=2)
    span = Origin(
        graph(nn.Sequential(first, second), SHAPE, out),
        (graph(first, SHAPE, (24, 5, 5)), graph(second, (24, 5, 5), out)),
    )
    assert "no block of the span" in Merged().reject_origin(spec, Signature(SHAPE, out), span)
    assert "not a span" in Merged().reject_origin(spec, Signature(SHAPE, SHAPE), origin(first))


def test_weights_of_one_derivation_fit_another_of_the_same_structure() -> None:
    a, b = graph(Basic()), graph(Basic())
    assert structure(a) == structure(b) == structure(canonical(a))
    assert structure(a) != structure(graph(Basic(inner=32)))
    signature = Signature(SHAPE, SHAPE)
    with_samples = build(slim(0.5), signature, origin=Origin(a, (), images()))
    without = build(slim(0.5), signature, origin=Origin(b, ()))
    without.load_state_dict(with_samples.state_dict())
    with torch.no_grad():
        assert torch.equal(without(UNSEEN), with_samples(UNSEEN))


def test_the_teacher_keeps_its_weights() -> None:
    block = Gated()
    before = {k: v.clone() for k, v in block.state_dict().items()}
    build(slim(0.5, "relu", "mean"), Signature(SHAPE, SHAPE), origin=origin(block, samples=images()))
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


@pytest.mark.parametrize("groups", [1, 16])
def test_a_fit_finds_the_weights_that_made_the_target(groups: int) -> None:
    torch.manual_seed(0)
    true, found = (Conv(16, 16, 3, 2, groups=groups) for _ in range(2))
    assert true.bias is not None
    with torch.no_grad():
        true.bias.normal_()
        x = torch.randn(64, 16, 9, 9)
        fit_conv(found, x, true(x))
        assert is_depthwise(true) == (groups == 16)
        torch.testing.assert_close(found(x), true(x), atol=0.02, rtol=0.02)  # the ridge draws it a little


def test_gates_are_found_only_where_they_can_be_folded() -> None:
    assert len(gates(graph(Gated()))) == 1
    assert gates(graph(Basic())) == []


def test_activations_are_kept_by_name() -> None:
    block = graph(Basic())
    values = activations(block, UNSEEN)
    with torch.no_grad():
        assert torch.equal(values[next(n.name for n in block.graph.nodes if "final" in n.name)], block(UNSEEN))


def test_kernels_are_cut_to_their_middle_and_fitted() -> None:
    torch.manual_seed(0)
    block = Gated()
    block.depthwise = Conv(48, 48, 5, groups=48)
    spec = CandidateSpec.make("slim", keep=1.0, kernel=3)
    assert [s for s in Slim().grid() if s == spec]
    cut = build(spec, Signature(SHAPE, SHAPE), origin=origin(block))
    (small,) = [m for m in cut.modules() if isinstance(m, Conv) and is_depthwise(m)]
    assert (small.kernel, small.pads) == ((3, 3), (1, 1, 1, 1))
    torch.testing.assert_close(small.weight, block.depthwise.weight[:, :, 1:4, 1:4])
    fitted = build(spec, Signature(SHAPE, SHAPE), origin=origin(block, samples=images()))
    whole = graph(block)
    assert error(fitted, whole, UNSEEN) < 0.6 * error(cut, whole, UNSEEN)


def test_a_kernel_whose_ring_does_nothing_is_cut_without_loss() -> None:
    torch.manual_seed(0)
    block = Gated(stride=2, c_out=24)
    block.depthwise = Conv(48, 48, 5, 2, groups=48, pads=(1, 1, 2, 2))  # asymmetric, as from TensorFlow
    with torch.no_grad():
        ring = torch.ones(5, 5)
        ring[1:4, 1:4] = 0
        block.depthwise.weight[:, :, ring.bool()] = 0
    out = tuple(block(torch.zeros(1, *SHAPE)).shape[1:])
    of = Origin(graph(block, SHAPE, out), (), None)
    made = build(CandidateSpec.make("slim", keep=1.0, kernel=3), Signature(SHAPE, out), origin=of)
    assert error(made, of.whole, UNSEEN) < 1e-9


@pytest.mark.parametrize(
    ("kernel", "why"), [(3, "no kernel larger than 3"), (4, "kernel=4 is not an odd size"), (-1, "not an odd size")]
)
def test_kernels_that_cannot_shrink(kernel: int, why: str) -> None:
    spec = CandidateSpec.make("slim", keep=1.0, kernel=kernel)
    assert why in Slim().reject_origin(spec, Signature(SHAPE, SHAPE), origin(Gated()))
