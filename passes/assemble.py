"""A selection made real: the student network, its ONNX form, its quantised form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto
from torch import fx

from hantc.core.backend_api import Feeds
from hantc.core.types import CandidateSpec, Choice, digest
from hantc.data.dataset import Dataset
from hantc.dialect.anchors import anchored
from hantc.dialect.emitter import emit
from hantc.dialect.fakequant import fake_quantize
from hantc.dialect.floats import in_bf16
from hantc.dialect.half import overflowing, to_fp16
from hantc.dialect.qdq import MIN_OPSET, Calibration, QuantSpec, quantize
from hantc.passes.plug import origin_for, replace_regions, teacher_part, trained
from hantc.passes.state import Context, State

_FEED_BYTES = 5 << 20  # larger batches take memory and no less time: densenet121 at 224x224 9.0 GB for 32, 3.8 for 8


@dataclass(frozen=True)
class Blueprint:
    """Which regions become what: (region, candidate, precision) for every region of a selection."""

    picks: tuple[tuple[str, str, str], ...]

    @classmethod
    def of(cls, choices: Sequence[Choice]) -> Blueprint:
        """The blueprint of a plan's choices."""
        return cls(tuple((c.region, c.candidate, c.precision) for c in choices))

    @property
    def int8(self) -> tuple[str, ...]:
        """Names of the regions in INT8."""
        return tuple(r for r, _, p in self.picks if p == "int8")


def student_facts(state: State, student: fx.GraphModule, data: Dataset) -> dict[str, object]:
    """What work on a student depends on, for its key in the store: teacher, data, choices, and the weights so far."""
    assert state.plan is not None
    return {
        "teacher": state.model_hash,
        "data": data.training_stamp,
        "picks": Blueprint.of(state.plan.choices).picks,
        "start": digest({k: v.detach().contiguous().sum().item() for k, v in student.state_dict().items()}),
    }


def build_student(state: State, blueprint: Blueprint, specs: Mapping[str, CandidateSpec]) -> fx.GraphModule:
    """The network with every replaced region as one submodule call. Regions that stay the teacher's in FP32
    are left as they are; in INT8 they become a submodule too, so that their nodes can be named."""
    assert state.network is not None and state.match is not None and state.weights is not None
    parts = []
    for name, candidate, precision in blueprint.picks:
        region = state.match.region(name)
        if candidate != "teacher":
            origin = origin_for(specs[candidate], state.network, state.match, region)
            parts.append((region, trained(region, specs[candidate], state.weights[name, candidate], origin=origin)))
        elif precision == "int8":
            parts.append((region, teacher_part(state.network, region)))
    student = replace_regions(state.network, parts)
    student.eval()
    return student


def rounded_view(student: fx.GraphModule, blueprint: Blueprint, quant: QuantSpec) -> fx.GraphModule:
    """A view of the student on the same weights, whose INT8 regions round as the emitted file will. It
    observes ranges until told otherwise (`fakequant.observing`)."""
    view = fx.GraphModule(student, student.graph)
    for name in blueprint.int8:
        region = getattr(view, name, None)
        if isinstance(region, fx.GraphModule):
            setattr(view, name, fake_quantize(region, quant, share=True))
    view.eval()
    return view


def calibration_feeds(student: fx.GraphModule, data: Dataset, images: int, batch: int) -> list[Feeds]:
    """Feeds from the train split: `images` of them, in equal batches of at most `batch`, fewer where images are large
    (or in the model's fixed batch)."""
    spec = student.meta["info"].inputs[0]
    fixed = spec.shape[0] if spec.shape and isinstance(spec.shape[0], int) else None
    n = min(images, len(data.train))
    most = max(1, min(batch, _FEED_BYTES // max(1, data.train.batch([0])[0].nbytes)))
    size = fixed or max(k for k in range(1, most + 1) if n % k == 0)  # ONNX Runtime's calibrators want equal ones
    # a model of a large fixed batch is fed images again rather than none
    order = np.resize(np.random.default_rng(0).permutation(len(data.train)), max(n, size)).tolist()
    feeds: list[Feeds] = []
    for i in range(0, len(order) - size + 1, size):
        x, _ = data.train.batch(order[i : i + size])
        feeds.append({spec.name: x.numpy().astype(spec.dtype)})
    return feeds


def deployable(model: ModelProto, ctx: Context, feeds: Sequence[Feeds]) -> ModelProto:
    """The file as the target runs it: in FP16 where that is its precision, but for what overflows (on `feeds`; weights
    in any case); marked, where it is BF16."""
    if ctx.base == "bf16":
        return in_bf16(model)
    if ctx.base != "fp16":
        return model
    wide = overflowing(model, feeds)
    if wide:
        ctx.note(f"stays in FP32, for FP16 would overflow: {', '.join(wide[:8])}{' …' if len(wide) > 8 else ''}")
    return to_fp16(model, keep=wide)


def to_onnx(
    student: fx.GraphModule,
    blueprint: Blueprint,
    ctx: Context,
    feeds: Sequence[Feeds],
    calibration: Calibration = "robust",
    *,
    correct_biases: bool = False,
) -> ModelProto:
    """The student as one ONNX file; INT8 regions as QDQ with ranges, and corrections of biases where asked for, from
    `feeds`; the rest in the engine's layout."""
    regions = blueprint.int8
    emitted = emit(student, opset=MIN_OPSET if regions else None)  # `to_fp16` raises it where it must
    model = emitted.model
    if regions:
        nodes = [n for r in regions for n in emitted.nodes.get(r, ())]
        spec = replace(ctx.quant, calibration=calibration, correct_biases=correct_biases)
        model = quantize(model, nodes, feeds, spec)
    if not ctx.capabilities.channel_block or ctx.base != "fp32":
        return model
    model, behind = anchored(model, ctx.capabilities.channel_block)
    ctx.reporter.event("anchors", tensors=behind)
    return model
