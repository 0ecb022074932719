"""A test bench for whole selections: students composed of ready-made parts, judged on a few images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from hantc.core.types import untouched
from hantc.data.dataset import Dataset
from hantc.dialect.examples import example_inputs
from hantc.dialect.fakequant import fake_quantize, observing
from hantc.dialect.graph import with_taps
from hantc.passes.engine import OutputKind, divergence, fast_layout, fast_module, first_output, mixed, output_kind
from hantc.passes.plug import compose, origin_for, teacher_part, trained
from hantc.passes.state import Context, State
from hantc.search.problem import Item

_IMAGES = 192


class Bench:
    """Evaluates selections in a fraction of a second each. Parts are built once and shared; INT8 ranges are
    those on the teacher's activations."""

    def __init__(self, state: State, ctx: Context, data: Dataset) -> None:
        assert state.network is not None and state.match is not None
        self.state, self.ctx = state, ctx
        self.network: fx.GraphModule = fast_module(state.network)
        self.kind: OutputKind = output_kind(
            self.network, example_inputs(self.network.meta["info"], 2)[0], data.num_classes
        )
        x, _ = data.search.batch(list(range(min(_IMAGES, len(data.search)))))
        # half of them blended: a trained teacher is sure of its own training images, which tell little
        half = x.shape[0] // 2
        blended, _ = mixed(x[half:], None, torch.Generator().manual_seed(ctx.config.seed), 1.0)
        self.x = fast_layout(torch.cat([x[:half], blended]))
        taps = sorted({r.input for r in state.match.regions})
        with torch.no_grad():
            out, values = with_taps(self.network, taps)(self.x)
        self.teacher = first_output(out)
        self.inputs = dict(zip(taps, values, strict=True))
        self.parts: dict[tuple[str, str, str], nn.Module] = {}
        self.specs = {p.spec.name: p.spec for p in state.proposals or ()}

    def part(self, name: str, candidate: str, precision: str) -> nn.Module:
        """The replacement module of one pick, rounded if INT8."""
        key = (name, candidate, precision)
        if key not in self.parts:
            assert self.state.match is not None and self.state.weights is not None
            region = self.state.match.region(name)
            if candidate == "teacher":
                made = teacher_part(self.network, region)
            else:
                spec = self.specs[candidate]
                origin = origin_for(spec, self.network, self.state.match, region)
                made = trained(region, spec, self.state.weights[name, candidate], origin=origin)
            made = fast_module(made)
            if precision == "int8":
                made = fake_quantize(made, self.ctx.quant)
                with observing(made, self.x.shape[0]), torch.no_grad():
                    made(self.inputs[region.input])
            self.parts[key] = made
        return self.parts[key]

    def loss(self, items: Sequence[Item]) -> float:
        """Mean divergence of a selection's student from the teacher."""
        assert self.state.match is not None
        picks = [(i.region, i.candidate, i.precision) for i in items]
        parts = [(self.state.match.region(r), self.part(r, c, p)) for r, c, p in picks if not untouched(c, p)]
        student = compose(self.network, parts)
        with torch.no_grad():
            out = first_output(student(self.x))
        return float(divergence(self.kind, out, self.teacher).mean())
