"""Putting parts into a network."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, fx

from hantc.core.types import CandidateSpec, MatchResult, Region, Signature
from hantc.dialect.activation import Unary
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Add
from hantc.dialect.emitter import emit
from hantc.dialect.norm import BatchNorm
from hantc.ops.registry import build
from hantc.passes.match import match_regions
from hantc.passes.plug import replace_regions, teacher_part, trained

if TYPE_CHECKING:
    from tests.passes.conftest import Lab, Sketch

BLOCKS = ("r01", "r02", "r03")


def network_of(lab: Lab) -> tuple[fx.GraphModule, MatchResult]:
    assert lab.matched.network is not None and lab.matched.match is not None
    return lab.matched.network, lab.matched.match


def images(lab: Lab) -> Tensor:
    return lab.labelled.val.batch(list(range(8)))[0]


def run(module: fx.GraphModule, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = module(x)
    return out


def names(module: fx.GraphModule) -> list[str]:
    return [n.name for n in module.graph.nodes]


class Scaled(torch.nn.Module):
    """Its input times a number: something to recognise in the output."""

    def __init__(self, part: fx.GraphModule, by: float) -> None:
        super().__init__()
        self.part, self.by = part, by

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.part(x) * self.by
        return out


@pytest.mark.parametrize("picked", [p for n in (1, 2, 3) for p in itertools.combinations(BLOCKS, n)])
def test_the_teachers_own_parts_change_nothing(lab: Lab, picked: tuple[str, ...]) -> None:
    """Also where the regions are neighbours, so that one's entry is the other's exit."""
    network, match = network_of(lab)
    regions = [match.region(name) for name in picked]
    made = replace_regions(network, [(r, teacher_part(network, r)) for r in regions])
    assert torch.allclose(run(made, images(lab)), run(network, images(lab)), atol=1e-5)
    gone = {n for r in regions for n in r.nodes}
    assert not gone & set(names(made)), "what was replaced is not computed beside its replacement"
    assert set(names(network)) - gone == set(names(made)) - set(picked)
    assert [n for n in names(made) if n in picked] == list(picked)
    assert all(isinstance(made.get_submodule(name), fx.GraphModule) for name in picked)
    made.graph.lint()


def test_a_span_is_one_part(lab: Lab) -> None:
    network, match = network_of(lab)
    span = match.region("r01_r03")
    made = replace_regions(network, [(span, teacher_part(network, span))])
    assert torch.allclose(run(made, images(lab)), run(network, images(lab)), atol=1e-5)
    assert "r01_r03" in names(made)


def test_the_order_in_which_parts_are_given_does_not_matter(lab: Lab) -> None:
    network, match = network_of(lab)
    parts = [(match.region(n), teacher_part(network, match.region(n))) for n in BLOCKS]
    for order in itertools.permutations(parts):
        assert torch.equal(
            run(replace_regions(network, order), images(lab)), run(replace_regions(network, parts), images(lab))
        )


def test_the_replacement_is_really_used(lab: Lab) -> None:
    network, match = network_of(lab)
    spec = CandidateSpec.make("cb_stack", k=3, w=1.0)
    torch.manual_seed(0)
    module = build(spec, Signature.of(match.region("r02")))
    made = replace_regions(network, [(match.region("r02"), module)])
    assert not torch.allclose(run(made, images(lab)), run(network, images(lab)), atol=1e-2)
    taken = made.get_submodule("r02")
    pairs = zip(taken.state_dict().values(), module.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_network_stays_as_it_was_and_shares_nothing_that_trains(lab: Lab) -> None:
    network, match = network_of(lab)
    before, weights = names(network), {k: v.clone() for k, v in network.state_dict().items()}
    made = replace_regions(network, [(match.region("r01"), teacher_part(network, match.region("r01")))])
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    assert names(network) == before
    assert all(torch.equal(v, weights[k]) for k, v in network.state_dict().items())


def test_nothing_to_replace_gives_a_copy(lab: Lab) -> None:
    network, _ = network_of(lab)
    made = replace_regions(network, [])
    assert made is not network
    assert torch.equal(run(made, images(lab)), run(network, images(lab)))
    assert made.meta["info"] == network.meta["info"]


def test_the_result_can_be_emitted(lab: Lab) -> None:
    network, match = network_of(lab)
    made = replace_regions(network, [(match.region(n), teacher_part(network, match.region(n))) for n in BLOCKS])
    emitted = emit(made)
    assert all(emitted.nodes[n] and all(v.startswith(f"{n}/") for v in emitted.nodes[n]) for n in BLOCKS)
    session = ort.InferenceSession(emitted.model.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": images(lab).numpy()})
    assert torch.allclose(torch.from_numpy(out), run(network, images(lab)), atol=1e-4)


def last_block(sketch: type[Sketch]) -> tuple[fx.GraphModule, Region]:
    """A network whose output is a region's output."""
    s = sketch(3, 8, 8)
    at = s.add("stem", Conv(3, 8, 3), "x")
    s.add("plus", Add(), s.add("body", Conv(8, 8, 3), at), at)
    module = s.done()
    return module, match_regions(module).region("r01")


