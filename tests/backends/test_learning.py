"""Which device candidates and students learn on: a GPU if there is one that computes right, and why not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hantc.backends import learning
from hantc.backends.learning import learning_device
from hantc.core.errors import UsageError
from tests.passes.torch_gpu import GPU, EmulatedGpu

CPU = torch.device("cpu")


@pytest.fixture
def gpu() -> Iterator[EmulatedGpu]:
    with EmulatedGpu() as mode:
        yield mode


def without(monkeypatch: pytest.MonkeyPatch, *, cuda: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize(("cuda", "why"), [(None, "built for CPUs alone"), ("12.9", "torch sees no GPU")])
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, cuda: str | None, why: str) -> None:
    without(monkeypatch, cuda=cuda)
    assert learning_device("auto") == learning_device("cpu") == (CPU, [])
    with pytest.raises(UsageError, match=why) as error:
        learning_device("cuda")
    assert error.value.where == "--train-device"


def with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA Test")


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_gpu_that_computes_right_is_taken(monkeypatch: pytest.MonkeyPatch, gpu: EmulatedGpu, asked: str) -> None:
    with_one(monkeypatch)
    assert learning_device(asked) == (GPU, ["candidates and students learnt on NVIDIA Test"])
    assert learning_device("cpu") == (CPU, []) and gpu.ran > 0


def test_a_gpu_that_computes_wrong_is_not(monkeypatch: pytest.MonkeyPatch, gpu: EmulatedGpu) -> None:
    with_one(monkeypatch)
    tried = learning._tried
    monkeypatch.setattr(learning, "_tried", lambda d: [1.1 * v if d == GPU else v for v in tried(d)])
    device, (note,) = learning_device("auto")
    assert device == CPU and "NVIDIA Test was not used: it computes" in note
    with pytest.raises(UsageError, match="cannot be used: it computes"):
        learning_device("cuda")
    monkeypatch.setattr(learning, "_tried", lambda d: [torch.full_like(v, torch.nan) for v in tried(d)])
    assert learning_device("auto")[0] == CPU


def test_a_gpu_in_a_bad_state_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with_one(monkeypatch)

    def fails(device: torch.device) -> list[Tensor]:
        if device.type == "cuda":
            raise RuntimeError("CUDA error: out of memory\nCompile with ...")
        return []

    monkeypatch.setattr(learning, "_tried", fails)
    assert learning_device("auto") == (CPU, ["NVIDIA Test was not used: CUDA error: out of memory"])


def test_a_gpu_that_does_not_begin_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with_one(monkeypatch)

    def fails() -> int:
        raise torch.cuda.DeferredCudaCallError("CUDA call failed lazily")

    monkeypatch.setattr(torch.cuda, "current_device", fails)
    assert learning_device("auto") == (CPU, ["the GPU was not used: CUDA call failed lazily"])
    with pytest.raises(UsageError, match="the GPU cannot be used"):
        learning_device("cuda")
