"""The paper's recipe: one candidate per region on each pass, an epoch each, kept apart and resumed by epochs."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch

from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.graph import with_taps
from hantc.ops.registry import build
from hantc.passes import paper
from hantc.passes.checkpoint import Checkpoint
from hantc.passes.distill import Distill, weights_key
from hantc.passes.engine import relative_mse
from hantc.passes.paper import one_each, train_paper
from hantc.passes.training import Job, activations, save

if TYPE_CHECKING:
    from tests.passes.conftest import Lab

STACK = CandidateSpec.make("cb_stack", k=3, w=0.5)
BOTTLE = CandidateSpec.make("cb_bottle", k=3, w=0.5)


def jobs_of(lab: Lab, *places: tuple[str, CandidateSpec]) -> list[Job]:
    assert lab.matched.match is not None
    jobs = []
    for name, spec in places:
        region = lab.matched.match.region(name)
        torch.manual_seed(0)
        jobs.append(Job(region, spec, build(spec, Signature.of(region)), f"{name} {spec.name}"))
    return jobs


def error(lab: Lab, job: Job) -> float:
    """Relative error on search images, norms by the batch: theirs need more than one epoch of so few."""
    assert lab.matched.network is not None
    x, _ = lab.labelled.search.batch(list(range(64)))
    values = activations(with_taps(lab.matched.network, [job.region.input, job.region.output]), PAIR, x)
    with torch.no_grad():
        return float(relative_mse(copy.deepcopy(job.module).train()(values["source"]), values["target"]))


PAIR = ("source", "target")
PLACES = (("r01", STACK), ("r01", BOTTLE), ("r03", STACK))


def test_rounds_hold_one_candidate_per_region(lab: Lab) -> None:
    rounds = one_each(jobs_of(lab, *PLACES))
    assert [[j.key for j in r] for r in rounds] == [
        [f"r01 {STACK.name}", f"r03 {STACK.name}"],
        [f"r01 {BOTTLE.name}"],
    ]


def test_each_candidate_sees_one_epoch_and_learns(lab: Lab) -> None:
    assert lab.matched.network is not None
    jobs, ctx = jobs_of(lab, *PLACES), lab.fresh()
    before = [error(lab, j) for j in jobs]
    train_paper(lab.matched.network, jobs, ctx, lab.labelled, Checkpoint(ctx.store, "aaaa"))
    size, n = ctx.effort.batch_size, len(lab.labelled.train)
    assert [j.seen for j in jobs] == [n // size * size] * 3
    assert all(error(lab, j) < b for j, b in zip(jobs, before, strict=True))  # three steps, no more
    assert not any(j.module.training for j in jobs)


def test_a_killed_run_goes_on_at_the_epoch(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lab.matched.network is not None
    whole, ctx = jobs_of(lab, *PLACES), lab.fresh()
    train_paper(lab.matched.network, whole, ctx, lab.labelled, Checkpoint(ctx.store, "aaaa"))
    killed, checkpoint = jobs_of(lab, *PLACES), Checkpoint(ctx.store, "bbbb")

    def die(*args: object) -> None:
        save(*args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(paper, "save", die)
        train_paper(lab.matched.network, killed, ctx, lab.labelled, checkpoint)
    resumed = jobs_of(lab, *PLACES)
    train_paper(lab.matched.network, resumed, ctx, lab.labelled, checkpoint)
    assert [j.seen for j in resumed] == [j.seen for j in whole]
    for a, b in zip(whole, resumed, strict=True):
        pairs = zip(a.module.state_dict().values(), b.module.state_dict().values(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


def test_its_weights_are_kept_apart(lab: Lab) -> None:
    ours, theirs = lab.fresh(effort={"distill_epochs": 1}), lab.fresh(recipe="paper")
    after = Distill().call(lab.costed, theirs)
    assert after.weights
    p = next(p for p in lab.costed.proposals or () if p.spec.name == STACK.name)
    assert weights_key(lab.costed, ours, p) != weights_key(lab.costed, theirs, p)
    assert theirs.store.get_tensors("weights", weights_key(lab.costed, theirs, p)) is not None
