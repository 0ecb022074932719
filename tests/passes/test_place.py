"""Learning on a GPU, as far as that can be tried without one: everything that learns is there, results are those of
the CPU and back on it. The GPU is emulated (`torch_gpu`)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from hantc.core.types import Signature
from hantc.dialect.functions.registry import function_of
from hantc.dialect.verbatim import Verbatim
from hantc.ops.registry import build
from hantc.passes import place, tuning
from hantc.passes.checkpoint import Checkpoint
from hantc.passes.distill import Distill
from hantc.passes.engine import multiplied_in_bf16
from hantc.passes.finetune import Finetune
from hantc.passes.place import CPU, copied_to, place_of
from hantc.passes.score import Score
from hantc.passes.training import Job, train
from tests.passes.conftest import BOTTLE, STACK
from tests.passes.torch_gpu import GPU, EmulatedGpu, on_gpu

if TYPE_CHECKING:
    from tests.passes.conftest import Lab


@pytest.fixture
def gpu() -> Iterator[EmulatedGpu]:
    with EmulatedGpu() as mode:
        yield mode


def states(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_the_emulation_refuses_what_a_gpu_does(gpu: EmulatedGpu) -> None:
    here, there = torch.ones(2), torch.ones(2).to(GPU)
    assert there.device == GPU and (there + 1).device == GPU and there.cpu().device == CPU and here.device == CPU
    assert (there + torch.tensor(2.0)).device == GPU, "single numbers of the CPU go with anything"
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([here, there])
    with pytest.raises(RuntimeError, match="same device"):
        here * there.sum()
    with pytest.raises(RuntimeError, match="same device"):
        torch.fake_quantize_per_tensor_affine(there, torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), 0, 255)
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert there.cpu().numpy().sum() == 2.0 and float(there.sum()) == 2.0
    assert torch.zeros(2, device=GPU).device == torch.arange(2, device=there.device).device == GPU


def test_the_emulation_moves_modules_in_place(gpu: EmulatedGpu) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    params = list(module.parameters())
    optimizer = torch.optim.Adam(params)
    module.to(GPU)
    assert all(a is b for a, b in zip(params, module.parameters(), strict=True))
    assert all(on_gpu(v) for v in module.state_dict().values())
    with pytest.raises(RuntimeError, match="same device"):
        module(torch.ones(2, 3, 8, 8))
    module(torch.ones(2, 3, 8, 8, device=GPU)).square().mean().backward()
    optimizer.step()
    assert all(on_gpu(v) for v in copy.deepcopy(module).state_dict().values())
    module.to(CPU)
    assert module(torch.ones(2, 3, 8, 8)).device == CPU and gpu.ran > 0


def test_copies_are_made_for_gpus_alone(gpu: EmulatedGpu) -> None:
    module = nn.Conv2d(3, 4, 3)
    assert copied_to(CPU, module) is module
    there = copied_to(GPU, module)
    assert on_gpu(there.weight) and not on_gpu(module.weight)


def test_what_computes_on_the_cpu_alone_stays_there(lab: Lab) -> None:
    network = lab.matched.network
    assert network is not None and place_of(GPU, network) == GPU
    odd = copy.deepcopy(network)
    function = function_of("", "Elu")
    assert function is not None
    odd.add_submodule("odd", Verbatim(helper.make_node("Elu", ["x"], ["y"]), ("x",), {}, {"": 17}, function))
    assert place_of(GPU, odd) == CPU


def test_precision_follows_what_learns_where(lab: Lab) -> None:
    network = lab.matched.network
    assert network is not None
    odd = copy.deepcopy(network)
    function = function_of("", "Elu")
    assert function is not None
    odd.add_submodule("odd", Verbatim(helper.make_node("Elu", ["x"], ["y"]), ("x",), {}, {"": 17}, function))
    ctx = lab.fresh(device=GPU, mixed=True)
    assert ctx.place(network) == GPU and ctx.mixes(GPU) and not ctx.notes
    assert ctx.place(odd) == CPU and not ctx.mixes(CPU), "the CPU may have no BF16"
    assert any("only the CPU computes" in note for note in ctx.notes)
    assert lab.fresh(mixed=True).mixes(CPU)


def trained(lab: Lab, device: torch.device) -> list[Job]:
    assert lab.matched.network is not None and lab.matched.match is not None
    region = lab.matched.match.region("r03")
    ctx = lab.fresh(effort={"distill_epochs": 2}, device=device)
    jobs = []
    for spec in (STACK, BOTTLE):
        torch.manual_seed(1)
        jobs.append(Job(region, spec, build(spec, Signature.of(region)), spec.name))
    train(lab.matched.network, jobs, ctx, lab.labelled, Checkpoint(ctx.store, "aaaa"))
    return jobs


def test_candidates_learn_there_and_come_back(lab: Lab) -> None:
    here = trained(lab, CPU)
    with EmulatedGpu() as gpu:
        there = trained(lab, GPU)
        assert not any(on_gpu(v) for j in there for v in j.module.state_dict().values())
        assert lab.matched.network is not None
        assert not any(on_gpu(v) for v in lab.matched.network.state_dict().values())
    assert gpu.ran > 100 * there[0].steps
    for a, b in zip(here, there, strict=True):
        assert (a.steps, a.loss) == (b.steps, b.loss) and a.steps > 2
        assert_equal(states(a.module), states(b.module))


@pytest.mark.parametrize("recipe", ["hantc", "paper"])
def test_passes_find_the_same_there(lab: Lab, recipe: str) -> None:
    def run(device: torch.device) -> tuple[object, ...]:
        ctx = lab.fresh(device=device, recipe=recipe, effort={"distill_epochs": 2, "score_images": 100})
        state = Score().call(Distill().call(lab.costed, ctx), ctx)
        assert state.weights is not None
        return state.scores, {k: {n: t.clone() for n, t in w.items()} for k, w in state.weights.items()}

    scores, weights = run(CPU)
    with EmulatedGpu() as gpu:
        there, others = run(GPU)
    assert gpu.ran > 100 and scores == there
    assert isinstance(weights, dict) and isinstance(others, dict) and weights.keys() == others.keys()
    for key, found in weights.items():
        assert_equal(found, others[key])


def test_a_gpu_multiplies_in_bf16_by_its_own_autocast() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        assert multiplied_in_bf16(True, GPU).device == "cuda"
    assert multiplied_in_bf16(True).device == "cpu"


def test_what_fits_into_memory_together_is_less_on_a_small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.room(CPU, 1000) == place.room(GPU, 1000) == 1000, "no GPU, no limit of its own"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (100, 600))
    assert (place.room(CPU, 1000), place.room(GPU, 1000), place.room(GPU, 100)) == (1000, 600, 100)


def test_students_are_tuned_there(lab: Lab) -> None:
    here = Finetune().call(lab.rewritten(), lab.fresh(effort={"finetune_epochs": 3}))
    with EmulatedGpu() as gpu:
        there = Finetune().call(lab.rewritten(), lab.fresh(effort={"finetune_epochs": 3}, device=GPU))
        assert there.student is not None
        assert not any(on_gpu(v) for v in there.student.state_dict().values())
    assert gpu.ran > 1000 and here.student is not None
    assert here.history == there.history
    assert_equal(states(here.student), states(there.student))


def test_tuning_goes_on_there_where_it_was(lab: Lab, monkeypatch: pytest.MonkeyPatch, gpu: EmulatedGpu) -> None:
    ctx, state = lab.fresh(device=GPU), lab.rewritten()
    assert state.student is not None and ctx.data is not None
    checkpoint = Checkpoint(ctx.store, "abcd", every_s=0.0)
    steps = 0

    def interrupted(self: tuning.Tuner, *args: object) -> bool:
        nonlocal steps
        steps += 1
        if steps == 12:
            raise KeyboardInterrupt
        return step(self, *args)  # type: ignore[arg-type]

    step = tuning.Tuner._step
    monkeypatch.setattr(tuning.Tuner, "_step", interrupted)
    monkeypatch.setattr(tuning.Tuner, "choose_rate", lambda *_: 1e-4)
    with pytest.raises(KeyboardInterrupt):
        tuning.Tuner(state, ctx, ctx.data, state.student).train(1e6, 24, checkpoint)
    fresh = lab.rewritten()
    assert fresh.student is not None
    history = tuning.Tuner(fresh, ctx, ctx.data, fresh.student).train(1e6, 24, checkpoint)
    assert history[0]["progress"] == 0.0 and history[-1]["progress"] == 1.0 and 12 < steps < 30
