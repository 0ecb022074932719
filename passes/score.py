"""Score: trained candidates -> what each does to the whole network's output, alone.

Half of the images are blended (mixup): a teacher knows the images that it was trained on by heart, and what is
made from its weights does so too, so that on those alone every such candidate looks perfect.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from hantc.core.types import Region, ScoreRow, digest
from hantc.data.dataset import Dataset
from hantc.dialect.examples import example_inputs
from hantc.dialect.fakequant import fake_quantize, observing
from hantc.dialect.graph import read_beside, subgraph, with_taps
from hantc.ops.registry import is_exact
from hantc.passes.distill import weights_key
from hantc.passes.engine import (
    OutputKind,
    divergence,
    fast_module,
    first_output,
    judging_batches,
    moved,
    output_kind,
    relative_mse,
)
from hantc.passes.place import CPU, copied_to
from hantc.passes.plug import origin_for, teacher_part, trained
from hantc.passes.state import Context, Proposal, State, WeightMap

_MAX_DROP = 25.0  # points: a candidate that alone costs more is hopeless (the paper's 5 % rule is applied to
# candidates as trained for an epoch and never repaired; ours are trained on together afterwards)
_VERSION = 7
# of what the teacher takes: the dearer precision of a candidate is looked at where it is faster than that
_FASTER = 0.9
_BETTER = 0.8  # of the score in the cheaper precision: what is not nearer to the teacher by so much adds nothing
_LOOK = 2  # batches, one of them blended, after which that is judged


@dataclass
class _Entry:
    """One (candidate, precision) being scored."""

    region: Region
    candidate: str
    precision: str
    module: fx.GraphModule
    key: str
    cheaper: str = ""  # the precision that this one must be better than
    bar: float = math.nan  # the score there, if it is known already
    losses: list[Tensor] = field(default_factory=list)
    hits: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    mse: list[float] = field(default_factory=list)

    @property
    def at(self) -> tuple[str, str, str]:
        """Region, candidate, precision."""
        return self.region.name, self.candidate, self.precision

    @property
    def score(self) -> float:
        """The mean loss so far."""
        return float(torch.cat(self.losses).mean())


class Score:
    """Trained candidates -> divergence of the network's output when one alone is plugged in (search split)."""

    name: ClassVar[str] = "score"
    requires: ClassVar[tuple[str, ...]] = ("network", "match", "weights", "costs")
    ensures: ClassVar[tuple[str, ...]] = ("scores",)

    def call(self, state: State, ctx: Context) -> State:
        """Score what the store does not hold; the teacher's own operation in FP32 scores 0."""
        assert state.match is not None and state.costs is not None and state.weights is not None
        teacher = [_perfect(r.name, "teacher", ctx) for r in state.match.regions]
        if ctx.data is None:
            exact = [_perfect(region, candidate, ctx) for region, candidate in state.weights]
            return replace(state, scores=tuple(teacher + exact))
        rows, entries = self._entries(state, ctx)
        if entries:
            rows += self._score(state, ctx, ctx.data, entries)
        order = {r.name: i for i, r in enumerate(state.match.regions)}
        rows.sort(key=lambda r: (order[r.region], r.candidate, r.precision))
        return replace(state, scores=tuple(teacher + rows))

    def _entries(self, state: State, ctx: Context) -> tuple[list[ScoreRow], list[_Entry]]:
        assert state.match is not None and state.costs is not None and state.weights is not None
        assert state.network is not None and ctx.data is not None
        proposals = {(p.region, p.spec.name): p for p in state.proposals or ()}
        rows: dict[tuple[str, str, str], ScoreRow] = {}
        entries: list[_Entry] = []
        for region, candidate, precision, cheaper in self._wanted(state, ctx):
            proposal = proposals.get((region.name, candidate))
            if proposal is not None and precision == ctx.base and is_exact(proposal.spec):
                rows[region.name, candidate, precision] = _perfect(region.name, candidate, ctx)
                continue
            key = self._key(state, ctx, region, proposal, precision)
            if cheaper and ctx.store.get_json("verdict", key) is not None:
                continue  # first: another run, for which it was the cheaper one, may have scored it
            stored = ctx.store.get_json("score", key)
            if stored is not None:
                rows[region.name, candidate, precision] = ScoreRow(**{**stored, "region": region.name})
                continue
            if proposal is None:
                module = teacher_part(state.network, region)
            else:
                origin = origin_for(proposal.spec, state.network, state.match, region)
                module = trained(region, proposal.spec, state.weights[region.name, candidate], origin=origin)
            if precision == "int8":
                module = fake_quantize(module, ctx.quant)
            twin = rows.get((region.name, candidate, cheaper))
            bar = twin.score if twin is not None else math.nan
            entries.append(_Entry(region, candidate, precision, module, key, cheaper, bar))
        return list(rows.values()), entries

    @staticmethod
    def _wanted(state: State, ctx: Context) -> list[tuple[Region, str, str, str]]:
        """(region, candidate, precision, "" or the cheaper precision that it must be better than): every candidate in
        the precision in which it is faster, and in the other one where that is faster than the teacher still."""
        assert state.match is not None and state.costs is not None and state.weights is not None
        times: dict[tuple[str, str], dict[str, float]] = {}
        for row in state.costs.rows:
            times.setdefault((row.region, row.candidate), {})[row.precision] = state.costs.marginal_ms(row)
        # a span's teacher in INT8 is that of each of its parts: it would only be scored twice
        atoms = [r for r in state.match.regions if len(r.atoms) == 1]
        wanted = [(r, "teacher", "int8", "") for r in atoms if "int8" in times.get((r.name, "teacher"), {})]
        exact = {p.spec.name for p in state.proposals or () if is_exact(p.spec)}
        for name, candidate in state.weights:
            ways = times.get((name, candidate), {})
            order = sorted(ways, key=lambda p: ways[p])
            limit = _FASTER * times.get((name, "teacher"), {}).get(ctx.base, 0.0)
            cheaper = ["", *order[:1] * (len(order) - 1)][: len(order)]
            wanted += [
                (state.match.region(name), candidate, p, c)
                for p, c in zip(order, cheaper, strict=True)
                if not c or ways[p] < limit or (p == ctx.base and candidate in exact)
            ]
        return wanted

    @staticmethod
    def _key(state: State, ctx: Context, region: Region, proposal: Proposal | None, precision: str) -> str:
        assert ctx.data is not None and state.weights is not None
        base = {
            "version": _VERSION,
            "precision": precision,
            "images": ctx.effort.score_images,
            "reduce": precision == "int8" and ctx.capabilities.reduce_range,
        }
        if precision == "int8" and ctx.capabilities.symmetric:
            base["symmetric"] = True
        if proposal is not None:
            # their content too: weights that were lost and trained anew are others
            content = _content(state.weights[region.name, proposal.spec.name])
            return digest({**base, "weights": weights_key(state, ctx, proposal), "content": content})
        return digest(
            {**base, "teacher": state.model_hash, "region": [region.input, region.output], "data": ctx.data.fingerprint}
        )

    def _score(self, state: State, ctx: Context, data: Dataset, entries: Sequence[_Entry]) -> list[ScoreRow]:
        assert state.network is not None
        kind = output_kind(state.network, example_inputs(state.network.meta["info"], 2)[0], data.num_classes)
        device = ctx.place(state.network)
        network = copied_to(device, fast_module(state.network))
        for e in entries:
            e.module.to(device)
        n = min(ctx.effort.score_images, len(data.search))
        hits: list[Tensor] = []
        with ctx.reporter.bar(f"scoring {len(entries)} candidates", n) as bar, torch.no_grad():
            for x, y, blended in judging_batches(data.search, n, blend=True):
                x, y = moved(x, y, device)
                hits.append(self._batch(network, kind, entries, x, y, first=not hits, blended=blended).to(CPU))
                bar.advance(x.shape[0])
                if len(hits) == _LOOK:
                    entries = self._worthwhile(entries, ctx)
        teacher_hits = torch.cat(hits)
        rows = []
        # dearer ones first: whether they are worth it is judged with the cheaper one's images, not with its stored row
        for e in sorted(entries, key=lambda e: not e.cheaper):
            row = self._row(e, teacher_hits, data.labelled)
            ctx.store.put_json("score", e.key, asdict(row))
            rows.append(row)
        return rows

    @staticmethod
    def _worthwhile(entries: Sequence[_Entry], ctx: Context) -> list[_Entry]:
        """Without those in a dearer precision that are no nearer to the teacher than in the cheaper one."""
        scores = {e.at: e.score for e in entries}
        kept = []
        for e in entries:
            bar = scores.get((*e.at[:2], e.cheaper), e.bar)
            if e.cheaper and e.score > _BETTER * bar:
                ctx.store.put_json("verdict", e.key, {"as_good": e.cheaper})
            else:
                kept.append(e)
        return kept

    @staticmethod
    def _batch(
        network: fx.GraphModule,
        kind: OutputKind,
        entries: Sequence[_Entry],
        x: Tensor,
        y: Tensor | None,
        *,
        first: bool,
        blended: bool,
    ) -> Tensor:
        """Score every entry on one batch; the teacher's own hits."""
        names = [a.name for a in next(n for n in network.graph.nodes if n.op == "output").all_input_nodes]
        ends = {e.region.output for e in entries}
        beside = {end: read_beside(network, end, names[0]) for end in ends}
        rests = {end: subgraph(network, [end, *beside[end]], names[:1]) for end in ends}
        taps = sorted({e.region.input for e in entries} | ends | {n for some in beside.values() for n in some})
        outputs, values = with_taps(network, taps)(x)
        tapped = dict(zip(taps, values, strict=True))
        t = first_output(outputs)
        for e in entries:
            source, target = tapped[e.region.input], tapped[e.region.output]
            if first and e.precision == "int8":
                with observing(e.module, x.shape[0]):
                    e.module(source)
            made = e.module(source)
            e.mse.append(float(relative_mse(made, target)))
            end = e.region.output
            s = first_output(rests[end](made, *(tapped[n] for n in beside[end])))
            e.losses.append(divergence(kind, s, t).to(CPU))
            e.hits.append((s.argmax(1) == y).to(CPU) if y is not None and kind.classifier else torch.zeros(0))
            if not blended:
                e.same.append((s.argmax(1) == t.argmax(1)).to(CPU) if kind.classifier else torch.ones(s.shape[0]))
        return t.argmax(1) == y if y is not None and kind.classifier else torch.zeros(0)

    @staticmethod
    def _row(e: _Entry, teacher_hits: Tensor, labelled: bool) -> ScoreRow:
        losses = torch.cat(e.losses)
        score, spread = float(losses.mean()), float(losses.std()) / math.sqrt(max(1, losses.numel()))
        drop = None
        if labelled and teacher_hits.numel():
            drop = 100 * float(teacher_hits.float().mean() - torch.cat(e.hits).float().mean())
        agreement = float(torch.cat(e.same).float().mean())
        dropped = ""
        if not math.isfinite(score):
            dropped, score, spread = "non-finite score", 1e9, 0.0
        elif (drop if drop is not None else 100 * (1 - agreement)) > _MAX_DROP:
            dropped = f"alone it costs {drop if drop is not None else 100 * (1 - agreement):.1f} points"
        mse = sum(e.mse) / len(e.mse)
        return ScoreRow(
            e.region.name,
            e.candidate,
            e.precision,
            score,
            spread,
            drop,
            agreement,
            mse if math.isfinite(mse) else 1e9,
            dropped,
        )


def _perfect(region: str, candidate: str, ctx: Context) -> ScoreRow:
    """The row of what computes exactly what the teacher does."""
    drop = 0.0 if ctx.data is None or ctx.data.labelled else None
    return ScoreRow(region, candidate, ctx.base, 0.0, 0.0, drop, 1.0, 0.0)


def _content(weights: WeightMap) -> str:
    """Digest of trained tensors."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
