"""A small residual network, data for it, and contexts that spend next to nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto
from torch import Tensor, fx, nn

from hantc.backends.onnxruntime.backend import OnnxRuntimeBackend
from hantc.backends.prediction import Machine
from hantc.backends.roofline.backend import RooflineBackend
from hantc.core.backend_api import Artefact, Backend
from hantc.core.config import EFFORTS, CompileConfig
from hantc.core.progress import Reporter
from hantc.core.store import Store
from hantc.core.types import CandidateSpec, Choice, Plan, Protocol, Region, Signature, Timing, digest
from hantc.data.dataset import Dataset, load_dataset
from hantc.data.preprocess import Preprocess
from hantc.dialect.activation import Unary
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Add
from hantc.dialect.emitter import emit
from hantc.dialect.graph import standalone_info, trace
from hantc.dialect.importer import model_info
from hantc.dialect.leaf import Leaf
from hantc.dialect.linear import Linear
from hantc.dialect.norm import BatchNorm
from hantc.dialect.pool import GlobalPool
from hantc.dialect.shape import Flatten
from hantc.ops.registry import estimate
from hantc.passes.cost import Cost
from hantc.passes.distill import Distill
from hantc.passes.engine import first_output
from hantc.passes.load import Load
from hantc.passes.match import Match
from hantc.passes.normalize import Normalize
from hantc.passes.place import CPU
from hantc.passes.rewrite import Rewrite
from hantc.passes.score import Score
from hantc.passes.state import Clock, Context, Proposal, State

CLASSES, SIZE = 4, 12
QUICK = replace(
    EFFORTS["quick"],
    time_limit_s=600.0,  # never reached: epochs end the training, so that results do not depend on the machine
    per_region=2,
    per_span=1,
    measured_per_region=5,
    distill_epochs=24,
    solutions=3,
    finetune_epochs=2,
    score_images=64,
    explored=4,
    batch_size=32,
)
STACK = CandidateSpec.make("cb_stack", k=3, w=0.5)  # half of what the blocks multiply
BOTTLE = CandidateSpec.make("cb_bottle", k=3, w=0.5)
IDENTITY = CandidateSpec.make("identity")
OFFERS = (
    *((region, STACK) for region in ("r01", "r02", "r03", "r02_r03")),
    *((region, spec) for region in ("r01", "r03") for spec in (BOTTLE, IDENTITY)),
)
# Products alone cost time, and INT8 ones a quarter: a latency is a count, the same on every machine.
COUNTING = Machine("counting", peak_fp32=1e9, peak_int8=4e9, bandwidth=1e15, bandwidth_max=1e15, op_overhead_s=0.0)


class Sketch:
    """A graph of leaves drawn node by node: `add` takes the node's name, its leaf, and what feeds it (by default
    the node drawn last)."""

    def __init__(self, *shape: int) -> None:
        self.root, self.graph, self.shape = nn.Module(), fx.Graph(), shape
        self.nodes = {"x": self.graph.placeholder("x")}

    def add(self, name: str, leaf: Leaf, *sources: str) -> str:
        """Draw one node; returns its name."""
        args = [self.nodes[s] for s in sources] or [list(self.nodes.values())[-1]]
        self.root.add_module(name, leaf)
        self.nodes[name] = self.graph.create_node("call_module", name, tuple(args), name=name)
        return name

    def chain(self, source: str, **leaves: Leaf) -> str:
        """Draw several nodes in a row, the first behind `source`; returns the last one's name."""
        for name, leaf in leaves.items():
            source = self.add(name, leaf, source)
        return source

    def done(self, *outputs: str) -> fx.GraphModule:
        """The graph, with the given outputs (by default the node drawn last)."""
        results = [self.nodes[o] for o in outputs] or [list(self.nodes.values())[-1]]
        self.graph.output(results[0] if len(results) == 1 else tuple(results))
        module = fx.GraphModule(self.root, self.graph)
        module.graph.lint()
        module.meta["info"] = standalone_info(self.shape, ())  # passes under test read the inputs alone
        module.eval()
        return module


def relu() -> Unary:
    """A ReLU leaf."""
    return Unary("Relu")


