"""Training that is killed goes on where it was."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from hantc.core.store import Store
from hantc.core.types import CandidateSpec
from hantc.passes import finetune, training, tuning
from hantc.passes.checkpoint import KIND, Checkpoint, part_of, prefixed
from hantc.passes.distill import Distill
from hantc.passes.engine import TimeBox
from hantc.passes.finetune import Finetune
from tests.passes.test_distill import offering

if TYPE_CHECKING:
    from tests.passes.conftest import Lab

STACK = CandidateSpec.make("cb_stack", k=3, w=0.5)
BOTTLE = CandidateSpec.make("cb_bottle", k=3, w=0.5)


def test_round_trip_and_clear(tmp_path: Path) -> None:
    store = Store(tmp_path)
    mark = Checkpoint(store, "abcd")
    assert mark.load() is None
    mark.save(prefixed({"a": {"w": torch.arange(3.0)}, "b": {"w": torch.ones(2)}}), 0.25, {"steps": 7})
    found = Checkpoint(store, "abcd").load()
    assert found is not None
    assert (found.progress, found.extra) == (0.25, {"steps": 7})
    assert torch.equal(part_of(found.tensors, "a")["w"], torch.arange(3.0))
    mark.clear()
    assert mark.load() is None


def test_it_is_due_every_so_often(tmp_path: Path) -> None:
    now = [0.0]
    mark = Checkpoint(Store(tmp_path), "abcd", every_s=10.0, clock=lambda: now[0])
    assert not mark.due()
    now[0] = 10.0
    assert mark.due()
    mark.save({}, 0.1)
    assert not mark.due()


def test_a_half_written_checkpoint_counts_as_none(tmp_path: Path) -> None:
    mark = Checkpoint(Store(tmp_path), "abcd")
    mark.save({"w": torch.ones(100)}, 0.5)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:60])
    assert mark.load() is None


class Killed(Exception):
    """Stands for a signal."""


def dying(after: int) -> type[TimeBox]:
    class Dying(TimeBox):
        """Raises behind so many steps."""

        def advance(self) -> bool:
            if self.step >= after:
                raise Killed
            return super().advance()

    return Dying


def test_distillation_goes_on_where_it_was(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    state, ctx = offering(lab.matched, ("r03", STACK), ("r01", BOTTLE)), lab.fresh(effort={"distill_epochs": 6})
    with monkeypatch.context() as m:
        m.setattr(training, "Checkpoint", partial(Checkpoint, every_s=0.0))
        m.setattr(training, "TimeBox", dying(10))
        with pytest.raises(Killed):
            Distill().call(state, ctx)
    (left,) = ctx.store.ls(KIND)
    saved = Checkpoint(ctx.store, left.key).load()
    assert saved is not None and 0.3 < saved.progress < 1
    seen: list[float] = []

    class Frozen(TimeBox):
        """One step at rate zero: what comes out is what was taken up."""

        def __init__(self, seconds: float, max_steps: int, *, begun: float) -> None:
            seen.append(begun)
            super().__init__(seconds, max_steps, begun=begun)

        def rate(self) -> float:
            return 0.0

        def advance(self) -> bool:
            super().advance()
            return False

    monkeypatch.setattr(training, "TimeBox", Frozen)
    after = Distill().call(state, ctx)
    assert seen == [pytest.approx(saved.progress)]
    assert after.weights is not None and set(after.weights) == {("r03", STACK.name), ("r01", BOTTLE.name)}
    for weights in after.weights.values():
        for name in (n for n in weights if n.endswith("conv.weight")):
            assert any(torch.equal(weights[name], v) for k, v in saved.tensors.items() if k.endswith(name)), name
    assert ctx.store.ls(KIND) == [], "a finished training needs no checkpoint"


def test_fine_tuning_goes_on_where_it_was(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    state, ctx = lab.rewritten(), lab.fresh(effort={"finetune_epochs": 6})
    with monkeypatch.context() as m:
        m.setattr(finetune, "Checkpoint", partial(Checkpoint, every_s=0.0))
        m.setattr(tuning, "TimeBox", dying(15))
        m.setattr(tuning.Tuner, "choose_rate", lambda *_: 3e-4)
        with pytest.raises(Killed):
            Finetune().call(state, ctx)
    (left,) = ctx.store.ls(KIND)
    saved = Checkpoint(ctx.store, left.key).load()
    assert saved is not None
    monkeypatch.setattr(tuning.Tuner, "_step", lambda *_: True)  # what comes out is what was taken up
    monkeypatch.setattr(tuning.Average, "update", lambda self, module: None)
    done = Finetune().call(lab.rewritten(), ctx)
    assert done.student is not None
    states = [part_of(saved.tensors, part) for part in ("best", "average")]
    got = {k: v for k, v in done.student.state_dict().items() if k.endswith("weight")}
    assert any(all(torch.allclose(v, state[k], atol=1e-4) for k, v in got.items()) for state in states)
    assert done.history[-1]["progress"] == 1.0
    progress = [h["progress"] for h in done.history]
    assert progress == sorted(progress)
    assert any(abs(p - saved.progress) < 1e-6 for p in progress), "evaluated where it was taken up"
    assert ctx.store.ls(KIND) == []
