"""Random inputs for a model, from what its file declares."""

from __future__ import annotations

import torch

from hantc.core.types import ModelInfo


def example_inputs(info: ModelInfo, batch: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Random inputs of a model at batch `batch` (a fixed batch in the file stays as it is)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for spec in info.inputs:
        shape = [d if isinstance(d, int) else (batch if i == 0 else 1) for i, d in enumerate(spec.shape)]
        if spec.dtype.startswith("float"):
            tensors.append(torch.randn(shape, generator=generator).to(getattr(torch, spec.dtype)))
        else:
            tensors.append(torch.ones(shape, dtype=getattr(torch, spec.dtype, torch.int64)))
    return tuple(tensors)
