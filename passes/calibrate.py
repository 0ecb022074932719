"""Which way of quantising suits a student: each is tried, and judged on the search split by what its file computes.

No way of choosing ranges is best everywhere: the largest values matter in some networks, and blur everything else in
others. With the best of them, biases may be corrected too (`dialect.qdq_bias`), which serves students that nothing was
trained in. Those that were fine-tuned learned to live with the robust ranges, so that another way has to be clearly
better.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor, nn

from hantc.core.backend_api import Artefact, BuildSpec
from hantc.core.errors import HantcError
from hantc.core.types import TensorSpec, digest
from hantc.data.dataset import Dataset
from hantc.dialect.examples import example_inputs
from hantc.dialect.qdq import Calibration
from hantc.passes.engine import Judge, output_kind
from hantc.passes.state import Context, State

_CLEARLY = 0.97  # of the robust ranges' divergence
_VERSION = 3
CALIBRATION_SHARE = 0.03  # of the run's time limit


@dataclass(frozen=True)
class Way:
    """How a file is quantised: ranges, and whether biases are corrected."""

    ranges: Calibration
    correct_biases: bool = False

    def __str__(self) -> str:
        return f"{self.ranges} with corrected biases" if self.correct_biases else self.ranges


RANGES: Sequence[Way] = tuple(Way(ranges) for ranges in get_args(Calibration))
WAYS: Sequence[Way] = (*RANGES, *(replace(way, correct_biases=True) for way in RANGES))
Make = Callable[[Way], ModelProto]


class FileModule(nn.Module):
    """A file behind the interface of a network: (N, C, H, W) → its first output, computed by the run's engine."""

    def __init__(self, ctx: Context, model: ModelProto, spec: TensorSpec) -> None:
        super().__init__()
        self.ctx, self.spec = ctx, spec
        self.artefact: Artefact = ctx.backend.build(model, BuildSpec(ctx.threads, ctx.config.batch))

    def forward(self, x: Tensor) -> Tensor:
        """Run the file; batches of a fixed size are filled up, and cut again."""
        fixed = self.spec.shape[0] if self.spec.shape and isinstance(self.spec.shape[0], int) else None
        found = []
        for part in x.split(fixed or len(x)):
            rows = torch.cat([part, part[-1:].expand(fixed - len(part), *part.shape[1:])]) if fixed else part
            feeds = {self.spec.name: rows.numpy().astype(self.spec.dtype)}
            found.append(self.ctx.backend.run(self.artefact, feeds)[0][: len(part)])
        return torch.from_numpy(np.concatenate(found))


def best_calibration(state: State, ctx: Context, data: Dataset, make: Make) -> ModelProto:
    """Of the files that `make` makes with each way, the one whose outputs are nearest to the teacher's.

    Ways that fail are left out, and so are those for which there is no time; the first one is always tried. What was
    found is kept in the store: the same student is emitted alike however busy the machine is then.
    """
    files = {WAYS[0]: make(WAYS[0])}
    key = _key(state, ctx, data, files[WAYS[0]])
    stored: dict[str, float] | None = ctx.store.get_json("calibration", key)
    if stored is None:
        found = _divergences(state, ctx, data, make, files)
        ctx.store.put_json("calibration", key, {str(way): d for way, d in found.items()})
    else:
        found = {way: stored[str(way)] for way in WAYS if str(way) in stored}
    best = choose(found)
    if best != WAYS[0]:
        share = 100 * (1 - found[best] / found[WAYS[0]])
        ctx.note(f"INT8 ranges were chosen by {best}: {share:.0f} % nearer to the teacher on search images")
    return files[best] if best in files else make(best)


def _divergences(
    state: State, ctx: Context, data: Dataset, make: Make, files: dict[Way, ModelProto]
) -> dict[Way, float]:
    """How far each way's file is from the teacher, of those for which there is time; new ones are put into `files`."""
    assert state.network is not None
    info, start = state.network.meta["info"], time.monotonic()
    kind = output_kind(state.network, example_inputs(info, 2)[0], data.num_classes)
    judge = Judge(state.network, data.search, kind, limit=ctx.effort.score_images, blend=True)
    found: dict[Way, float] = {}
    with ctx.reporter.bar("choosing INT8 ranges", len(RANGES) + 2) as bar:
        for way in _candidates(found):
            if found and time.monotonic() - start > CALIBRATION_SHARE * ctx.clock.limit_s:
                break
            try:
                files[way] = files[way] if way in files else make(way)
                found[way] = judge(FileModule(ctx, files[way], info.inputs[0]))["kl"]
            except HantcError as error:
                if way == WAYS[0]:
                    raise
                ctx.reporter.event("calibration_failed", way=str(way), reason=error.message)
                continue
            bar.advance()
    divergence = {str(way): d for way, d in found.items()}
    ctx.reporter.event("calibration", chosen=str(choose(found)), divergence=divergence)
    return found


def _candidates(found: dict[Way, float]) -> Iterator[Way]:
    """The first ranges, with biases as they are and corrected, the other ranges, and the best of all corrected."""
    yield from (WAYS[0], replace(WAYS[0], correct_biases=True))
    yield from RANGES[1:]
    best = replace(choose({way: d for way, d in found.items() if not way.correct_biases}), correct_biases=True)
    if best.ranges != WAYS[0].ranges:  # those were tried, whatever came of it
        yield best


def _key(state: State, ctx: Context, data: Dataset, robust: ModelProto) -> str:
    """Of the choice for a student, told by its file with robust ranges."""
    file = hashlib.sha256(robust.SerializeToString(deterministic=True)).hexdigest()
    by = {"version": _VERSION, "backend": ctx.backend.name, "device": ctx.device_key}
    by |= {"images": ctx.effort.score_images, "limit": ctx.clock.limit_s}  # a longer run may try more
    return digest({**by, "file": file, "teacher": state.model_hash, "data": data.training_stamp})


def choose(divergence: dict[Way, float]) -> Way:
    """The way of least divergence, if it is clearly better than the first one."""
    first = next(iter(divergence))
    finite = {way: d for way, d in divergence.items() if np.isfinite(d)}
    best = min(finite, key=lambda way: finite[way], default=first)
    worse = not np.isfinite(divergence[first]) or divergence[best] < _CLEARLY * divergence[first]
    return best if worse else first
