"""The target's own file: made where the backend has one, told of, and never in the student's way."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import onnx

from hantc.backends.roofline.backend import RooflineBackend
from hantc.core.backend_api import BuildSpec, Deployed
from hantc.core.errors import HantcError
from hantc.passes.deploy import Deploy
from hantc.passes.state import Context, State

if TYPE_CHECKING:
    from tests.passes.conftest import Lab

FACTS = {"compute_capability": "SM00", "built_by": "a test", "seconds": 1.0, "float32_layers": [], "messages": []}


class Builder(RooflineBackend):
    """Deploys as told."""

    def __init__(self, **facts: Any) -> None:
        super().__init__()
        self.facts, self.seen = {**FACTS, **facts}, list[tuple[onnx.ModelProto, BuildSpec]]()

    def deploy(self, model: onnx.ModelProto, spec: BuildSpec) -> Deployed:
        self.seen.append((model, spec))
        if "fails" in self.facts:
            raise HantcError("no room")
        return Deployed(b"engine", "model.engine", self.facts)


def deployed(lab: Lab, backend: RooflineBackend) -> tuple[State, Context]:
    ctx = replace(lab.fresh(), backend=backend)
    return Deploy().call(replace(lab.matched, emitted=lab.matched.model), ctx), ctx


def test_a_backend_without_files_of_its_own_gets_none(lab: Lab) -> None:
    state, ctx = deployed(lab, RooflineBackend())
    assert state.deployed is None and state.undeployed == "" and not ctx.notes


def test_the_emitted_file_is_what_is_deployed(lab: Lab) -> None:
    backend = Builder()
    state, ctx = deployed(lab, backend)
    assert state.deployed is not None and state.deployed.data == b"engine"
    assert [(m is state.emitted, s.batch) for m, s in backend.seen] == [(True, ctx.config.batch)]
    assert any("every layer in FP16" in note and "not run" in note for note in ctx.notes)


def test_products_in_int8_are_told(lab: Lab) -> None:
    _, ctx = deployed(lab, Builder(products={"int8": 3, "fp16": 2}))
    assert any("(3 of 5 convolutions and matrix products in INT8, the rest in FP16)" in note for note in ctx.notes)


def test_layers_in_fp32_and_the_builders_words_are_told(lab: Lab) -> None:
    _, ctx = deployed(lab, Builder(float32_layers=["softmax", "norm"], messages=["beware"]))
    assert any("2 layers in FP32: softmax, norm" in note for note in ctx.notes)
    assert any("beware" in note for note in ctx.notes)


def test_an_engine_that_computes_something_else_is_told(lab: Lab) -> None:
    for error, far in ((0.01, False), (None, False), (0.5, True)):
        _, ctx = deployed(lab, Builder(run_on="a GPU", relative_error=error))
        assert any("computes something else" in note for note in ctx.notes) == far


def test_failing_leaves_the_student(lab: Lab) -> None:
    state, ctx = deployed(lab, Builder(fails=True))
    assert state.deployed is None and state.undeployed == "no room" and state.emitted is not None
    assert "no engine: no room" in ctx.notes