class Block(nn.Module):
    """Two 3×3 convolutions with norms and a skip connection, projected where shapes differ."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1, self.act1 = Conv(c_in, c_out, 3, stride, bias=False), BatchNorm(c_out), relu()
        self.conv2, self.norm2 = Conv(c_out, c_out, 3, bias=False), BatchNorm(c_out)
        self.skip = Conv(c_in, c_out, 1, stride) if stride > 1 else None
        self.add, self.act2 = Add(), relu()

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) → (N, c_out, H / stride, W / stride)."""
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        out: Tensor = self.act2(self.add(y, x if self.skip is None else self.skip(x)))
        return out


class ToyNet(nn.Module):
    """Stem, three residual blocks (the second halves the resolution), head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = Conv(3, 16, 3), relu()
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1))
        self.pool, self.flat, self.head = GlobalPool(), Flatten(), Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, SIZE, SIZE) → (N, CLASSES)."""
        out: Tensor = self.head(self.flat(self.pool(self.blocks(self.act(self.stem(x))))))
        return out

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        """Norms at the statistics of `x`; a head whose classes are about equally frequent and well apart."""
        for norm in (m for m in self.modules() if isinstance(m, BatchNorm)):
            norm.momentum = 1.0
        self.train()(x)
        self.eval()
        features = self.flat(self.pool(self.blocks(self.act(self.stem(x)))))
        _, _, axes = torch.linalg.svd(features - features.mean(0), full_matrices=False)
        logits = features @ axes[:2].T
        spread = logits.std(0)
        # two directions of most variance, each side of each a class
        self.head.weight.copy_(3 * torch.cat([axes[:2] / spread[:, None], -axes[:2] / spread[:, None]]))
        assert self.head.bias is not None
        self.head.bias.copy_(-self.head.weight @ features.mean(0))


