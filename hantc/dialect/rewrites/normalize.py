"""Run all exact rewrites until nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import fx

from hantc.core.errors import HantcError
from hantc.dialect.rewrites.base import Applied, Missed, Rewrite
from hantc.dialect.rewrites.registry import REWRITES

_ROUNDS = 50  # every rewrite removes or renames nodes for good, so a graph settles in a few


def normalize(
    gm: fx.GraphModule, rewrites: Sequence[Rewrite] = REWRITES
) -> tuple[fx.GraphModule, list[Applied], list[Missed]]:
    """A rewritten copy of `gm` (graph and node `meta` kept), what was done to it in order, and what nearly
    matched in the final graph but had to stay. `gm` itself is not changed. HantcError if the rewrites do
    not settle (a bug)."""
    made = copy.deepcopy(gm)
    applied: list[Applied] = []
    for _ in range(_ROUNDS):
        done: list[Applied] = []
        missed: list[Missed] = []
        for rewrite in rewrites:
            did, not_done = rewrite.apply(made)
            done += did
            missed += not_done
        applied += done
        if not done:
            return made, applied, missed
    raise HantcError("the exact rewrites do not settle", where=", ".join(sorted({a.rewrite for a in applied[-5:]})))
