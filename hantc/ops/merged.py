"""Several blocks in a row replaced by one of them, to be trained to do the work of all."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import fx

from hantc.core.types import CandidateSpec
from hantc.ops.derived import DerivedFamily, Origin, editable, structure
from hantc.ops.slim import UNCHANGED, slimmed, spec_of, unsuited


class Merged(DerivedFamily):
    """One block of a span in the place of all of them: the one of the span's own shape that is nearest to the
    span's output on real activations. Trained blocks of a residual stage do similar work (Veit et al. 2016,
    arXiv 1605.06431), so that one of them is a far better start than random weights. Options as `slim`."""

    name = "merged"
    source = "depth pruning with distillation (after arXiv 1605.06431); hantc"
    params = MappingProxyType({"keep": (1.0, 0.5)})
    options = UNCHANGED
    start = 1.0  # has much to learn: the work of the blocks left out

    def grid(self) -> list[CandidateSpec]:
        """As the block is, or all that quantises badly replaced."""
        styles = ((), ("relu",), ("relu", "se"))
        return [spec_of(self.name, keep, *style) for style in styles for keep in (1.0, 0.5)]

    def unsuited(self, spec: CandidateSpec, origin: Origin) -> str:
        """There must be several blocks, one of which leads from the span's input shape to its output shape."""
        if len(origin.blocks) < 2:
            return "not a span of several blocks"
        fitting = _fitting(origin)
        if not fitting:
            return "no block of the span has the span's own shapes"
        p = self.values(spec)
        return "" if _unchanged(p) else unsuited(p, fitting[0])

    def derive(self, spec: CandidateSpec, origin: Origin) -> fx.GraphModule:
        """The nearest block, slimmed."""
        fitting, x, p = _fitting(origin), origin.samples, self.values(spec)
        best = fitting[0]
        if x is not None and len(fitting) > 1:
            whole = origin.whole(x)
            best = min(fitting, key=lambda block: float((block(x) - whole).square().mean()))
        return editable(best) if _unchanged(p) else slimmed(p, best, x)


def _unchanged(p: Mapping[str, Any]) -> bool:
    return {**p, "keep": float(p["keep"])} == {**UNCHANGED, "keep": 1.0}


def _fitting(origin: Origin) -> list[fx.GraphModule]:
    """Blocks of the span's own shapes; of several structures, those of the first one's."""

    def shapes(module: fx.GraphModule) -> tuple[object, object]:
        info = module.meta["info"]
        return info.inputs[0].shape[1:], info.outputs[0].shape[1:]

    blocks = [b for b in origin.blocks if shapes(b) == shapes(origin.whole)]
    return [b for b in blocks if structure(b) == structure(blocks[0])]
