"""What a user might choose instead: other engines, fewer threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from onnx import ModelProto

from hantc.backends.roofline.backend import RooflineBackend
from hantc.core.backend_api import Artefact, BuildSpec, Capabilities
from hantc.core.errors import ModelError
from hantc.core.types import Protocol, Timing
from hantc.passes.elsewhere import by_backend, by_threads, tell
from hantc.passes.state import Context
from tests.passes.conftest import COUNTING
from tests.passes.test_verify import Tiring

if TYPE_CHECKING:
    from tests.passes.conftest import Lab


class Rival(Tiring):
    """Another engine on the same machine, `pace` times as slow."""

    name = "rival"

    def __init__(self, shared: Tiring, pace: float) -> None:
        super().__init__()
        self.shared, self.pace = shared, pace

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        """As the machine is by now, which the other engine's turns have tired."""
        timings = self.shared.measure(artefacts, protocol)
        self.shared.calls -= 1  # within a turn it is as it was
        return [replace(t, median_ms=self.pace / 2 * t.median_ms) for t in timings]


class Refusing(Rival):
    """An engine that takes no model."""

    name = "refusing"

    def build(self, model: ModelProto, spec: BuildSpec) -> Artefact:
        """Never."""
        raise ModelError("no")


class Large(RooflineBackend):
    """A machine of many cores: so many milliseconds on so many threads. It cannot be asked for `refused` of them."""

    def __init__(self, ms: Mapping[int, float], refused: int = 0) -> None:
        super().__init__(COUNTING)
        self.ms, self.refused = ms, refused

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), measures=True)

    def build(self, model: ModelProto, spec: BuildSpec) -> Artefact:
        if spec.threads == self.refused:
            raise ModelError("not so many")
        return replace(super().build(model, spec), handle=spec.threads)

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        assert all(a.handle == protocol.threads for a in artefacts)
        assert protocol.cores == tuple(range(protocol.threads))
        return [Timing(self.ms[a.handle], 0.0, 1) for a in artefacts]


def test_the_teacher_is_timed_with_every_engine_in_turns(lab: Lab) -> None:
    own = Tiring()
    ctx = replace(lab.context(backend=own), rivals=(Rival(own, 0.5), Refusing(own, 0.1)))
    assert by_backend(lab.model, 8.0, ctx) == {own.name: 8.0, "rival": pytest.approx(4.0)}


def on_six(lab: Lab, machine: Large) -> Context:
    ctx = lab.context(backend=machine)
    return replace(ctx, threads=6, cores=tuple(range(6)))


def test_the_teacher_is_timed_on_fewer_threads(lab: Lab) -> None:
    ms = {6: 3.0, 3: 1.5, 1: 4.5}
    unasked = on_six(lab, Large(ms))
    unasked = replace(unasked, config=unasked.config.model_copy(update={"threads": None}))
    assert unasked.fewer_threads == (3, 1)
    assert by_threads(lab.model, 8.0, unasked) == {"6": 8.0, "3": pytest.approx(4.0), "1": pytest.approx(12.0)}
    picky = replace(unasked, backend=Large(ms, refused=3))
    assert by_threads(lab.model, 8.0, picky) == {"6": 8.0, "1": pytest.approx(12.0)}
    asked = replace(unasked, config=unasked.config.model_copy(update={"threads": 6}))
    targeted = replace(unasked, target={"threads": 6})
    counted = replace(unasked, capabilities=replace(unasked.capabilities, measures=False))
    halves = replace(unasked, precisions=("fp16", "int8"))
    for ctx in (asked, targeted, counted, halves):
        assert ctx.fewer_threads == () and by_threads(lab.model, 8.0, ctx) == {"6": 8.0}


@pytest.mark.parametrize(("rival", "told"), [(7.9, False), (9.0, False), (4.0, True)])
def test_a_faster_engine_is_named(lab: Lab, rival: float, told: bool) -> None:
    ctx = lab.context(backend=Tiring())
    own = {str(ctx.threads): 8.0}
    tell({"teacher_by_backend": {ctx.backend.name: 8.0, "rival": rival}, "teacher_by_threads": own}, ctx)
    assert ["--backend rival" in n for n in ctx.notes] == [True] * told


@pytest.mark.parametrize(("ms", "told"), [(7.5, False), (9.0, False), (4.0, True)])
def test_fewer_threads_are_named_where_they_are_faster(lab: Lab, ms: float, told: bool) -> None:
    ctx = on_six(lab, Large({}))
    tell({"teacher_by_backend": {ctx.backend.name: 8.0}, "teacher_by_threads": {"6": 8.0, "3": ms}}, ctx)
    assert ["--threads 3" in n for n in ctx.notes] == [True] * told
