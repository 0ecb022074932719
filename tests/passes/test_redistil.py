"""Regions of a student fitted, front to back, on what reaches them in the student."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from hantc.ops.readout import fit_readout
from hantc.passes import redistil
from hantc.passes.engine import Judge, output_kind
from hantc.passes.redistil import Redistil
from hantc.passes.state import Context, State
from tests.passes.conftest import Recorder

if TYPE_CHECKING:
    from tests.passes.conftest import Lab


def last(ctx: Context) -> Mapping[str, Any]:
    assert isinstance(ctx.reporter, Recorder)
    return ctx.reporter.last("redistil")


def damaged(lab: Lab) -> State:
    """The student with its first replaced region half off, as an early replacement that went wrong."""
    state = lab.rewritten()
    assert state.student is not None
    with torch.no_grad():
        for p in state.student.get_submodule("r01").parameters():
            p.mul_(0.7)
    return state


def test_errors_of_early_regions_are_undone(lab: Lab) -> None:
    state, ctx = damaged(lab), lab.fresh()
    before = lab.distance(state)
    after = Redistil().call(state, ctx)
    assert lab.distance(after) < 0.5 * before
    event = last(ctx)
    assert event["taken"] and event["fitted"] >= 2 and event["after"] < event["before"]


def test_later_regions_see_what_the_earlier_ones_give(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, torch.Tensor] = {}

    def spy(module: nn.Module, source: torch.Tensor, target: torch.Tensor) -> bool:
        done = fit_readout(module, source, target)  # type: ignore[arg-type]
        with torch.no_grad():
            seen[len(seen)] = torch.stack([source.mean(), module(source).mean()])
        return done

    monkeypatch.setattr(redistil, "fit_readout", spy)
    Redistil().call(damaged(lab), lab.fresh())
    assert len(seen) == 3
    assert float(seen[1][0]) == pytest.approx(float(seen[0][1]), rel=1e-3), "r02 is fed by the fitted r01"


def test_fits_that_do_harm_are_taken_back(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def harm(module: nn.Module, *_: object) -> bool:
        with torch.no_grad():
            for p in module.parameters():
                p.add_(1.0)
        return True

    monkeypatch.setattr(redistil, "fit_readout", harm)
    state, ctx = lab.rewritten(), lab.fresh()
    assert state.student is not None
    want = copy.deepcopy(state.student.state_dict())
    after = Redistil().call(state, ctx)
    assert after.student is not None
    assert all(torch.equal(v, after.student.state_dict()[k]) for k, v in want.items())
    event = last(ctx)
    assert not event["taken"]


def test_the_teacher_is_not_touched_and_a_second_call_fits_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, state = lab.fresh(), damaged(lab)
    assert state.network is not None
    before = {k: v.clone() for k, v in state.network.state_dict().items()}
    first = Redistil().call(state, ctx)
    assert all(torch.equal(v, before[k]) for k, v in state.network.state_dict().items())
    monkeypatch.setattr(redistil, "fit_readout", None)
    second = Redistil().call(damaged(lab), ctx)
    assert first.student is not None and second.student is not None
    want, got = first.student.state_dict(), second.student.state_dict()
    assert all(torch.equal(v, got[k]) for k, v in want.items())


def test_without_data_or_replacements_the_student_stays(lab: Lab) -> None:
    state = lab.rewritten()
    assert Redistil().call(state, lab.context()) is state
    assert state.network is not None
    same = replace(state, student=copy.deepcopy(state.network))
    assert Redistil().call(same, lab.fresh()) is same


def test_the_judge_is_the_search_split(lab: Lab) -> None:
    """What is reported is what a judge of the search split says of the students before and after."""
    state, ctx = damaged(lab), lab.fresh()
    assert state.network is not None and state.student is not None
    kind = output_kind(state.network, lab.labelled.search.batch([0, 1])[0], lab.labelled.num_classes)
    judge = Judge(state.network, lab.labelled.search, kind, limit=ctx.effort.score_images, blend=True)
    before = judge(state.student)["kl"]
    after = Redistil().call(state, ctx)
    assert after.student is not None
    event = last(ctx)
    assert event["before"] == pytest.approx(before) and event["after"] == pytest.approx(judge(after.student)["kl"])


def test_no_image_is_fitted_to_twice(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes again would judge the fit that it was part of."""
    monkeypatch.setattr(redistil, "_IMAGES", (1 << 12, 1 << 13))  # far more than there are
    ctx = lab.fresh()
    x = redistil._images(ctx, lab.labelled, None, 144)
    assert len(x) == len(lab.labelled.train) // ctx.effort.batch_size * ctx.effort.batch_size
    assert len(torch.unique(x.flatten(1), dim=0)) == len(x)