def test_the_last_region_may_be_the_networks_output(sketch: type[Sketch]) -> None:
    module, region = last_block(sketch)
    assert region.output == "plus"
    x = torch.randn(2, 3, 8, 8)
    made = replace_regions(module, [(region, teacher_part(module, region))])
    assert torch.allclose(run(made, x), run(module, x), atol=1e-6)
    output = next(n for n in made.graph.nodes if n.op == "output")
    assert [n.name for n in output.all_input_nodes] == ["r01"]


def test_a_region_whose_output_is_also_read_further_on(sketch: type[Sketch]) -> None:
    """An output in the middle of the network: both readers get the replacement's value."""
    s = sketch(3, 8, 8)
    at = s.add("stem", Conv(3, 8, 3), "x")
    joined = s.add("plus", Add(), s.add("body", Conv(8, 8, 3), at), at)
    module = s.done(joined, s.chain(joined, more=Conv(8, 4, 1), act=Unary("Relu")))
    region = match_regions(module).region("r01")
    double: fx.GraphModule = fx.symbolic_trace(Scaled(teacher_part(module, region), 2.0))
    made, more = replace_regions(module, [(region, double)]), module.get_submodule("more")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        (a, b), (c, d) = module(x), made(x)
        assert torch.allclose(c, 2 * a, atol=1e-5)
        assert torch.allclose(d, torch.relu(more(2 * a)), atol=1e-5)
    assert b.shape == d.shape


def test_what_the_model_declares_survives(sketch: type[Sketch]) -> None:
    module, region = last_block(sketch)
    module.meta["unranked"] = ("y",)
    made = replace_regions(module, [(region, teacher_part(module, region))])
    assert made.meta["info"] is module.meta["info"]
    assert made.meta.get("unranked") == ("y",), "the emitter declares these outputs without a shape"


def test_trained_parts_are_folded_on_request(lab: Lab) -> None:
    _, match = network_of(lab)
    region, spec = match.region("r03"), CandidateSpec.make("cb_stack", k=3, w=0.5)
    torch.manual_seed(3)
    source = build(spec, Signature.of(region))
    for norm in (m for m in source.modules() if isinstance(m, BatchNorm)):
        torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
        torch.nn.init.normal_(norm.running_mean)
    weights = source.state_dict()
    plain, folded = trained(region, spec, weights, fold=False), trained(region, spec, weights)
    x = torch.randn(2, *region.in_shape)
    assert torch.equal(run(plain, x), run(source, x))
    assert torch.allclose(run(folded, x), run(source, x), atol=1e-4)
    assert any(isinstance(m, BatchNorm) for m in plain.modules())
    assert not any(isinstance(m, BatchNorm) for m in folded.modules())
    assert not plain.training and not folded.training
    with pytest.raises(RuntimeError):
        trained(match.region("r01"), spec, weights)  # weights of another shape


def test_a_teachers_part_computes_the_region(lab: Lab) -> None:
    network, match = network_of(lab)
    for region in match.regions:
        part = teacher_part(network, region)
        x = torch.randn(2, *region.in_shape)
        assert run(part, x).shape == (2, *region.out_shape)
        assert sum(p.numel() for p in part.parameters()) == region.params
