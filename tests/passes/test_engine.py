"""What the training passes share."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from hantc.data.augment import Augment
from hantc.data.dataset import Dataset, Split
from hantc.data.preprocess import Preprocess
from hantc.dialect.activation import Softmax
from hantc.dialect.conv import Conv
from hantc.dialect.linear import Linear
from hantc.dialect.norm import BatchNorm
from hantc.dialect.pool import GlobalPool, Pool
from hantc.dialect.shape import Flatten
from hantc.passes import engine
from hantc.passes.engine import (
    Judge,
    OutputKind,
    TimeBox,
    augmentation,
    calibrate_norm,
    divergence,
    epochs,
    first_output,
    output_kind,
    relative_mse,
    set_rate,
    trainable,
    training_batches,
)

if TYPE_CHECKING:
    from tests.passes.conftest import Lab, Sketch

LOGITS, PROBABILITIES, VALUES = OutputKind(True, False), OutputKind(True, True), OutputKind(False, False)


class Watch:
    """A clock that the test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(engine, "time", type("time", (), {"monotonic": lambda: self.now}))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def test_a_time_box_ends_at_its_last_step(watch: Watch) -> None:
    box = TimeBox(1000.0, 7)
    answers = []
    for _ in range(7):
        answers.append(box.advance())
        watch.now += 0.001
    assert answers == [True] * 6 + [False]
    assert box.progress == 1.0


def test_a_time_box_ends_with_its_time(watch: Watch) -> None:
    box = TimeBox(10.0, 1_000_000)
    steps = 0
    while box.advance():
        steps += 1
        watch.now += 0.5
    # the first step, which also sets things up, is not counted against the time
    assert 18 <= steps <= 22
    assert box.progress == 1.0


def test_the_first_steps_setting_up_does_not_eat_the_time(watch: Watch) -> None:
    box = TimeBox(10.0, 1_000_000)
    watch.now += 50.0
    assert box.advance()
    watch.now += 1.0
    assert box.advance()
    assert box.progress < 0.5


@pytest.mark.parametrize(("seconds", "steps"), [(1e9, 200), (50.0, 1_000_000)])
def test_the_rate_rises_then_falls_to_nothing(watch: Watch, seconds: float, steps: int) -> None:
    box = TimeBox(seconds, steps)
    rates, progress = [box.rate()], [box.progress]
    while box.advance():
        watch.now += 0.25
        rates.append(box.rate())
        progress.append(box.progress)
    assert all(0 <= r <= 1 for r in rates)
    assert progress == sorted(progress)
    top = int(np.argmax(rates))
    assert max(rates) > 0.95
    assert progress[top] < 0.2
    assert rates[0] < 0.5
    assert rates[-1] < 0.01
    assert rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 0), (-1.0, 5), (10.0, 1)])
def test_a_time_box_without_room_still_makes_one_step(watch: Watch, seconds: float, steps: int) -> None:
    box = TimeBox(seconds, steps)
    assert 0 <= box.rate() <= 1
    watch.now += 1e-2
    box.advance()
    watch.now += 1e-2
    assert not box.advance()
    assert math.isfinite(box.rate())


def test_rates_scale_from_each_groups_own_base() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    for factor in (0.5, 0.25, 1.0, 0.0):
        set_rate(optimizer, factor)
        assert [g["lr"] for g in optimizer.param_groups] == [factor, 0.1 * factor]


# ---- outputs ----


def test_the_first_output_is_the_one_that_counts() -> None:
    a, b = torch.ones(1), torch.zeros(1)
    assert first_output(a) is first_output((a, b)) is first_output([a, b]) is a


def head(*tail: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Flatten(), Linear(12, 5), *tail).eval()


