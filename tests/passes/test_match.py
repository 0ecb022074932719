"""Regions by dominators, on graphs small enough to see by eye."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import fx, nn

from hantc.core.types import MatchResult, Region
from hantc.dialect.activation import Silu, Softmax, Unary
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Add, Mul
from hantc.dialect.graph import standalone_info
from hantc.dialect.leaf import Leaf
from hantc.dialect.linear import Linear, MatMul
from hantc.dialect.norm import BatchNorm
from hantc.dialect.pool import GlobalPool, Pool
from hantc.dialect.shape import Concat, Flatten, Transpose
from hantc.passes.match import Match, match_regions

if TYPE_CHECKING:
    from tests.passes.conftest import Lab, Sketch

Pen = type["Sketch"]


def relu() -> Unary:
    return Unary("Relu")


def stem(s: Sketch, channels: int = 8) -> str:
    """conv and ReLU on the sketch's input."""
    return s.chain("x", stem=Conv(s.shape[0], channels, 3), stem_act=relu())


def residual(s: Sketch, source: str, tag: str, c_in: int, c_out: int, stride: int = 1) -> str:
    """Two convolutions beside a skip connection, then ReLU."""
    body = s.chain(
        source, **{f"{tag}a": Conv(c_in, c_out, 3, stride), f"{tag}r": relu(), f"{tag}b": Conv(c_out, c_out, 3)}
    )
    skip = source if (c_in, stride) == (c_out, 1) else s.add(f"{tag}skip", Conv(c_in, c_out, 1, stride), source)
    s.add(f"{tag}add", Add(), body, skip)
    return s.add(f"{tag}act", relu())


def head(s: Sketch, source: str, channels: int) -> str:
    return s.chain(source, pool=GlobalPool(), flat=Flatten(), fc=Linear(channels, 4))


def by_kind(found: MatchResult) -> list[tuple[str, str]]:
    return [(r.name, r.kind) for r in found.regions if len(r.atoms) == 1]


def only(found: MatchResult, kind: str) -> Region:
    regions = [r for r in found.regions if r.kind == kind]
    assert len(regions) == 1, [(r.name, r.kind) for r in found.regions]
    return regions[0]


def closed(module: fx.GraphModule, found: MatchResult) -> None:
    """Nothing inside a region is read from outside it, nor does it read anything but its input and constants."""
    nodes = {n.name: n for n in module.graph.nodes}
    for r in found.regions:
        inside = {nodes[n] for n in r.nodes}
        for n in inside:
            assert n.name == r.output or set(n.users) <= inside, (r.name, n.name)
            sources = {a.name for a in n.all_input_nodes if a not in inside and a.op != "get_attr"}
            assert sources <= {r.input}, (r.name, n.name, sources)


def check(module: fx.GraphModule, found: MatchResult) -> None:
    """What holds for every match: atoms are numbered in order and disjoint, everything that is joined covers
    neighbouring atoms exactly, and no node is both in a region and rejected."""
    closed(module, found)
    order = {n.name: i for i, n in enumerate(module.graph.nodes)}
    atoms = [r for r in found.regions if len(r.atoms) == 1]
    assert [r.atoms for r in atoms] == [(i,) for i in range(found.n_atoms)]
    nodes = [n for r in atoms for n in r.nodes]
    assert len(nodes) == len(set(nodes))
    assert not set(nodes) & {n for r in found.rejections for n in r.nodes}
    assert len({r.name for r in found.regions}) == len(found.regions)
    for r in found.regions:
        inside = atoms[r.atoms[0] : r.atoms[-1] + 1]
        assert r.atoms == tuple(a.atoms[0] for a in inside)
        if r.name.endswith("_whole"):  # more than its atoms: what joins them
            assert {n for a in inside for n in a.nodes} < set(r.nodes)
            continue
        assert (r.input, r.output) == (inside[0].input, inside[-1].output)
        assert (r.in_shape, r.out_shape) == (inside[0].in_shape, inside[-1].out_shape)
        assert set(r.nodes) == {n for a in inside for n in a.nodes}
        assert (r.macs, r.params) == (sum(a.macs for a in inside), sum(a.params for a in inside))
        assert max(order[n] for n in r.nodes) == order[r.output]
        if r.parent is not None:
            assert set(r.atoms) < set(found.region(r.parent).atoms)


