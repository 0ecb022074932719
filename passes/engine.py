"""What the training passes share: losses, tapped teachers, seeded order, a time-boxed loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hantc.data.augment import Augment
from hantc.data.dataset import Dataset, Split
from hantc.dialect.norm import BatchNorm
from hantc.dialect.opaque import Opaque
from hantc.dialect.spread import image_variance, ordinary, per_image
from hantc.passes.place import CPU


def first_output(result: object) -> Tensor:
    """The first output of a network (the one that losses are taken on)."""
    out = result[0] if isinstance(result, (tuple, list)) else result
    assert isinstance(out, Tensor)
    return out


@dataclass(frozen=True)
class OutputKind:
    """What a network's first output is, so that losses fit: class logits, class probabilities, or values."""

    classifier: bool
    probabilities: bool

    def log_probs(self, out: Tensor) -> Tensor:
        """Log class probabilities (N, classes)."""
        flat = out.flatten(1)
        return torch.log(flat.clamp_min(1e-8)) if self.probabilities else F.log_softmax(flat, 1)


def output_kind(network: nn.Module, x: Tensor, num_classes: int | None) -> OutputKind:
    """Judge from one batch: (N, C) outputs are classes; rows of probabilities sum to one."""
    with torch.no_grad():
        out = first_output(network(x))
    flat = out.flatten(1)
    classifier = out.dim() == 2 and out.shape[1] > 1 and (num_classes is None or num_classes <= out.shape[1])
    sums = bool(((flat.sum(1) - 1).abs() < 1e-3).all()) and bool((flat >= 0).all())
    return OutputKind(classifier, classifier and sums)


def divergence(kind: OutputKind, student: Tensor, teacher: Tensor) -> Tensor:
    """Per-image distance of outputs: KL(T‖S) for classifiers, squared error over variance otherwise."""
    if kind.classifier:
        p, q = kind.log_probs(teacher), kind.log_probs(student)
        return (p.exp() * (p - q)).sum(1)
    t = teacher.flatten(1)
    return (student.flatten(1) - t).square().mean(1) / t.var().clamp_min(1e-12)


def relative_mse(student: Tensor, teacher: Tensor, variance: Tensor | None = None) -> Tensor:
    """Mean over the images of the squared error over the variance of the teacher's activation (so that 1.0 is 'no
    better than its mean'). Each image counts by its own `variance`, (N,): see `dialect.spread`."""
    variance = image_variance(teacher) if variance is None else variance
    return (per_image((student - teacher).square()) / variance).mean()


def calibrate_norm(candidate: nn.Module, target: Tensor, source: Tensor) -> None:
    """Start a candidate's last norms at the mean and spread of what they must produce together.

    Without it, a region whose output is large (EfficientNet's last block) starts tens of variances off.
    """
    norms = _last_norms(candidate)
    if not norms or target.dim() < 2 or any(n.weight.numel() != target.shape[1] for n in norms):
        return
    residual = (target - source if target.shape == source.shape else target)[ordinary(image_variance(target))]
    dims = [d for d in range(residual.dim()) if d != 1]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(residual.std(dims).clamp_min(1e-4) / math.sqrt(len(norms)))
            norm.bias.copy_(residual.mean(dims) / len(norms))


@contextmanager
def statistics_at_once(module: nn.Module) -> Iterator[None]:
    """Inside, what a norm sees in training mode replaces its running statistics instead of moving them a little."""
    norms = [m for m in module.modules() if isinstance(m, BatchNorm)]
    before = [m.momentum for m in norms]
    try:
        for m in norms:
            m.momentum = 1.0
        yield
    finally:
        for m, momentum in zip(norms, before, strict=True):
            m.momentum = momentum


def _last_norms(candidate: nn.Module) -> list[BatchNorm]:
    """The norms of the candidate's last layer: several where it is a sum of branches."""
    named = [(name, m) for name, m in candidate.named_modules() if isinstance(m, BatchNorm)]
    if not named:
        return []
    layer = ".".join(named[-1][0].split(".")[:2])  # body.<layer>, as families build it
    same = [m for name, m in named if name.startswith(f"{layer}.")] if layer.startswith("body.") else []
    return same if same and same[-1] is named[-1][1] else [named[-1][1]]