def test_kinds_of_outputs() -> None:
    x = torch.randn(4, 3, 2, 2)
    assert output_kind(head(), x, 5) == LOGITS
    assert output_kind(head(), x, None) == LOGITS
    assert output_kind(head(Softmax()), x, 5) == PROBABILITIES
    assert output_kind(head(), x, 3) == LOGITS, "fewer classes in the data than the model knows"
    assert output_kind(head(), x, 9) == VALUES, "more classes than outputs"
    assert output_kind(nn.Sequential(Conv(3, 5)), x, 5) == VALUES, "a map, not classes"
    assert output_kind(nn.Sequential(Flatten(), Linear(12, 1)), x, None) == VALUES
    # values in a row that happen to be probabilities are no classes either
    maps = nn.Sequential(Conv(3, 5), Softmax(1))
    assert output_kind(maps, x, 5) == VALUES


def test_log_probabilities_of_logits_and_of_probabilities_agree() -> None:
    logits = torch.randn(6, 5)
    a, b = LOGITS.log_probs(logits), PROBABILITIES.log_probs(logits.softmax(1))
    assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(a.exp().sum(1), torch.ones(6))
    assert torch.isfinite(PROBABILITIES.log_probs(torch.tensor([[1.0, 0.0]]))).all()


@pytest.mark.parametrize("kind", [LOGITS, PROBABILITIES, VALUES])
def test_a_divergence_is_zero_for_equals_and_else_positive(kind: OutputKind) -> None:
    torch.manual_seed(0)
    t, s = torch.randn(8, 5), torch.randn(8, 5)
    if kind.probabilities:
        t, s = t.softmax(1), s.softmax(1)
    same = divergence(kind, t.clone(), t)
    assert same.shape == (8,)
    assert torch.allclose(same, torch.zeros(8), atol=1e-6)
    assert (divergence(kind, s, t) > 1e-4).all()


def test_the_divergence_of_classes_is_the_kl_from_the_teacher() -> None:
    t, s = torch.randn(8, 5), torch.randn(8, 5)
    want = nn.functional.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True).sum(1)
    assert torch.allclose(divergence(LOGITS, s, t), want, atol=1e-5)
    assert torch.allclose(divergence(LOGITS, s + 3.0, t), want, atol=1e-4), "logits may shift as one"


def test_the_divergence_of_values_is_relative() -> None:
    t = torch.randn(8, 3, 4, 4)
    s = t + 0.1
    assert torch.allclose(divergence(VALUES, 100 * s, 100 * t), divergence(VALUES, s, t), atol=1e-4)
    assert divergence(VALUES, s, t).shape == (8,)
    constant = torch.ones(4, 2)
    assert torch.isfinite(divergence(VALUES, constant + 1, constant)).all()


def test_the_relative_error_is_one_for_the_mean() -> None:
    t = torch.randn(16, 4, 8, 8) * 3 + 5
    assert float(relative_mse(t, t)) == 0.0
    assert float(relative_mse(torch.full_like(t, float(t.mean())), t)) == pytest.approx(1.0, abs=1e-2)


