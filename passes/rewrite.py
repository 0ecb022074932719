"""Rewrite: plan -> student network."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from hantc.passes.assemble import Blueprint, build_student
from hantc.passes.program import specs_of
from hantc.passes.state import Context, State


class Rewrite:
    """Plan -> student graph, with the chosen candidates (as distilled) in the regions' places."""

    name: ClassVar[str] = "rewrite"
    requires: ClassVar[tuple[str, ...]] = ("network", "plan", "weights")
    ensures: ClassVar[tuple[str, ...]] = ("student",)

    def call(self, state: State, ctx: Context) -> State:
        """Wire the candidates in."""
        assert state.plan is not None
        return replace(state, student=build_student(state, Blueprint.of(state.plan.choices), specs_of(state)))
