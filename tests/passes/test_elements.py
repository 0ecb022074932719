"""Regions inside parts with several paths."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hantc.core.config import Cap
from hantc.core.types import MatchResult, Region
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Add
from hantc.dialect.emitter import emit
from hantc.dialect.graph import standalone_info
from hantc.dialect.importer import import_model
from hantc.dialect.linear import Linear
from hantc.dialect.shape import Concat
from hantc.passes import elements
from hantc.passes.cost import Cost
from hantc.passes.engine import divergence, output_kind
from hantc.passes.glue import inner_glue
from hantc.passes.limits import allowances
from hantc.passes.match import match_regions
from hantc.passes.plug import compose, replace_regions, teacher_part
from hantc.passes.program import make_problem
from hantc.passes.score import Score, _Entry
from tests.passes.conftest import CLASSES, SIZE
from tests.passes.test_match import Pen, attention, by_kind, closed, head, relu, residual, stem

if TYPE_CHECKING:
    from hantc.passes.state import State
    from tests.passes.conftest import Lab, Sketch


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
    closed(module, found)
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


@pytest.mark.parametrize(("blocks", "inside"), [(3, False), (6, True)])
def test_attention_beside_something_else_is_looked_into(sketch: Pen, blocks: int, inside: bool) -> None:
    s = sketch(5, 8)  # tokens as in CaiT: a class token joins the others behind all their blocks
    start = at = s.add("embed", Linear(8, 8), "x")
    for i in range(blocks):
        at = attention(s, at, 8, f"b{i}")
    s.add("late", Add(), at, s.add("token", Linear(8, 8), start))
    module = s.done()
    found = match_regions(module)
    closed(module, found)
    attentions = {r.output for r in found.regions if r.kind == "attention" and len(r.atoms) == 1}
    assert attentions == ({f"b{i}plus" for i in range(blocks)} if inside else {"late"})


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


def test_a_value_that_others_read_ends_a_span(sketch: Pen) -> None:
    s = sketch(3, 8, 8)
    at = s.chain(stem(s), a=Conv(8, 8, 3), ar=relu(), b=Conv(8, 8, 3), br=relu())
    one = residual(s, at, "c", 8, 8)
    for i in range(12):
        one = residual(s, one, f"d{i}", 8, 8)
    s.add("cat", Concat(1), one, s.add("side", Conv(8, 8), at))
    module = s.done(head(s, "cat", 16))
    found = match_regions(module)
    closed(module, found)
    ends = {(r.input, r.output) for r in found.regions if r.kind == "span"}
    assert ("cact", "d1act") in ends and not [e for e in ends if e[0] in ("ar", "stem_act") and e[1] == "cact"]


def test_what_the_first_output_does_not_depend_on_is_left_alone(sketch: Pen) -> None:
    s = sketch(3, 8, 8)
    at = stem(s)
    first, second = residual(s, at, "a", 8, 8), residual(s, at, "b", 8, 8)
    found = match_regions(s.done(first, second))
    assert [r.output for r in found.regions] == ["stem_act", "aact"]
    assert any("bact" in r.nodes and "first output" in r.reason for r in found.rejections)


def test_without_nesting_a_part_is_one_region(sketch: Pen) -> None:
    s = sketch(3, 8, 8)
    module = s.done(head(s, stage(s, stem(s), "s", blocks=6), 8))
    assert {r.output for r in match_regions(module, nested=False).regions if len(r.atoms) == 1} == {
        "stem_act",
        "scat",
        "sjr",
    }


def staged(lab: Lab, sketch: Pen) -> State:
    """A network with blocks inside a part, matched; its input and classes are the lab's."""
    s = sketch(3, SIZE, SIZE)
    torch.manual_seed(0)
    module = s.done(head(s, stage(s, stem(s), "s", blocks=6), 8))
    module.meta["info"] = standalone_info((3, SIZE, SIZE), (CLASSES,))
    return replace(lab.begin(), network=module, match=match_regions(module), model=emit(module).model)


def test_a_block_inside_is_scored_as_in_the_network(lab: Lab, sketch: Pen) -> None:
    state = staged(lab, sketch)
    network, match = state.network, state.match
    assert network is not None and match is not None
    x, y = lab.labelled.val.batch(list(range(8)))
    kind = output_kind(network, x[:2], CLASSES)
    entries, wanted = [], []
    for region in match.regions:
        part = teacher_part(network, region)
        with torch.no_grad():
            for p in part.parameters():
                p.mul_(1.1)
            entries.append(_Entry(region, "c", "fp32", part, ""))
            wanted.append(divergence(kind, compose(network, [(region, part)])(x), network(x)))
    with torch.no_grad():
        Score._batch(network, kind, entries, x, y, first=True, blended=False)
    for e, want in zip(entries, wanted, strict=True):
        assert torch.allclose(e.losses[0], want, atol=1e-6), e.region.name
    assert max(float(w.max()) for w in wanted) > 1e-6


def test_a_whole_does_not_pay_for_what_lies_between_its_blocks_twice(lab: Lab, sketch: Pen) -> None:
    ctx = lab.fresh()
    state = Cost().call(replace(staged(lab, sketch), proposals=()), ctx)
    match, costs = state.match, state.costs
    assert match is not None and costs is not None
    whole = whole_of(match)
    beyond = inner_glue(match, costs.rows)
    assert set(beyond) == {whole.name} and 0 <= beyond[whole.name] < 0.1 * costs.teacher_ms
    blocks = [r for r in match.regions if len(r.atoms) == 1]
    total = sum(costs.by_key()[r.name, "teacher", "fp32"].latency_ms for r in blocks)
    assert costs.scale * total + costs.glue_ms == pytest.approx(costs.teacher_ms)
    state = Score().call(replace(state, weights={}), ctx)
    problem = make_problem(state, 1e9)
    own = {i.region: i.cost for i in problem.items if i.candidate == "teacher" and i.precision == "fp32"}
    inside = [r.name for r in blocks if r.atoms[0] in whole.atoms]
    assert own[whole.name] == pytest.approx(sum(own[n] for n in inside), rel=0.02)
    bounds = allowances(
        replace(state, costs=costs), replace(ctx, config=ctx.config.model_copy(update={"budget_macs": Cap(1.0)}))
    )
    (macs,) = bounds
    rest = [r.name for r in blocks if r.name not in inside]
    for cover in ([*inside, *rest], [whole.name, *rest]):
        assert macs.fixed + sum(macs.uses[n, "teacher"] for n in cover) == pytest.approx(macs.teacher)


@pytest.mark.parametrize("seed", range(6))
def test_what_lies_between_is_found_by_looking_back_alone(seed: int) -> None:
    """On random graphs in which every path passes each of the chain's values, against the definition."""
    rng = np.random.default_rng(seed)
    g: Any = nx.DiGraph()
    chain = ["v0"]
    for k in range(5):
        entry, exit_ = f"v{k}", f"v{k + 1}"
        inside = [f"v{k}.{i}" for i in range(int(rng.integers(0, 6)))]
        for i, name in enumerate(inside):
            before = [entry, *inside[:i]]
            g.add_edges_from((before[int(j)], name) for j in rng.integers(0, len(before), 2))
            g.add_edge(name, exit_)
        g.add_edge(entry, exit_)
        chain.append(exit_)
    for i, entry in enumerate(chain):
        for exit_ in chain[i + 1 :]:
            wanted = (nx.descendants(g, entry) & nx.ancestors(g, exit_)) | {exit_}
            assert elements._between(g, entry, exit_) == wanted
