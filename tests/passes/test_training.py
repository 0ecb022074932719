"""Candidates in training: where they start, what they learn from, that they leave each other alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from onnx import helper
from torch import fx

from hantc.core.types import CandidateSpec, Region, Signature
from hantc.dialect.conv import Conv
from hantc.dialect.functions.registry import function_of
from hantc.dialect.graph import with_taps
from hantc.dialect.norm import BatchNorm
from hantc.dialect.spread import Activations
from hantc.dialect.verbatim import Verbatim
from hantc.ops import registry
from hantc.passes import training
from hantc.passes.checkpoint import Checkpoint
from hantc.passes.engine import TimeBox, relative_mse, takes_bf16
from hantc.passes.training import Job, activations, gather, step, train
from tests.passes.conftest import BOTTLE, STACK

if TYPE_CHECKING:
    from tests.passes.conftest import Lab


def test_samples_are_the_teachers_activations_and_fewer_where_maps_are_large(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, match = lab.matched.network, lab.matched.match
    assert network is not None and match is not None
    regions = [match.region("r01"), match.region("r03")]
    monkeypatch.setattr(training, "_POSITIONS", 64 * 12 * 12)
    found = gather(network, regions, lab.labelled)
    n = min(256, len(lab.labelled.train))
    assert {t: len(v) for t, v in found.items()} == {regions[0].input: 64, regions[1].input: n}
    with torch.no_grad():
        _, (want,) = with_taps(network, [regions[1].input])(lab.labelled.train.batch(list(range(64)))[0])
    assert torch.equal(found[regions[1].input][:64], want)


def test_jobs_train_beside_each_other_without_mixing(lab: Lab) -> None:
    """A candidate learns the same whether alone or beside others, one of which dies at once."""
    assert lab.matched.network is not None and lab.matched.match is not None
    region = lab.matched.match.region("r03")
    ctx = lab.fresh(effort={"distill_epochs": 1})

    def job(spec: CandidateSpec, seed: int) -> Job:
        torch.manual_seed(seed)
        return Job(region, spec, registry.build(spec, Signature.of(region)), "0" * 8)

    alone, beside, dying = job(STACK, 1), job(STACK, 1), job(BOTTLE, 2)
    with torch.no_grad():
        next(dying.module.parameters()).fill_(float("nan"))
    train(lab.matched.network, [alone], ctx, lab.labelled, Checkpoint(ctx.store, "aaaa"))
    train(lab.matched.network, [dying, beside], ctx, lab.labelled, Checkpoint(ctx.store, "bbbb"))
    assert dying.dead
    assert not beside.dead
    assert dying.seen == 0
    assert alone.seen == beside.seen > 0
    pairs = zip(alone.module.state_dict().values(), beside.module.state_dict().values(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("hurried", [True, False])
def test_what_is_exact_stays_as_it_is_and_what_is_derived_learns_less_in_a_hurry(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, hurried: bool
) -> None:
    monkeypatch.setattr(training, "RUNGS", ())  # nobody drops out
    monkeypatch.setattr(TimeBox, "hurried", hurried)
    assert lab.matched.network is not None and lab.matched.match is not None
    region = lab.matched.match.region("r03")
    ctx = lab.fresh(effort={"distill_epochs": 2})
    specs = STACK, CandidateSpec.make("slim", keep=0.5, act="same", se="same", kernel=0), CandidateSpec("teacher_s2d")
    free, derived, exact = (Job(region, s, built(region, STACK), s.family) for s in specs)
    exact.module.requires_grad_(False)
    assert any(isinstance(m, BatchNorm) for m in exact.module.modules())
    before = copy.deepcopy(exact.module.state_dict())
    train(lab.matched.network, [free, derived, exact], ctx, lab.labelled, Checkpoint(ctx.store, "cccc"))
    assert all(torch.equal(v, before[k]) for k, v in exact.module.state_dict().items())
    assert derived.steps == ((free.steps + 2) // 3 if hurried else free.steps) > 1


@pytest.mark.parametrize("mixed", [False, True])
def test_products_in_bf16_learn_as_much(lab: Lab, mixed: bool) -> None:
    """Weights and their gradients stay in FP32, and the candidate computes in FP32 afterwards."""
    assert lab.matched.network is not None and lab.matched.match is not None
    region = lab.matched.match.region("r03")
    ctx, plain = lab.fresh(effort={"distill_epochs": 3}, mixed=mixed), lab.fresh(effort={"distill_epochs": 3})
    job, other = (Job(region, BOTTLE, built(region, BOTTLE), "k") for _ in range(2))
    seen: set[torch.dtype] = set()
    convs = [m for m in job.module.modules() if isinstance(m, Conv) and m.groups == 1]
    for m in convs:
        m.register_forward_hook(lambda _m, _x, y: seen.add(y.dtype) if torch.is_grad_enabled() else None)
    train(lab.matched.network, [job], ctx, lab.labelled, Checkpoint(ctx.store, "dddd"))
    train(lab.matched.network, [other], plain, lab.labelled, Checkpoint(plain.store, "dddd"))
    assert convs and seen == {torch.bfloat16 if mixed else torch.float32}
    assert {p.dtype for p in job.module.parameters()} == {torch.float32}
    assert job.steps == other.steps > 5 and not job.dead
    assert job.loss == pytest.approx(other.loss, rel=0.1 if mixed else 1e-4)


def test_what_may_not_take_bf16_does_not_get_it(lab: Lab) -> None:
    assert lab.matched.match is not None
    module = built(lab.matched.match.region("r03"), STACK)
    assert takes_bf16(module)
    function = function_of("", "Elu")
    assert function is not None
    module.add_submodule("odd", Verbatim(helper.make_node("Elu", ["x"], ["y"]), ("x",), {}, {"": 17}, function))
    assert not takes_bf16(module)


def test_images_far_beyond_the_rest_are_not_trained_on(lab: Lab) -> None:
    assert lab.matched.network is not None and lab.matched.match is not None
    region = lab.matched.match.region("r03")
    taps = [region.input, region.output]
    x, _ = lab.labelled.train.batch(list(range(32)))
    values = activations(with_taps(lab.matched.network, taps), taps, x)
    job, same = (Job(region, STACK, built(region, STACK), "k") for _ in range(2))
    far = Activations({k: torch.cat([v, 1000 * v[:2]]) for k, v in values.items()})
    step(job, far)
    step(same, values)
    assert job.loss == pytest.approx(same.loss, rel=1e-5)
    pairs = zip(job.module.buffers(), same.module.buffers(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs), "nor do they count in statistics"


def test_where_maps_are_large_a_part_of_the_images_in_turn_is_enough(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lab.matched.match is not None
    region = lab.matched.match.region("r02")  # 12 by 12
    monkeypatch.setattr(training, "_STEP_POSITIONS", 20 * 144 - 1)
    job = Job(region, STACK, built(region, STACK), "k")

    def turns(n: int, usual: torch.Tensor | None = None, *, whole: bool = False) -> list[list[int] | None]:
        found = []
        for i in range(3):
            job.steps = i
            chosen = training._chosen(job, torch.zeros(n, 1), usual, whole=whole)
            found.append(None if chosen is None else chosen.tolist())
        return found

    first, second, third = [list(range(20)), list(range(20, 40)), [*range(40, 50), *range(10)]]
    assert turns(50) == [first, second, third]
    assert turns(20) == turns(50, whole=True) == [None] * 3
    usual = torch.arange(50) % 2 == 0
    odd_ones_out = turns(50, usual)
    assert odd_ones_out[0] == list(range(0, 40, 2))
    assert odd_ones_out[1] == [*range(40, 50, 2), *range(0, 30, 2)]
    assert turns(50, usual, whole=True) == [list(range(0, 50, 2))] * 3
    monkeypatch.setattr(training, "_STEP_POSITIONS", 1)
    assert [len(t or ()) for t in turns(50)] == [16] * 3, "images differ by more than positions do"


def test_a_step_learns_from_its_part_alone(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lab.matched.network is not None and lab.matched.match is not None
    region = lab.matched.match.region("r02")
    taps = [region.input, region.output]
    x, _ = lab.labelled.train.batch(list(range(32)))
    values = activations(with_taps(lab.matched.network, taps), taps, x)
    monkeypatch.setattr(training, "_STEP_POSITIONS", 1)
    part, whole = (Job(region, STACK, built(region, STACK), "k") for _ in range(2))
    step(part, values)
    step(whole, Activations({k: v[:16] for k, v in values.items()}), whole=True)
    assert part.seen == whole.seen == 16
    pairs = zip(part.module.parameters(), whole.module.parameters(), strict=True)
    assert all(a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad, rtol=0.2) for a, b in pairs)


def built(region: Region, spec: CandidateSpec) -> fx.GraphModule:
    torch.manual_seed(0)
    return registry.build(spec, Signature.of(region)).train()


def test_candidates_start_at_a_fit_on_images_that_are_all_different(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    network, match = lab.matched.network, lab.matched.match
    assert network is not None and match is not None
    ctx = lab.fresh()
    jobs = [Job(match.region(r), STACK, built(match.region(r), STACK), r) for r in ("r01", "r03")]
    taps = sorted({e for j in jobs for e in (j.region.input, j.region.output)})
    tapped = with_taps(network, taps, output=False)
    monkeypatch.setattr(training, "_FIT_POSITIONS", 1 << 20)  # more images than there are
    values = training._first_values(jobs, tapped, taps, lab.labelled, None, 0, 32)
    n = len(lab.labelled.train) // 32 * 32
    assert {len(v) for v in values.values()} == {n}
    first = values[jobs[0].region.input].flatten(1)
    assert len(torch.unique(first, dim=0)) == n

    def left(job: Job) -> float:
        x, _ = lab.labelled.search.batch(list(range(64)))
        _, (source, target) = with_taps(network, [job.region.input, job.region.output])(x)
        with torch.no_grad():
            return float(relative_mse(copy.deepcopy(job.module).eval()(source), target))

    before = [left(j) for j in jobs]
    training.initialise(jobs, tapped, taps, lab.labelled, None, ctx, 32)
    shares = [left(j) / b for j, b in zip(jobs, before, strict=True)]
    assert max(shares) < 0.8, shares
    norms = [m for j in jobs for m in j.module.modules() if isinstance(m, BatchNorm)]
    assert all(m.momentum == BatchNorm(1).momentum for m in norms), "later batches move statistics a little only"


def test_values_alone_end_behind_the_last_tap(lab: Lab) -> None:
    network, match = lab.matched.network, lab.matched.match
    assert network is not None and match is not None
    taps = [match.region("r01").input, match.region("r01").output]
    x, _ = lab.labelled.search.batch([0, 1, 2])
    short, full = with_taps(network, taps, output=False), with_taps(network, taps)
    out, values = short(x)
    assert out is None
    assert all(torch.equal(a, b) for a, b in zip(values, full(x)[1], strict=True))
    assert len(short.graph.nodes) < len(full.graph.nodes) / 2
