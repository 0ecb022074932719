"""Deploy: emitted model -> the target's own file (an engine), where its backend has one."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from hantc.core.backend_api import BuildSpec, Deployed, Deployer, Optimizer
from hantc.core.errors import HantcError
from hantc.passes.state import Context, State

_FAR = 0.1  # of the largest output: rounding puts two engines less than that apart
_LISTED = 8  # layers named in a note; the summary has all


class Deploy:
    """Emitted model -> the file that the target's engine loads; without one the run is not as asked, but whole."""

    name: ClassVar[str] = "deploy"
    requires: ClassVar[tuple[str, ...]] = ("emitted",)
    ensures: ClassVar[tuple[str, ...]] = ()

    def call(self, state: State, ctx: Context) -> State:
        """Build it; what goes wrong is told, and does not take the student with it."""
        assert state.emitted is not None
        optimized = ctx.config.optimized and isinstance(ctx.backend, Optimizer)
        if not optimized and not isinstance(ctx.backend, Deployer):
            return state
        spec = BuildSpec(ctx.threads, ctx.config.batch)
        try:
            with ctx.reporter.bar("building the engine's own file", 1.0):
                if optimized and isinstance(ctx.backend, Optimizer):
                    made = ctx.backend.optimized(state.emitted, spec)
                else:
                    assert isinstance(ctx.backend, Deployer)
                    made = ctx.backend.deploy(state.emitted, spec)
        except Exception as error:  # a third party's code may raise anything, and an engine's builder does
            reason = error.message if isinstance(error, HantcError) else f"{type(error).__name__}: {error}"
            ctx.note(f"no engine: {reason}")
            return replace(state, undeployed=reason)
        if optimized:
            ctx.note(f"{made.file} is for {made.facts['device']} and {made.facts['built_by']} alone; model.onnx is not")
        else:
            self._tell(made, ctx)
        return replace(state, deployed=made)

    @staticmethod
    def _tell(made: Deployed, ctx: Context) -> None:
        facts = made.facts
        ctx.reporter.event("deploy", **{k: v for k, v in facts.items() if k != "messages"})
        wide = list(facts.get("float32_layers", ()))
        types = "every layer in FP16"
        if wide:
            types = f"{len(wide)} layers in FP32: {', '.join(wide[:_LISTED])}{' …' if len(wide) > _LISTED else ''}"
        products = dict(facts.get("products", {}))
        if rounded := products.get("int8", 0):
            rest = types if wide else "the rest in FP16"
            types = f"{rounded} of {sum(products.values())} convolutions and matrix products in INT8, {rest}"
        tried = "and not run: no such GPU was used"
        if "not_run" in facts:
            tried = f"and not run: {facts['not_run']}"
        elif "run_on" in facts:
            error = facts["relative_error"]
            told = "random input overflows" if error is None else f"within {error:.2g} of ONNX Runtime"
            tried = f"and run on {facts['run_on']}: {told}"
        ctx.note(
            f"{made.file} was built for {facts['compute_capability']} by {facts['built_by']} in "
            f"{facts['seconds']:.1f} s ({types}), {tried}"
        )
        if (facts.get("relative_error") or 0.0) > _FAR:
            ctx.note(
                f"{made.file} computes something else than model.onnx: on random input its outputs are "
                f"{facts['relative_error']:.2g} of the largest away; do not use it before you know why"
            )
        for message in facts.get("messages", ()):
            ctx.note(f"the engine's builder says: {message}")
