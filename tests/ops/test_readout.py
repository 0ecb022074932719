"""Last convolutions fitted before training begins."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.activation import activation
from hantc.dialect.conv import Conv
from hantc.dialect.emitter import emit
from hantc.dialect.norm import BatchNorm
from hantc.ops import readout
from hantc.ops.readout import fit_readout
from hantc.ops.registry import build
from tests.ops.test_derived import SHAPE, UNSEEN, Basic, error, graph, images

DOWN = (24, 5, 5)


def candidate(spec: str, out: tuple[int, ...] = SHAPE, final: str = "relu", **params: float) -> fx.GraphModule:
    torch.manual_seed(0)
    made = build(CandidateSpec.make(spec, **params), Signature(SHAPE, out, final))
    return made.train()


def block(scale: float = 0.5) -> fx.GraphModule:
    torch.manual_seed(1)
    made = Basic()
    with torch.no_grad():
        made.b.weight.mul_(scale)
    return graph(made)


def wanted(region: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = region(x)
        return found


def settled(made: fx.GraphModule, x: Tensor) -> fx.GraphModule:
    """In evaluation mode, its norms' running statistics those of `x`."""
    made.train()
    with torch.no_grad():
        for _ in range(60):
            made(x)
    return made.eval()


ONES = {
    "cb_stack": CandidateSpec.make("cb_stack", k=3, w=1.0),
    "cb_bottle": CandidateSpec.make("cb_bottle", k=3, w=1.0),
    "cb_res": CandidateSpec.make("cb_res", k=3, w=1.0),
    "conv_cs": CandidateSpec.make("conv_cs", k=3, w=1.0),
    "repvgg": CandidateSpec.make("repvgg", k=3, w=1.0),
    "efn": CandidateSpec.make("efn", e=6, k=3, se=0.25),
    "efnv2": CandidateSpec.make("efnv2", e=3, k=3, se=0.0),
    "tresnet": CandidateSpec.make("tresnet", block="basic", w=1.0, se=0.0),
    "bot_trans": CandidateSpec.make("bot_trans", e=1.0),
    "lambda": CandidateSpec.make("lambda", e=1.0),
}


@pytest.mark.parametrize("family", ONES)
def test_the_fit_brings_candidates_nearer_on_unseen_images(family: str) -> None:
    x, region = images(), block()
    torch.manual_seed(0)
    made = build(ONES[family], Signature(SHAPE, SHAPE, "relu")).train()
    plain = error(settled(copy.deepcopy(made), x), region, UNSEEN)
    names = set(made.state_dict())
    assert fit_readout(made, x, wanted(region, x))
    assert set(made.state_dict()) == names, "trained weights are stored by these names"
    fitted = error(settled(made, x), region, UNSEEN)
    assert fitted < 0.8 * plain
    emit(made)


def test_what_the_random_layers_could_give_is_found() -> None:
    """The region is the candidate itself with another last convolution."""
    x = images()
    made = candidate("cb_stack", final="", k=3, w=1.0)
    other = copy.deepcopy(made)
    last = [m for m in other.modules() if isinstance(m, Conv)][-1]
    with torch.no_grad():
        last.weight.copy_(torch.randn(last.weight.shape, generator=torch.Generator().manual_seed(5)))
    target = wanted(other, x)
    assert fit_readout(made, x, target)
    with torch.no_grad():
        left = (made(x) - target).square().mean() / (target - x).var()
    assert left < 1e-3


def test_a_change_of_resolution_is_fitted_too() -> None:
    x = images()
    torch.manual_seed(2)
    goal = nn.Sequential(nn.Conv2d(SHAPE[0], 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 24, 1)).eval()
    made = candidate("cb_stack", DOWN, "", k=3, w=1.0)
    plain = error(settled(copy.deepcopy(made), x), goal, UNSEEN)
    assert fit_readout(made, x, wanted(goal, x))
    assert error(settled(made, x), goal, UNSEEN) < 0.6 * plain


def unchanged(made: fx.GraphModule, x: Tensor, target: Tensor) -> None:
    before = {k: v.clone() for k, v in made.state_dict().items() if "running" not in k and "tracked" not in k}
    assert not fit_readout(made, x, target)
    after = made.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.parametrize("final", ["silu", "hardswish", "relu6", "leakyrelu"])
def test_the_last_activation_is_looked_behind(final: str) -> None:
    """The region is such an activation of something: what to ask for before it gives the region when it has passed."""
    x = images()
    torch.manual_seed(2)
    goal = nn.Sequential(nn.Conv2d(SHAPE[0], 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 24, 1), activation(final)).eval()
    made = candidate("cb_stack", DOWN, final, k=3, w=1.0)
    plain = error(settled(copy.deepcopy(made), x), goal, UNSEEN)
    assert fit_readout(made, x, wanted(goal, x))
    assert error(settled(made, x), goal, UNSEEN) < 0.7 * plain


@pytest.mark.parametrize("name", ["silu", "hardswish"])
def test_smooth_activations_are_inverted_where_they_can_be(name: str) -> None:
    made = candidate("cb_stack", final=name, k=3, w=1.0)
    last = next(n for n in made.graph.nodes if n.op == "output").all_input_nodes[0]
    leaf, x = activation(name), torch.linspace(-1.2, 40, 1000).reshape(10, 4, 5, 5)
    torch.testing.assert_close(readout._before(made, last, leaf(x)), x, atol=2e-2, rtol=1e-3)
    least = readout._before(made, last, torch.full((1, 1, 1, 1), -3.0))  # never comes out
    assert -1.6 < float(least) < -1.2


def test_an_activation_whose_input_cannot_be_told_is_left_alone() -> None:
    x = images()
    unchanged(candidate("cb_stack", final="sigmoid", k=3, w=1.0), x, wanted(block(), x))


def test_of_kernels_too_large_the_middle_is_fitted() -> None:
    x, region = images(), block()
    made = candidate("cb_stack", k=7, w=2.0)  # 32 · 49 weights for each output channel
    plain = error(settled(copy.deepcopy(made), x), region, UNSEEN)
    assert fit_readout(made, x, wanted(region, x))
    last = [m for m in made.modules() if isinstance(m, Conv)][-1]
    assert not last.weight[:, :, 0].any() and last.weight[:, :, 1:-1, 1:-1].abs().amin() > 0
    assert error(settled(made, x), region, UNSEEN) < 0.8 * plain


def test_too_large_a_fit_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "_COLUMNS", 30)
    x = images()
    unchanged(candidate("cb_stack", k=7, w=2.0), x, wanted(block(), x))


def test_too_few_images_are_not_learnt_by_heart() -> None:
    x = images()
    unchanged(candidate("cb_stack", k=3, w=1.0), x[:4], wanted(block(), x[:4]))
    small = x[:12, :, :2, :2].contiguous()  # 36 positions for 144 weights
    target = torch.randn(small.shape, generator=torch.Generator().manual_seed(3))
    unchanged(candidate("cb_stack", k=3, w=1.0), small, target)


def test_a_fit_that_is_worse_on_images_held_back_is_undone() -> None:
    """Where the region does nothing, and the target's rest is noise, the start (near nothing) is the better one."""
    x = images()
    noise = 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    made = candidate("cb_stack", final="", k=3, w=2.0)
    norm = [m for m in made.modules() if isinstance(m, BatchNorm)][-1]
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.zero_()
    few = slice(0, 12)
    unchanged(made, x[few], x[few] + noise[few])
