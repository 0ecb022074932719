"""Candidates put into networks: built from their trained weights, folded, rounded, wired in."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence

from torch import Tensor, fx, nn

from hantc.core.types import CandidateSpec, MatchResult, Region, Signature
from hantc.dialect.graph import cut
from hantc.dialect.rewrites.normalize import normalize
from hantc.ops.registry import DERIVED, Origin, build
from hantc.passes.state import WeightMap


def origin_of(network: fx.GraphModule, match: MatchResult, region: Region, samples: Tensor | None = None) -> Origin:
    """What candidates of `region` are derived from (the teacher's own modules, shared). `samples`: (N, *in_shape)."""

    def part(r: Region) -> fx.GraphModule:
        return cut(network, r.input, r.output, r.in_shape, r.out_shape)

    atoms = [r for r in match.regions if len(r.atoms) == 1 and set(r.atoms) < set(region.atoms)]
    blocks = sorted(atoms, key=lambda r: r.atoms)
    return Origin(part(region), tuple(part(r) for r in blocks), samples)


def origin_for(spec: CandidateSpec, network: fx.GraphModule, match: MatchResult, region: Region) -> Origin | None:
    """`origin_of`, where the candidate's family needs one."""
    return origin_of(network, match, region) if spec.family in DERIVED else None


def trained(
    region: Region, spec: CandidateSpec, weights: WeightMap, *, origin: Origin | None = None, fold: bool = True
) -> fx.GraphModule:
    """The candidate with its trained weights, in evaluation mode; norms folded on request."""
    module = build(spec, Signature.of(region), origin=origin)
    module.load_state_dict(dict(weights))
    module.eval()
    return normalize(module)[0] if fold else module


def teacher_part(network: fx.GraphModule, region: Region) -> fx.GraphModule:
    """The region as the teacher has it, on its own (a copy)."""
    part = copy.deepcopy(cut(network, region.input, region.output, region.in_shape, region.out_shape))
    part.eval()
    return part


def compose(network: fx.GraphModule, parts: Sequence[tuple[Region, nn.Module]]) -> fx.GraphModule:
    """`network` with each region as one call of its replacement (a submodule named after the region). All
    modules are shared, so that thousands of compositions cost milliseconds each; `meta["info"]` stays."""
    inside = {name: region for region, _ in parts for name in region.nodes}
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    named = {n.name: n for n in network.graph.nodes}
    modules: dict[str, nn.Module] = {region.name: module for region, module in parts}
    for node in network.graph.nodes:
        region = inside.get(node.name)
        if region is None:
            env[node] = graph.node_copy(node, lambda n: env[n])
            if node.op in ("call_module", "get_attr"):
                modules[str(node.target)] = operator.attrgetter(str(node.target))(network)
        elif node.name == region.output:
            entry = env[named[region.input]]
            env[node] = graph.create_node("call_module", region.name, (entry,), name=region.name)
    made = fx.GraphModule(modules, graph)
    made.meta.update(network.meta)
    made.eval()
    return made


def replace_regions(network: fx.GraphModule, replacements: Sequence[tuple[Region, nn.Module]]) -> fx.GraphModule:
    """`compose`, but a copy that owns its modules: what is trained on and emitted."""
    composed = compose(network, replacements)
    made = copy.deepcopy(composed)
    made.graph.lint()
    made.meta.update(network.meta)
    return made
