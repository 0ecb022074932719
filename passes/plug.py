"""Candidates put into networks: built from their trained weights, folded, rounded, wired in."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import fx

from hantc.core.types import CandidateSpec, Region, Signature
from hantc.dialect.graph import cut, node_named
from hantc.dialect.rewrites.normalize import normalize
from hantc.ops.registry import build
from hantc.passes.state import WeightMap


def trained(region: Region, spec: CandidateSpec, weights: WeightMap, *, fold: bool = True) -> fx.GraphModule:
    """The candidate with its trained weights, in evaluation mode; norms folded on request."""
    module = build(spec, Signature.of(region))
    module.load_state_dict(dict(weights))
    module.eval()
    return normalize(module)[0] if fold else module


def teacher_part(network: fx.GraphModule, region: Region) -> fx.GraphModule:
    """The region as the teacher has it, on its own (a copy)."""
    part = copy.deepcopy(cut(network, region.input, region.output, region.in_shape, region.out_shape))
    part.eval()
    return part


def replace_regions(
    network: fx.GraphModule, replacements: Sequence[tuple[Region, fx.GraphModule]]
) -> fx.GraphModule:
    """A copy of `network` in which each region is one call of its replacement (a submodule named after the
    region). What becomes dead is dropped; `meta["info"]` stays."""
    made = copy.deepcopy(network)
    # last region first: its entry is the exit of the one before, which must still be there by name
    for region, module in sorted(replacements, key=lambda r: r[0].atoms[0], reverse=True):
        made.add_submodule(region.name, module)
        entry, exit_ = node_named(made, region.input), node_named(made, region.output)
        with made.graph.inserting_after(exit_):
            call = made.graph.create_node("call_module", region.name, (entry,), name=region.name)
        exit_.replace_all_uses_with(call, delete_user_cb=lambda user, c=call: user is not c)
        made.graph.eliminate_dead_code()
    made.delete_all_unused_submodules()
    made.graph.lint()
    made.recompile()
    made.meta["info"] = network.meta["info"]
    return made

