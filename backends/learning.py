"""Which device of this machine candidates and students learn on, and how it multiplies there. The student's target is
another matter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hantc.backends.device import trains_in_bf16
from hantc.core.errors import UsageError

_CPU = torch.device("cpu")
_OPTION = "--train-device"
_CLOSE = 1e-2  # relative: GPUs may multiply in fewer bits


def learning_device(asked: str) -> tuple[torch.device, list[str]]:
    """Where to learn, and what is to be said about it; `asked` as `--train-device`: "cpu", "cuda", or "auto", which is
    a GPU if there is one that learns right. UsageError if one is asked for that there is not."""
    if asked == "cpu":
        return _CPU, []
    if not torch.cuda.is_available():
        if asked == "auto":
            return _CPU, []
        why = "torch sees no GPU" if torch.version.cuda else f"this torch ({torch.__version__}) is built for CPUs alone"
        raise UsageError(f"there is none to use: {why}", where=_OPTION, hint="--train-device cpu")
    name = "the GPU"
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        name = torch.cuda.get_device_name(device)
        wrong = _wrong(device)
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        # out of memory, in use by others, a driver that does not fit
        wrong = str(error).strip().splitlines()[0]
    if not wrong:
        return device, [f"candidates and students learnt on {name}"]
    if asked == "auto":
        return _CPU, [f"{name} was not used: {wrong}"]
    raise UsageError(f"{name} cannot be used: {wrong}", where=_OPTION, hint="--train-device cpu")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether training in mixed precision is known to be faster there."""
    return trains_in_bf16() if device == _CPU else torch.cuda.is_bf16_supported(including_emulation=False)


def _wrong(device: torch.device) -> str:
    """What is wrong with a GPU, or "": a convolution's value and gradients must be those of the CPU."""
    for a, b in zip(_tried(_CPU), _tried(device), strict=True):
        if not bool(((a - b).abs().max() <= _CLOSE * a.abs().max()).item()):
            return "it computes a small convolution and its gradients otherwise than the CPU does"
    return ""


def _tried(device: torch.device) -> list[Tensor]:
    """A small convolution's output and gradients, back on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(8, 8, 3, 3, generator=generator).to(device).requires_grad_() for _ in range(2))
    y = F.conv2d(x, weight, padding=1)
    y.square().mean().backward()
    assert x.grad is not None and weight.grad is not None
    return [v.detach().to(_CPU) for v in (y, x.grad, weight.grad)]
