"""Regions inside parts with several paths."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

from hantc.core.types import MatchResult, Region
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Add
from hantc.dialect.importer import import_model
from hantc.dialect.shape import Concat
from hantc.passes.match import match_regions
from hantc.passes.plug import replace_regions, teacher_part
from tests.passes.test_match import Pen, by_kind, head, relu, residual, stem

if TYPE_CHECKING:
    from tests.passes.conftest import Sketch


def stage(s: Sketch, source: str, tag: str, blocks: int = 4) -> str:
    """A stage that splits and joins: half through some blocks, half beside them (CSPNet), then one convolution."""
    left = s.chain(source, **{f"{tag}l": Conv(8, 8), f"{tag}lr": relu()})
    right = s.chain(source, **{f"{tag}p": Conv(8, 8), f"{tag}pr": relu()})
    for i in range(blocks):
        left = residual(s, left, f"{tag}{i}", 8, 8)
    s.add(f"{tag}cat", Concat(1), left, right)
    return s.chain(f"{tag}cat", **{f"{tag}j": Conv(16, 8), f"{tag}jr": relu()})


def whole_of(found: MatchResult) -> Region:
    (whole,) = [r for r in found.regions if r.name.endswith("_whole")]
    return whole


def test_blocks_of_a_large_part_are_regions_and_so_is_the_part(sketch: Pen) -> None:
    s = sketch(3, 8, 8)
    end = stage(s, stem(s), "s", blocks=6)
    module = s.done(head(s, end, 8))
    found = match_regions(module)
    kinds = [k for _, k in by_kind(found)]
    assert kinds.count("residual") == 6 and kinds[0] == "stem"
    atoms = [r for r in found.regions if len(r.atoms) == 1]
    assert [r.atoms for r in atoms] == [(i,) for i in range(found.n_atoms)]
    nodes = [n for r in atoms for n in r.nodes]
    assert len(nodes) == len(set(nodes)) and "scat" not in nodes
    whole = whole_of(found)
    inside = [r for r in atoms if r.atoms[0] in whole.atoms]
    assert {r.output for r in inside} == {"slr", "spr", *(f"s{i}act" for i in range(6))}
    assert (whole.input, whole.output) == ("stem_act", "scat")
    assert {n for r in inside for n in r.nodes} < set(whole.nodes)
    assert whole.macs == sum(r.macs for r in inside)
    assert all(r.parent for r in inside)
    spans = {r.atoms for r in found.regions if r.kind == "span"}
    outputs = {r.atoms[0]: r for r in atoms}
    assert spans and all(outputs[a].output == outputs[b].input for span in spans for a, b in pairwise(span))


def test_a_small_part_stays_one_operation(sketch: Pen) -> None:
    s = sketch(3, 8, 8)
    found = match_regions(s.done(head(s, stage(s, stem(s), "s", blocks=2), 8)))
    assert not [r for r in found.regions if r.name.endswith("_whole")]
    assert ("stem_act", "scat") in {(r.input, r.output) for r in found.regions}


def test_what_is_read_from_outside_is_no_block(sketch: Pen) -> None:
    s = sketch(3, 8, 8)
    start = stem(s)
    left = right = start
    for i in range(4):
        left = residual(s, left, f"l{i}", 8, 8)
        s.add(f"x{i}", Add(), residual(s, right, f"r{i}", 8, 8), f"l{i}r")  # reads a value inside the left block
        right = f"x{i}"
    s.add("join", Concat(1), left, right)
    found = match_regions(s.done(head(s, "join", 16)))
    outputs = {r.output for r in found.regions}
    assert not outputs & {f"l{i}act" for i in range(4)} and {f"r{i}act" for i in range(4)} <= outputs


def test_stages_that_exchange_are_taken_apart_to_any_depth(sketch: Pen) -> None:
    s = sketch(3, 8, 8)
    start = stem(s)
    inner = [stage(s, start, tag, blocks=6) for tag in ("a", "b")]
    s.add("join", Add(), *inner)
    found = match_regions(s.done(head(s, "join", 8)))
    assert {f"{t}{i}act" for t in "ab" for i in range(6)} <= {r.output for r in found.regions if r.kind == "residual"}
    assert len([r for r in found.regions if r.name.endswith("_whole")]) == 1, "the outermost"


def test_what_gives_several_values_goes_with_what_reads_them() -> None:
    w = {
        n: np.ones((8 if n != "inner" else 4, i, 1, 1), np.float32) for n, i in (("stem", 3), ("inner", 4), ("last", 8))
    }
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["a"]),
        helper.make_node("Split", ["a"], ["p", "q"], axis=1),
        helper.make_node("Conv", ["q", "inner"], ["c"]),
        helper.make_node("Concat", ["p", "c"], ["cat"], axis=1),
        helper.make_node("Conv", ["cat", "last"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", c, 6, 6]) for n, c in (("x", 3), ("y", 8))]
    weights = [numpy_helper.from_array(v, n) for n, v in w.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    module = import_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8))
    c2f = match_regions(module).region("r01")
    assert (c2f.in_shape, c2f.out_shape, len(c2f.nodes)) == ((8, 6, 6), (8, 6, 6), 5)


def test_candidates_stand_in_for_blocks_inside(sketch: Pen) -> None:
    """Each block replaced by a copy of itself: the network computes what it did, whichever are taken."""
    s = sketch(3, 8, 8)
    module = s.done(head(s, stage(s, stem(s), "s", blocks=6), 8))
    found = match_regions(module)
    x = torch.randn(2, 3, 8, 8)
    want = module(x)
    atoms = [r for r in found.regions if len(r.atoms) == 1]
    for chosen in (atoms, atoms[::2], [whole_of(found), atoms[0]]):
        made = replace_regions(module, [(r, teacher_part(module, r)) for r in chosen])
        assert torch.allclose(made(x), want, atol=1e-5)
