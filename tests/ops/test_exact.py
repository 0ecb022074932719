"""Exact forms of the teacher's region: equal, other operations, and why not where nothing changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.activation import activation
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Mul
from hantc.dialect.graph import trace
from hantc.dialect.linear import Linear
from hantc.dialect.pool import GlobalPool
from hantc.dialect.shape import Flatten, Reshape, Transpose
from hantc.ops.derived import Origin
from hantc.ops.registry import DERIVED, build

FAMILY = DERIVED["exact"]


def spec(form: str) -> CandidateSpec:
    return CandidateSpec.make("exact", form=form)


def traced(module: nn.Module, before: tuple[int, ...]) -> fx.GraphModule:
    for m in module.modules():
        if isinstance(m, Conv) and m.bias is not None:
            nn.init.normal_(m.bias)
    after = tuple(module.eval()(torch.zeros(1, *before)).shape[1:])
    return trace(module, before, after)


def formed(whole: fx.GraphModule, form: str) -> fx.GraphModule:
    """The region in this form, after checking that it computes the same."""
    info = whole.meta["info"]
    signature = Signature(info.inputs[0].shape[1:], info.outputs[0].shape[1:])
    made = build(spec(form), signature, origin=Origin(whole, (whole,)))
    x = torch.randn(3, *signature.in_shape)
    with torch.no_grad():
        torch.testing.assert_close(made(x), whole(x), atol=1e-4, rtol=1e-4)
    return made


def kinds(module: fx.GraphModule) -> list[str]:
    return [type(module.get_submodule(str(n.target))).__name__ for n in module.graph.nodes if n.op == "call_module"]


def reason(whole: fx.GraphModule, form: str, blocks: tuple[fx.GraphModule, ...] = ()) -> str:
    info = whole.meta["info"]
    signature = Signature(info.inputs[0].shape[1:], info.outputs[0].shape[1:])
    return FAMILY.reject_origin(spec(form), signature, Origin(whole, blocks or (whole,)))


class Gate(nn.Module):
    """Squeeze and excitation after a convolution."""

    def __init__(self, act: str = "silu") -> None:
        super().__init__()
        self.conv, self.pool, self.mul = Conv(4, 8, 3), GlobalPool(), Mul()
        self.down, self.act, self.up, self.gate = Conv(8, 2), activation(act), Conv(2, 8), activation("sigmoid")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        gated: torch.Tensor = self.mul(y, self.gate(self.up(self.act(self.down(self.pool(y))))))
        return gated


@pytest.mark.parametrize("act", ["relu", "silu", "hardswish"])
def test_gates_become_matrix_products(act: str) -> None:
    made = formed(traced(Gate(act), (4, 6, 6)), "matrix")
    found = kinds(made)
    assert found.count("Linear") == 2 and found.count("Flatten") == found.count("Reshape") == 1
    assert found.count("Conv") == 1


@pytest.mark.parametrize("act", ["relu", "silu", "hardswish"])
def test_and_convolutions_again(act: str) -> None:
    made = formed(formed(traced(Gate(act), (4, 6, 6)), "matrix"), "pixels")
    found = kinds(made)
    assert found.count("Conv") == 3
    assert not {"Linear", "Flatten", "Reshape"} & set(found)


class Last(nn.Module):
    """A gate with the channels last, as Keras writes it: products of four dims."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.mul, self.gate = Conv(4, 8, 3), GlobalPool(), Mul(), activation("sigmoid")
        self.flat, self.dense, self.back = Reshape((1, 1, 8), keep_batch=True), Linear(8, 8), Transpose((0, 3, 1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        gated: torch.Tensor = self.mul(y, self.back(self.gate(self.dense(self.flat(self.pool(y))))))
        return gated


def test_products_of_channels_that_are_last_stay() -> None:
    assert "no matrix product of single pixels" in reason(traced(Last(), (4, 6, 6)), "pixels")


def test_a_convolution_of_one_pixel_alone() -> None:
    made = formed(traced(nn.Sequential(GlobalPool(), Conv(4, 6)), (4, 6, 6)), "matrix")
    assert [type(m) for m in made.children()] == [GlobalPool, Flatten, Linear, Reshape]


@settings(deadline=None, max_examples=25)
@given(
    groups=st.sampled_from([2, 4, 8, 16]),
    each=st.sampled_from([2, 3, 4, 8]),
    wider=st.sampled_from([1, 2]),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    width=st.sampled_from([16, 32, 64]),
)
def test_grouped_convolutions_in_fewer_groups(
    groups: int, each: int, wider: int, kernel: int, stride: int, width: int
) -> None:
    torch.manual_seed(0)
    conv = Conv(groups * each, groups * each * wider, kernel, stride, groups=groups)
    whole = traced(nn.Sequential(conv, activation("relu")), (groups * each, 8, 8))
    why = reason(whole, f"wide{width}")
    assert ("in groups that fit" in why) == (2 * each > width), why
    if not why:
        (left,) = [m for m in formed(whole, f"wide{width}").modules() if isinstance(m, Conv)]
        assert left.groups < groups and each < left.weight.shape[1] <= width


@pytest.mark.parametrize(
    "pair",
    [
        (Conv(6, 6, 3, groups=6), Conv(6, 9)),
        (Conv(6, 6, 3, 2, groups=3), Conv(6, 9)),
        (Conv(8, 4), Conv(4, 8)),
        (Conv(4, 8, bias=False), Conv(8, 4, 3)),
    ],
)
def test_convolutions_in_a_row_become_one(pair: tuple[Conv, Conv]) -> None:
    made = formed(
        traced(nn.Sequential(*pair, activation("relu")), (pair[0].weight.shape[1] * pair[0].groups, 8, 8)), "merged"
    )
    assert kinds(made).count("Conv") == 1


def test_a_map_made_by_the_network_itself_is_flattened() -> None:
    class Blocks(nn.Module):
        """2×2 pixels as channels of one."""

        def __init__(self) -> None:
            super().__init__()
            self.fold, self.conv = Reshape((16, 1, 1), keep_batch=True), Conv(16, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv(self.fold(x))
            return y

    assert kinds(formed(traced(Blocks(), (4, 2, 2)), "matrix")) == ["Reshape", "Flatten", "Linear", "Reshape"]


def test_what_fits_follows_from_structure_alone() -> None:
    """Blocks that are alike are looked at once: a bias of zeros would let this pair merge, another would not."""
    pair = nn.Sequential(Conv(4, 8), Conv(8, 4, 3))
    with torch.no_grad():
        pair[0].bias.zero_()  # type: ignore[operator]
    whole = trace(pair.eval(), (4, 6, 6), (4, 6, 6))
    assert "could be one" in reason(whole, "merged")


def test_merging_has_a_limit() -> None:
    pair = nn.Sequential(Conv(64, 2), Conv(2, 64))  # 16 times the multiplications
    assert "could be one" in reason(traced(pair, (64, 4, 4)), "merged")


@pytest.mark.parametrize(
    ("module", "form", "why"),
    [
        (nn.Sequential(Conv(4, 4, 3), activation("relu"), Conv(4, 4)), "merged", "could be one"),
        (nn.Sequential(Conv(4, 4, 3)), "wide64", "no convolution in groups"),
        (nn.Sequential(Conv(4, 4, 3)), "pixels", "no matrix product of single pixels"),
        (nn.Sequential(Conv(4, 4, 3, groups=4)), "wide64", "no convolution in groups"),
        (nn.Sequential(Conv(64, 64, 3, groups=2)), "wide32", "no convolution in groups"),
        (nn.Sequential(Conv(4, 4)), "matrix", "single pixels"),
        (nn.Sequential(Conv(4, 4)), "other", "is none of"),
    ],
)
def test_declines(module: nn.Module, form: str, why: str) -> None:
    assert why in reason(traced(module, (module[0].weight.shape[1] * module[0].groups, 6, 6)), form)  # type: ignore[index]


def test_a_span_only_where_it_gives_more_than_its_blocks() -> None:
    first, second = Conv(4, 4, 3, groups=4), Conv(4, 8)
    blocks = traced(nn.Sequential(first), (4, 6, 6)), traced(nn.Sequential(second), (4, 6, 6))
    assert reason(traced(nn.Sequential(first, second), (4, 6, 6)), "merged", blocks) == ""
    pair = nn.Sequential(Gate(), Conv(8, 4))
    halves = traced(pair[0], (4, 6, 6)), traced(nn.Sequential(pair[1]), (8, 6, 6))
    assert "each block" in reason(traced(pair, (4, 6, 6)), "matrix", halves)