def augmentation(network: fx.GraphModule, data: Dataset, kind: OutputKind, batch: int = 250) -> Augment:
    """Which augmentations keep the labels, found out by asking the teacher: images are shifted by up to an
    eighth, and mirrored if that costs the teacher less than two points (labels) or it still agrees with
    itself on nine images in ten (no labels)."""
    split = data.search
    indices = range(min(len(split), 500))
    x, y = split.batch(list(indices))
    size = min(x.shape[2:]) if x.shape[1] <= 4 else min(x.shape[1:3])
    shift = max(1, int(size) // 8)
    if not kind.classifier:
        return Augment(shift=0, flip=False)  # the output moves with the image
    width = 3 if x.shape[1] <= 4 else 2
    with torch.no_grad():
        plain = torch.cat([first_output(network(p)).flatten(1).argmax(1) for p in x.split(batch)])
        mirrored = torch.cat([first_output(network(p.flip(width))).flatten(1).argmax(1) for p in x.split(batch)])
    if y is not None:
        flip = bool((mirrored == y).float().mean() > (plain == y).float().mean() - 0.02)
    else:
        flip = bool((mirrored == plain).float().mean() > 0.9)
    return Augment(shift=shift, flip=flip)


def multiplied_in_bf16(on: bool, device: torch.device = CPU) -> torch.autocast:
    """Inside, `device`'s convolutions and matrix products round what they multiply to BF16 (mixed precision: weights,
    their gradients and moments stay in FP32)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def takes_bf16(module: nn.Module) -> bool:
    """Whether it is made of the dialect's own leaves, in FP32: what stands for an ONNX operator as the file has it may
    not compute on BF16 values."""
    own = not any(isinstance(m, Opaque) for m in module.modules())
    return own and all(p.dtype == torch.float32 for p in module.parameters())


_MOST_MORE = 0.75  # share of batches without labels, at most
_M = TypeVar("_M", bound=nn.Module)


def fast_module(module: _M) -> _M:
    """The module itself, its weights channels-last to go with `fast_layout`; values of other ranks stay."""
    for value in (*module.parameters(), *module.buffers()):
        if value.dim() == 4:
            value.data = value.data.contiguous(memory_format=torch.channels_last)
    return module


def fast_layout(x: Tensor) -> Tensor:
    """Images channels-last in memory: a quarter faster in torch's CPU convolutions."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def mixed(x: Tensor, y: Tensor | None, generator: torch.Generator, share: float) -> tuple[Tensor, Tensor | None]:
    """With probability `share`, every image of the batch is blended with another one (mixup) and the labels
    are withheld: the teacher itself says what a blend is. Few images thereby teach much more, above all where
    the teacher is no longer sure of them (Beyer et al. 2022, "Knowledge distillation: a good teacher is
    patient and consistent")."""
    if float(torch.rand((), generator=generator)) >= share:
        return x, y
    weight = torch.rand(x.shape[0], *([1] * (x.dim() - 1)), generator=generator)
    other = x[torch.randperm(x.shape[0], generator=generator)]
    return fast_layout(torch.lerp(x, other, weight)), None


def moved(x: Tensor, y: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """A batch on a device."""
    return x.to(device), None if y is None else y.to(device)


def epochs(split: Split, size: int, augment: Augment | None, seed: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Endless shuffled batches of `size` (short last batches are left out unless there is only one)."""
    generator = torch.Generator().manual_seed(seed)
    n = len(split)
    while True:
        order = torch.randperm(n, generator=generator)
        for i in range(0, max(n - size + 1, 1), size):
            x, y = split.batch(order[i : i + size].tolist(), augment=augment, generator=generator)
            yield fast_layout(x), y


def fit_images(positions: int, total: int, bounds: tuple[int, int]) -> int:
    """How many images a least-squares fit looks at, for `total` positions at `positions` an image, within `bounds`."""
    least, most = bounds
    return min(most, max(least, math.ceil(total / positions)))


def different(data: Dataset, size: int, n: int) -> int:
    """At most `n`: as many images as batches of `size` bring before any comes again. A fit must not be judged on
    images that it has seen."""
    return min(n, max(size, len(data.train) // size * size))


def training_batches(
    data: Dataset, size: int, augment: Augment | None, seed: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Endless shuffled batches of training images; with `data.more`, as many of a kind as there are images, but at
    least a quarter of the labelled ones."""
    own = epochs(data.train, size, augment, seed)
    if data.more is None:
        yield from own
        return
    more = epochs(data.more, size, augment, seed)
    share = min(_MOST_MORE, len(data.more) / (len(data.more) + len(data.train)))
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield next(more if float(torch.rand((), generator=generator)) < share else own)


class TimeBox:
    """Learning-rate schedule over a time share: warm-up, then cosine to zero at the end of the share or of
    the step limit, whichever comes first. The clock starts behind the first step, which pays for set-up.
    `begun`: share that an interrupted run did already; seconds and steps are those of the whole training."""

    def __init__(self, seconds: float, max_steps: int, warmup: float = 0.04, begun: float = 0.0) -> None:
        self.begun = min(max(begun, 0.0), 1.0)
        self.seconds, self.max_steps, self.warmup = max(seconds, 1e-3), max(1, max_steps), warmup
        self.step = 0
        self._start = time.monotonic()

    def advance(self) -> bool:
        """Count one step; False when the last is done."""
        self.step += 1
        if self.step == 1:
            self._start = time.monotonic()
        return self.progress < 1.0

    def _spent(self) -> float:
        return (time.monotonic() - self._start) / self.seconds if self.step else 0.0

    @property
    def progress(self) -> float:
        """Share done, 0…1."""
        return min(1.0, self.begun + max(self.step / self.max_steps, self._spent()))

    @property
    def hurried(self) -> bool:
        """Whether the time will be over before all steps are done."""
        return self._spent() > self.step / self.max_steps

    def rate(self) -> float:
        """Factor on the base learning rate for the step now to be made."""
        done = self.progress
        rise = min(1.0, (done - self.begun + 1 / self.max_steps) / self.warmup)
        return rise * 0.5 * (1 + math.cos(math.pi * done))


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's base rate (kept in the group as `base`)."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("base", group["lr"]) * factor


def judging_batches(
    split: Split, n: int, size: int = 100, *, blend: bool
) -> Iterator[tuple[Tensor, Tensor | None, bool]]:
    """(images, labels, whether blended) of the first `n` images in batches of `size`. With `blend`, every second
    batch is blended (mixup, the same blends each time) and has no labels: a teacher knows the images that it was
    trained on by heart, so that they tell little of how a student does on others."""
    size = min(size, max(1, math.ceil(n / 2))) if blend else size  # a small split has both kinds too
    generator = torch.Generator().manual_seed(0)
    for k, i in enumerate(range(0, n, size)):
        x, y = split.batch(list(range(i, min(n, i + size))))
        blended = blend and k % 2 == 1
        if blended:
            x, y = mixed(x, None, generator, 1.0)
        yield fast_layout(x), y, blended


class Judge:
    """Evaluates networks on one split against one teacher, whose outputs are computed once, all on one device; `blend`
    as `judging_batches`."""

    def __init__(
        self,
        teacher: nn.Module,
        split: Split,
        kind: OutputKind,
        *,
        limit: int | None = None,
        batch: int = 100,
        blend: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self.split, self.kind, self.batch, self.blend, self.device = split, kind, batch, blend, device
        self.n = min(len(split), limit or len(split))
        with torch.no_grad():
            self.outputs = [first_output(teacher(x)) for x, _, _ in self._batches()]

    def _batches(self) -> Iterator[tuple[Tensor, Tensor | None, bool]]:
        for x, y, blended in judging_batches(self.split, self.n, self.batch, blend=self.blend):
            yield *moved(x, y, self.device), blended

    def __call__(self, module: nn.Module) -> dict[str, float]:
        """Mean CE (nan without labels), KL or divergence, accuracy in percent (nan), agreement; all but the
        divergence on images as they are."""
        sums = {"ce": 0.0, "kl": 0.0, "accuracy": 0.0, "agreement": 0.0}
        plain = labelled = 0
        with torch.no_grad():
            for (x, y, blended), t in zip(self._batches(), self.outputs, strict=True):
                s = first_output(module(x))
                sums["kl"] += float(divergence(self.kind, s, t).sum()) / max(self.n, 1)
                plain += 0 if blended else x.shape[0]
                if self.kind.classifier and not blended:
                    sums["agreement"] += float((s.argmax(1) == t.argmax(1)).sum())
                    if y is not None:
                        labelled += x.shape[0]
                        sums["ce"] += float(F.nll_loss(self.kind.log_probs(s), y, reduction="sum"))
                        sums["accuracy"] += 100 * float((s.argmax(1) == y).sum())
        means = {"kl": sums["kl"], "agreement": sums["agreement"] / max(plain, 1)}
        for key in ("ce", "accuracy"):
            means[key] = sums[key] / labelled if labelled else float("nan")
        return means


def trainable(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """All parameters of some modules that may change, each once."""
    found: dict[int, nn.Parameter] = {id(p): p for m in modules for p in m.parameters() if p.requires_grad}
    return list(found.values())