def run(s: Sketch, *outputs: str, max_span: int | None = None) -> MatchResult:
    module = s.done(*outputs)
    found = match_regions(module, max_span=max_span)
    check(module, found)
    return found


@pytest.mark.parametrize("stride", [1, 2])
def test_a_residual_block_is_one_region_with_its_skip_and_its_activation(sketch: Pen, stride: int) -> None:
    s = sketch(3, 12, 12)
    head(s, residual(s, stem(s), "b", 8, 8 * stride, stride), 8 * stride)
    found = run(s)
    assert by_kind(found) == [("r00", "stem"), ("r01", "residual")]
    region = found.region("r01")
    assert (region.input, region.output, region.final_act) == ("stem_act", "bact", "relu")
    assert set(region.nodes) == {"ba", "br", "bb", "badd", "bact"} | ({"bskip"} if stride == 2 else set())
    size, width = 12 // stride, 8 * stride
    assert (region.in_shape, region.out_shape) == ((8, 12, 12), (width, size, size))
    skip = 8 * width if stride == 2 else 0
    weights = 9 * 8 * width + 9 * width * width + skip
    assert region.macs == size * size * weights
    assert region.params == weights + width * (3 if stride == 2 else 2)


def test_norms_belong_to_the_convolution_before_them(sketch: Pen) -> None:
    s = sketch(3, 12, 12)
    s.chain("x", conv=Conv(3, 8, 3), norm=BatchNorm(8), act=Silu(), down=Conv(8, 8, 3, 2), norm2=BatchNorm(8))
    found = run(s)
    assert [(r.kind, r.nodes, r.final_act) for r in found.regions] == [
        ("stem", ("conv", "norm", "act"), "silu"),
        ("downsample", ("down", "norm2"), ""),
    ]


def inverted(s: Sketch, source: str, tag: str, *, expand: bool, gate: bool, skip: bool) -> str:
    """MobileNet's block over 8 channels."""
    wide = 16 if expand else 8
    at = s.chain(source, **{f"{tag}exp": Conv(8, wide), f"{tag}expact": Silu()}) if expand else source
    at = s.chain(at, **{f"{tag}dw": Conv(wide, wide, 3, 1 if skip else 2, groups=wide), f"{tag}dwact": Silu()})
    if gate:
        squeeze = s.chain(
            at, **{f"{tag}gap": GlobalPool(), f"{tag}fc1": Conv(wide, 4), f"{tag}r": relu(), f"{tag}fc2": Conv(4, wide)}
        )
        at = s.add(f"{tag}mul", Mul(), at, s.add(f"{tag}sig", Unary("Sigmoid"), squeeze))
    at = s.add(f"{tag}proj", Conv(wide, 8), at)
    return s.add(f"{tag}add", Add(), at, source) if skip else at


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("expand", [True, False])
def test_an_inverted_residual_is_one_region(sketch: Pen, expand: bool, gate: bool, skip: bool) -> None:
    s = sketch(3, 12, 12)
    start = stem(s)
    inverted(s, inverted(s, start, "a", expand=expand, gate=gate, skip=skip), "b", expand=True, gate=True, skip=False)
    found = run(s)
    assert by_kind(found) == [("r00", "stem"), ("r01", "inverted_residual"), ("r02", "inverted_residual")]
    region = found.region("r01")
    assert (region.input, region.output) == ("stem_act", "aadd" if skip else "aproj")
    assert all(n.startswith("a") for n in region.nodes)
    assert len(region.nodes) == 3 + 2 * expand + 6 * gate + skip
    assert region.out_shape == ((8, 12, 12) if skip else (8, 6, 6))
    assert region.final_act == ""