def smooth_images(count: int) -> np.ndarray[Any, Any]:
    """uint8 images (N, SIZE, SIZE, 3) of a few coloured patches, all different."""
    rng = np.random.default_rng(7)
    coarse = rng.integers(0, 256, (count, 4, 4, 3)).repeat(SIZE // 4, 1).repeat(SIZE // 4, 2)
    light = rng.uniform(0.3, 1.0, (count, 1, 1, 3))
    return (coarse * light).clip(0, 255).astype(np.uint8)


class QuickOrt(OnnxRuntimeBackend):
    """The real backend, which samples just enough to give a figure."""

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        """As asked, but two short samples."""
        return super().measure(artefacts, replace(protocol, warmup=1, samples=2, min_sample_ms=0.02))


class Recorder(Reporter):
    """Keeps events in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, Mapping[str, Any]]] = []

    def event(self, kind: str, **fields: Any) -> None:
        """Note it."""
        self.events.append((kind, fields))

    def last(self, kind: str) -> Mapping[str, Any]:
        """The last event's fields."""
        return [fields for k, fields in self.events if k == kind][-1]


def warnings(ctx: Context) -> list[str]:
    """What a run has warned of so far."""
    assert isinstance(ctx.reporter, Recorder)
    return [str(fields["text"]) for kind, fields in ctx.reporter.events if kind == "warning"]


@dataclass
class Lab:
    """The toy network, its data and contexts; `context` makes a fresh store unless given one."""

    folder: Path

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        net, images = ToyNet(), smooth_images(200)
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        net.settle(x)
        with torch.no_grad():
            labels = net(x).argmax(1).numpy()
        self.model: ModelProto = emit(trace(net, (3, SIZE, SIZE), (CLASSES,))).model
        parts = {"x": images[:160], "x_val": images[160:], "y": labels[:160], "y_val": labels[160:]}
        np.savez(self.folder / "labelled.npz", **parts)
        self.counting: Backend = RooflineBackend(COUNTING)
        self.ort: Backend = QuickOrt()
        self.counter = 0

    @cached_property
    def labelled(self) -> Dataset:
        """96 training, 64 search, 40 validation images with labels."""
        spec, path = model_info(self.model).inputs[0], str(self.folder / "labelled.npz")
        return load_dataset(path, None, Preprocess(), spec, seed=0, num_classes=CLASSES, reporter=Reporter())

    @cached_property
    def plain(self) -> Dataset:
        """The same images in the same splits, without labels."""
        known = self.labelled
        parts = {name: replace(getattr(known, name), y=None) for name in ("train", "search", "val")}
        return replace(known, **parts, labelled=False, fingerprint=digest(known.fingerprint))

    def context(
        self,
        *,
        backend: Backend | None = None,
        data: Dataset | None = None,
        precisions: tuple[str, ...] = ("fp32",),
        store: Store | None = None,
        effort: Mapping[str, Any] | None = None,
        mixed: bool = False,
        device: torch.device = CPU,
        **config: Any,
    ) -> Context:
        """A context with little effort, one thread and, unless said otherwise, no data and the counting backend."""
        self.counter += 1
        out = self.folder / f"run{self.counter}"
        out.mkdir()
        backend = backend or self.counting
        store = store or Store(out / "store")
        return Context(
            config=CompileConfig(model=self.folder / "toy.onnx", out=out, store=store.root, **config),
            effort=replace(QUICK, **(effort or {})),
            backend=backend,
            capabilities=backend.capabilities(),
            precisions=precisions,
            store=store,
            reporter=Recorder(),
            clock=Clock(QUICK.time_limit_s),
            threads=1,
            out=out,
            data=data,
            mixed=mixed,
            device=device,
        )

    def begin(self) -> State:
        """What the first pass gets."""
        return State(model=self.model, model_hash=digest(self.model.SerializeToString().hex()))

    @cached_property
    def matched(self) -> State:
        """Imported, normalized, matched."""
        ctx, state = self.context(), self.begin()
        for step in (Load(), Normalize(), Match()):
            state = step.call(state, ctx)
        return state

    @cached_property
    def shared(self) -> Context:
        """The context of `costed` and `scored`: labels, both precisions, counted latencies. Do not write to its store
        in tests: take `fresh`."""
        return self.context(data=self.labelled, precisions=("fp32", "int8"))

    def fresh(self, **options: Any) -> Context:
        """A context as `shared`, with a store of its own."""
        return self.context(**{"data": self.labelled, "precisions": ("fp32", "int8"), **options})

    @cached_property
    def costed(self) -> State:
        """A few candidates, and what everything costs."""
        assert self.matched.match is not None
        proposals = [offer(self.matched.match.region(region), spec) for region, spec in OFFERS]
        return Cost().call(replace(self.matched, proposals=tuple(proposals)), self.shared)

    @cached_property
    def scored(self) -> State:
        """Distilled and scored."""
        return Score().call(Distill().call(self.costed, self.shared), self.shared)

    def rewritten(self) -> State:
        """A student of two replaced regions and one that stays the teacher's in INT8; made anew each time, for
        fine-tuning trains it in place."""
        assert self.scored.match is not None
        picks = {"r01": (STACK.name, "int8"), "r02": ("teacher", "int8"), "r03": (STACK.name, "fp32")}
        choices = tuple(
            Choice(r.name, r.kind, *picks.get(r.name, ("teacher", "fp32")), 0.0, 0.0, 0.0)
            for r in self.scored.match.regions
            if len(r.atoms) == 1
        )
        return Rewrite().call(replace(self.scored, plan=Plan(choices, 1.0, 1.0, 0.0)), self.shared)

    def distance(self, state: State) -> float:
        """Mean squared error of the student's outputs on images that nothing was trained on."""
        assert state.student is not None and state.network is not None
        x, _ = self.labelled.val.batch(list(range(40)))
        with torch.no_grad():
            pair = [first_output(m(x)) for m in (state.student, state.network)]
        return float((pair[0] - pair[1]).square().mean())


def offer(region: Region, spec: CandidateSpec) -> Proposal:
    """A proposal with its true size."""
    return Proposal(region.name, spec, *estimate(spec, Signature.of(region)))


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Made once; states are frozen and passes pure, so that tests can share them."""
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def sketch() -> type[Sketch]:
    """The class, for tests that draw graphs."""
    return Sketch