def test_each_image_counts_by_its_own_variance() -> None:
    t = torch.randn(20, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    s = t + 0.1 * torch.randn(20, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    usual = float(relative_mse(s, t))
    assert usual == pytest.approx(0.01, rel=0.15)
    s[4], t[4] = 1000 * s[4], 1000 * t[4]
    assert float(relative_mse(s, t)) == pytest.approx(usual, rel=0.01), "a large one is as wrong as it was"


# ---- candidates ----


def test_a_last_norm_starts_at_what_it_must_make() -> None:
    source, target = torch.randn(16, 3, 8, 8), torch.randn(16, 6, 4, 4) * 20 + 7
    candidate = nn.Sequential(Conv(3, 8, 3, 2), BatchNorm(8), Conv(8, 6, 3), BatchNorm(6)).train()
    calibrate_norm(candidate, target, source)
    out = candidate(source)
    assert torch.allclose(out.mean((0, 2, 3)), target.mean((0, 2, 3)), atol=0.5)
    assert torch.allclose(out.std((0, 2, 3)), target.std((0, 2, 3)), rtol=0.05)
    first = candidate[1]
    assert isinstance(first, BatchNorm)
    assert torch.equal(first.weight, torch.ones(8)), "inner norms stay"


def test_beside_a_skip_connection_the_norm_starts_at_the_difference() -> None:
    source = torch.randn(16, 4, 8, 8)
    target = source + 0.1 * torch.randn(16, 4, 8, 8) + 2.0
    norm = BatchNorm(4)
    calibrate_norm(nn.Sequential(Conv(4, 4, 3), norm), target, source)
    assert torch.allclose(norm.weight, torch.full((4,), 0.1), atol=0.02)
    assert torch.allclose(norm.bias, torch.full((4,), 2.0), atol=0.02)


def test_an_image_far_beyond_the_rest_does_not_decide_where_a_norm_starts() -> None:
    source, target = torch.randn(16, 3, 8, 8), torch.randn(16, 6, 4, 4)
    target[5] *= 1000.0
    norm = BatchNorm(6)
    calibrate_norm(nn.Sequential(Conv(3, 6, 3, 2), norm), target, source)
    assert torch.allclose(norm.weight, torch.ones(6), atol=0.3)


@pytest.mark.parametrize("candidate", [nn.Sequential(Conv(3, 6)), nn.Sequential(BatchNorm(3), Conv(3, 6))])
def test_what_has_no_norm_at_its_end_stays(candidate: nn.Sequential) -> None:
    before = {k: v.clone() for k, v in candidate.state_dict().items()}
    calibrate_norm(candidate, torch.randn(4, 6, 8, 8), torch.randn(4, 3, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in candidate.state_dict().items())


def test_a_channel_that_never_moves_leaves_no_zero_scale() -> None:
    norm = BatchNorm(2)
    calibrate_norm(nn.Sequential(norm), torch.zeros(4, 2, 3, 3), torch.zeros(4, 5, 3, 3))
    assert (norm.weight > 0).all()


def test_parameters_are_listed_once() -> None:
    shared = Linear(2, 2)
    found = trainable([nn.Sequential(shared, shared), shared, Linear(3, 3)])
    assert len(found) == len({id(p) for p in found}) == 4


# ---- data ----


def dataset(images: np.ndarray[Any, Any], y: np.ndarray[Any, Any] | None, layout: str = "NCHW") -> Dataset:
    pre = Preprocess.model_validate({"layout": layout, "scale": 1.0})
    split = Split(images, np.arange(len(images)), y, pre)
    return Dataset(split, split, split, y is not None, 2, "f", "test")


def sided(rng: np.random.Generator, n: int = 40, size: int = 16) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images that are bright on the left (class 0) or on the right (class 1)."""
    y = np.arange(n) % 2
    images = rng.integers(0, 60, (n, size, size, 3)).astype(np.uint8)
    half = size // 2
    images[y == 0, :, :half] += 150
    images[y == 1, :, half:] += 150
    return images, y.astype(np.int64)


def left_right(sketch: type[Sketch]) -> fx.GraphModule:
    """Scores 0 the brighter the left half is, 1 the brighter the right half is."""
    s = sketch(3, 16, 16)
    s.chain("x", halves=Pool("AveragePool", (16, 8), (16, 8)), flat=Flatten(), fc=Linear(6, 2))
    module = s.done()
    left = torch.tensor([1.0, -1.0] * 3) / 30
    with torch.no_grad():
        module.get_parameter("fc.weight").copy_(torch.stack([left, -left]))
    return module


def brightness(sketch: type[Sketch]) -> fx.GraphModule:
    """Scores by the mean, which no mirror changes."""
    s = sketch(3, 16, 16)
    s.chain("x", gap=GlobalPool(), flat=Flatten(), fc=Linear(3, 2))
    return s.done()


@pytest.mark.parametrize("labelled", [True, False])
def test_images_are_mirrored_only_where_the_teacher_does_not_mind(sketch: type[Sketch], labelled: bool) -> None:
    images, y = sided(np.random.default_rng(0))
    minds, mirrors = left_right(sketch), brightness(sketch)
    own = mirrors(torch.from_numpy(images).permute(0, 3, 1, 2).float()).argmax(1).numpy()
    assert augmentation(minds, dataset(images, y if labelled else None), LOGITS) == Augment(shift=2, flip=False)
    assert augmentation(mirrors, dataset(images, own if labelled else None), LOGITS) == Augment(shift=2, flip=True)


def test_what_is_no_classifier_is_not_augmented(sketch: type[Sketch]) -> None:
    images, _ = sided(np.random.default_rng(0))
    assert augmentation(brightness(sketch), dataset(images, None), VALUES) == Augment(shift=0, flip=False)


def test_channels_last_networks_are_mirrored_along_the_width(sketch: type[Sketch]) -> None:
    """Left and right must be told apart in NHWC too."""

    class Nhwc(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = left_right(sketch)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x.permute(0, 3, 1, 2))
            return out

    images, y = sided(np.random.default_rng(0))
    network: Any = Nhwc()
    assert not augmentation(network, dataset(images, y, "NHWC"), LOGITS).flip
    turned = images.transpose(0, 2, 1, 3)  # now top against bottom, which mirroring leaves alone
    upright: Any = nn.Sequential(_Turn(), network)
    assert augmentation(upright, dataset(np.ascontiguousarray(turned), y, "NHWC"), LOGITS).flip


class _Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_epochs_shuffle_without_end_and_repeat_by_seed(lab: Lab) -> None:
    split = lab.labelled.train
    first = [x for x, _ in itertools.islice(epochs(split, 40, None, 3), 5)]
    assert [len(x) for x in first] == [40] * 5, "two full batches of 96 images an epoch"
    again = [x for x, _ in itertools.islice(epochs(split, 40, None, 3), 5)]
    other = [x for x, _ in itertools.islice(epochs(split, 40, None, 4), 5)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[2]), "the next epoch has another order"
    rows = {row.contiguous().numpy().tobytes() for x in first[:2] for row in x}
    assert len(rows) == 80, "no image twice in an epoch"
    x, y = next(epochs(split, 1000, None, 0))
    assert len(x) == 96 and y is not None, "a batch larger than the split is the split"
    assert next(epochs(lab.plain.train, 8, None, 0))[1] is None


def test_the_judge_knows_equals_from_others(lab: Lab) -> None:
    assert lab.matched.network is not None
    network: nn.Module = lab.matched.network
    judge = Judge(network, lab.labelled.search, LOGITS)
    same = judge(network)
    assert (same["agreement"], same["accuracy"]) == (1.0, 100.0)
    assert same["kl"] == pytest.approx(0.0, abs=1e-5)

    class Backwards(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = -network(x)
            return out

    other = judge(Backwards())
    assert other["agreement"] < 0.1
    assert other["accuracy"] < 10
    assert other["kl"] > 1
    assert other["ce"] > same["ce"]


def test_the_judge_without_labels_and_with_a_limit(lab: Lab) -> None:
    network = lab.matched.network
    assert network is not None
    found = Judge(network, lab.plain.search, LOGITS, limit=10, batch=4)(network)
    assert math.isnan(found["ce"]) and math.isnan(found["accuracy"])
    assert found["agreement"] == 1.0, "of the ten, not of the split"
    values = Judge(network, lab.labelled.search, replace(LOGITS, classifier=False))(network)
    assert values["kl"] == pytest.approx(0.0, abs=1e-9)


def test_batches_without_labels_are_mixed_in_by_their_number(lab: Lab) -> None:
    def labelled_share(data: Dataset) -> float:
        taken = itertools.islice(training_batches(data, 8, None, 0), 200)
        return sum(y is not None for _, y in taken) / 200

    train, few = lab.labelled.train, lab.plain.train.subset(range(20))
    assert len(train) > 60
    assert labelled_share(lab.labelled) == 1
    assert 0.6 < labelled_share(replace(lab.labelled, more=few)) < 1
    many = lab.plain.train.subset(list(range(len(train))) * 20)
    assert 0.15 < labelled_share(replace(lab.labelled, more=many)) < 0.35, "a quarter keeps its labels"