def test_plain_convolutions_and_downsampling(sketch: Pen) -> None:
    s = sketch(3, 16, 16)
    s.chain(stem(s), a=Conv(8, 8, 3), ar=relu(), b=Conv(8, 16, 3, 2), br=relu(), point=Conv(16, 8), c=Conv(8, 8, 3))
    found = run(s)
    assert [k for _, k in by_kind(found)] == ["stem", "plain_conv", "downsample", "plain_conv", "plain_conv"]


def test_a_stem_takes_its_pooling_along_and_later_pools_stay_outside(sketch: Pen) -> None:
    s = sketch(3, 16, 16)
    s.chain(stem(s), pool=Pool("MaxPool", (3, 3), (2, 2), (1, 1, 1, 1)), a=Conv(8, 8, 3), ar=relu())
    s.chain("ar", later=Pool("AveragePool", (2, 2), (2, 2)), b=Conv(8, 8, 3))
    found = run(s)
    assert found.region("r00").nodes == ("stem", "stem_act", "pool")
    assert (found.region("r00").out_shape, found.region("r00").final_act) == ((8, 8, 8), "")
    assert by_kind(found)[1:] == [("r01", "plain_conv"), ("r02", "plain_conv")]
    assert [(r.where, r.nodes) for r in found.rejections] == [("later", ("later",))]
    assert "no convolution" in found.rejections[0].reason
    # what is between r01 and r02 keeps them from being a span
    assert found.n_atoms == len(found.regions) == 3


def dense_layer(s: Sketch, source: str, tag: str, c_in: int) -> str:
    """Norm, ReLU, convolution to four channels, concatenated with the input."""
    new = s.chain(source, **{f"{tag}n": BatchNorm(c_in), f"{tag}r": relu(), f"{tag}c": Conv(c_in, 4, 3)})
    return s.add(f"{tag}cat", Concat(), source, new)


def test_dense_layers_nest_in_a_dense_block(sketch: Pen) -> None:
    s = sketch(3, 12, 12)
    at = stem(s)
    for i, tag in enumerate("abc"):
        at = dense_layer(s, at, tag, 8 + 4 * i)
    at = s.chain(at, trans=Conv(20, 8), avg=Pool("AveragePool", (2, 2), (2, 2)))
    dense_layer(s, at, "d", 8)
    found = run(s)
    assert [k for _, k in by_kind(found)] == ["stem", *["dense_layer"] * 3, "plain_conv", "dense_layer"]
    block = only(found, "dense_block")
    assert (block.atoms, block.input, block.output) == ((1, 2, 3), "stem_act", "ccat")
    assert (block.in_shape, block.out_shape) == ((8, 12, 12), (20, 12, 12))
    assert [found.region(f"r{i:02d}").parent for i in range(6)] == [None, *[block.name] * 3, None, None]


def flat_block(s: Sketch, *, bottleneck: bool) -> None:
    """As torchvision's and timm's DenseNets are exported: no node inside is on every path."""
    features = [stem(s)]
    joined = features[0]
    for i, tag in enumerate("abc"):
        c = 8 + 4 * i
        steps: dict[str, Leaf] = {f"{tag}n": BatchNorm(c), f"{tag}r": relu()}
        if bottleneck:
            steps |= {f"{tag}b": Conv(c, 16, 1), f"{tag}h": relu()}
        at = s.chain(joined, **steps, **{f"{tag}c": Conv(16 if bottleneck else c, 4, 3)})
        features.append(at)
        joined = s.add(f"{tag}cat", Concat(1, len(features)), *features)


def test_a_dense_block_that_concatenates_all_its_layers_at_once_is_one_region(sketch: Pen) -> None:
    s = sketch(3, 12, 12)
    flat_block(s, bottleneck=False)
    region = only(run(s), "dense_block")
    assert (region.input, region.output, region.atoms) == ("stem_act", "ccat", (1,))


