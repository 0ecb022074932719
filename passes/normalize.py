"""Normalize: imported teacher -> canonical graph with everything folded that folds exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from hantc.dialect.rewrites.normalize import normalize
from hantc.passes.state import Context, State


class Normalize:
    """Imported teacher -> canonical graph: constants and norms folded, x·σ(x) fused, dead code gone; exact."""

    name: ClassVar[str] = "normalize"
    requires: ClassVar[tuple[str, ...]] = ("teacher",)
    ensures: ClassVar[tuple[str, ...]] = ("network",)

    def call(self, state: State, ctx: Context) -> State:
        """Apply the named rewrites of `hantc.dialect.rewrites` to a fixpoint."""
        assert state.teacher is not None
        network, applied, missed = normalize(state.teacher)
        for a in applied:
            ctx.reporter.event("rewrite", name=a.rewrite, nodes=list(a.nodes), note=a.note)
        return replace(state, network=network, applied=tuple(applied), missed=tuple(missed))