def test_layers_of_such_a_block_are_regions_where_they_are_more_than_a_convolution(sketch: Pen) -> None:
    s = sketch(3, 12, 12)
    flat_block(s, bottleneck=True)
    found = run(s)
    layers = [r for r in found.regions if r.kind == "dense_layer"]
    ends = [(r.input, r.output, r.out_shape[0]) for r in layers]
    assert ends == [("stem_act", "ac", 4), ("acat", "bc", 4), ("bcat", "cc", 4)]
    assert layers[0].nodes == ("an", "ar", "ab", "ah", "ac")
    block = only(found, "dense_block")
    assert (block.input, block.output, block.atoms) == ("stem_act", "ccat", (1, 2, 3))
    assert all(r.parent == block.name for r in layers)


def attention(s: Sketch, source: str, dim: int, tag: str = "") -> str:
    """Single-head self-attention with a skip connection over (N, tokens, dim)."""
    q, k, v = (s.add(f"{tag}{n}", Linear(dim, dim), source) for n in "qkv")
    scores = s.add(f"{tag}qk", MatMul(), q, s.add(f"{tag}kt", Transpose((0, 2, 1)), k))
    mixed = s.add(f"{tag}av", MatMul(), s.add(f"{tag}soft", Softmax(), scores), v)
    return s.add(f"{tag}plus", Add(), s.add(f"{tag}proj", Linear(dim, dim), mixed), source)


def test_attention(sketch: Pen) -> None:
    s = sketch(5, 8)
    at = s.add("embed", Linear(8, 8), "x")
    attention(s, at, 8)
    region = only(run(s), "attention")
    assert (region.input, region.output) == ("embed", "plus")
    assert (region.in_shape, region.out_shape) == ((5, 8), (5, 8))
    assert region.macs == 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8


def stack(s: Sketch, blocks: int, widths: tuple[int, ...] = ()) -> str:
    """A stem and residual blocks; where `widths` grows, the block has stride 2."""
    at, width = stem(s), 8
    for i in range(blocks):
        wide = widths[i] if i < len(widths) else width
        at = residual(s, at, f"b{i}_", width, wide, 2 if wide > width else 1)
        width = wide
    return at


def spans(found: MatchResult) -> set[tuple[int, ...]]:
    return {r.atoms for r in found.regions if r.kind == "span"}


def test_spans_join_neighbours_but_not_the_stem(sketch: Pen) -> None:
    s = sketch(3, 8, 8)
    stack(s, 4)
    found = run(s)
    assert spans(found) == {(1, 2), (2, 3), (3, 4), (1, 2, 3), (2, 3, 4)}
    # a block's parent is the widest region around it
    parents = {r.name: r.parent for r in found.regions if len(r.atoms) == 1}
    assert parents["r00"] is None
    assert {len(found.region(p).atoms) for p in parents.values() if p} == {3}


def test_spans_have_a_longest_length(sketch: Pen) -> None:
    for longest, want in [(1, set()), (2, {(1, 2), (2, 3)}), (3, {(1, 2), (2, 3), (1, 2, 3)})]:
        s = sketch(3, 8, 8)
        stack(s, 3)
        assert spans(run(s, max_span=longest)) == want


def test_deep_networks_have_pairs_alone(sketch: Pen) -> None:
    s = sketch(3, 4, 4)
    stack(s, 22)
    assert {len(a) for a in spans(run(s))} == {2}


def test_a_span_halves_the_resolution_once_at_most(sketch: Pen) -> None:
    s = sketch(3, 16, 16)
    stack(s, 3, (16, 32, 32))  # 16 → 8 → 4 → 4
    assert spans(run(s)) == {(2, 3)}


def test_the_rest_is_rejected_with_reasons(sketch: Pen) -> None:
    s = sketch(3, 8, 8)
    head(s, residual(s, stem(s), "b", 8, 8), 8)
    found = run(s)
    assert [(r.where, r.nodes) for r in found.rejections] == [("pool … flat", ("pool", "flat")), ("fc", ("fc",))]
    assert "no convolution or matrix product" in found.rejections[0].reason
    assert "head" in found.rejections[1].reason


def test_of_what_reaches_the_outputs_by_two_paths_the_first_has_its_regions(sketch: Pen) -> None:
    s = sketch(3, 8, 8)
    at = residual(s, stem(s), "b", 8, 8)
    left = s.chain(at, left=Conv(8, 4, 3), left_act=relu())
    right = s.chain(at, right=Conv(8, 2, 3), right_pool=GlobalPool())
    found = run(s, left, right)
    assert by_kind(found) == [("r00", "stem"), ("r01", "residual"), ("r02", "plain_conv")]
    assert found.region("r02").nodes == ("left", "left_act")
    assert [r.nodes for r in found.rejections] == [("right", "right_pool")]
    assert "several paths" in found.rejections[0].reason


def test_one_node_alone_may_lead_to_a_second_output(sketch: Pen) -> None:
    s = sketch(3, 8, 8)
    at = residual(s, stem(s), "b", 8, 8)
    found = run(s, at, s.add("more", Conv(8, 2), at))
    assert by_kind(found) == [("r00", "stem"), ("r01", "residual")]
    assert [r.nodes for r in found.rejections] == [("more",)]


def test_a_network_may_end_in_a_depthwise_convolution(sketch: Pen) -> None:
    s = sketch(3, 8, 8)
    s.chain(stem(s), wide=Conv(8, 16), wide_act=relu(), dw=Conv(16, 16, 3, groups=16))
    assert [k for _, k in by_kind(run(s))] == ["stem", "plain_conv", "plain_conv"]


def test_there_are_regions_behind_an_output_in_the_middle(sketch: Pen) -> None:
    s = sketch(3, 8, 8)
    at = residual(s, stem(s), "a", 8, 8)
    end = residual(s, at, "b", 8, 8)
    found = run(s, end, at)
    assert [r.output for r in found.regions if len(r.atoms) == 1] == ["stem_act", "aact", "bact"]
    assert not found.rejections


def test_a_dead_branch_does_not_count(sketch: Pen) -> None:
    s = sketch(3, 8, 8)
    at = residual(s, stem(s), "a", 8, 8)
    s.add("unused", Conv(8, 8, 3), "stem_act")
    found = run(s, at)
    assert by_kind(found) == [("r00", "stem"), ("r01", "residual")]
    assert "unused" not in {n for r in found.regions for n in r.nodes}


def test_the_batch_must_come_first(sketch: Pen) -> None:
    s = sketch(5, 8)
    turned = s.add("turn", Transpose((1, 0, 2)), "x")
    attention(s, turned, 8)
    s.add("back", Transpose((1, 0, 2)), "plus")
    found = run(s)
    assert not found.regions
    assert found.n_atoms == 0
    reasons = [r.reason for r in found.rejections if "plus" in r.nodes]
    assert len(reasons) == 1
    assert "batch is not the first dim" in reasons[0]


def test_a_network_without_inputs_has_no_regions() -> None:
    root, graph = nn.Module(), fx.Graph()
    root.register_buffer("c", torch.ones(1, 3))
    graph.output(graph.get_attr("c"))
    module = fx.GraphModule(root, graph)
    module.meta["info"] = replace(standalone_info((3,), (3,)), inputs=())
    assert match_regions(module).regions == ()


def test_the_pass_on_a_whole_network(lab: Lab) -> None:
    ctx = lab.context()
    state = Match().call(lab.matched, ctx)
    assert state.match is not None
    assert [k for _, k in by_kind(state.match)] == ["stem", "residual", "residual", "residual"]
    assert state.match == lab.matched.match, "the same graph gives the same regions"
    assert state.network is not None
    check(state.network, state.match)
