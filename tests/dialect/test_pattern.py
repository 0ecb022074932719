"""Patterns of one's own: where they fit, where they nearly do, and what they never take."""

from __future__ import annotations

import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from hantc.core.errors import HantcError
from hantc.dialect import pattern as patterns
from hantc.dialect.activation import Unary, activation
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Add
from hantc.dialect.graph import trace
from hantc.dialect.norm import BatchNorm
from hantc.dialect.pattern import Ops, Pattern, Value, find, installed, pattern
from hantc.dialect.pool import GlobalPool
from hantc.dialect.shape import Concat
from hantc.passes.match import match_regions


class Fire(nn.Module):
    """SqueezeNet's module; `swapped`: the arms in the other order, `kernel`: of the second arm."""

    def __init__(self, c: int, *, swapped: bool = False, kernel: int = 3, act: str = "relu") -> None:
        super().__init__()
        self.squeeze, self.squeezed = Conv(c, 8, 1), activation("relu")
        self.small, self.first = Conv(8, c // 2, 1), activation("relu")
        self.large, self.second = Conv(8, c // 2, kernel), activation(act)
        self.join, self.swapped = Concat(1), swapped

    def forward(self, x: Tensor) -> Tensor:
        s = self.squeezed(self.squeeze(x))
        arms = [self.first(self.small(s)), self.second(self.large(s))]
        out: Tensor = self.join(*reversed(arms)) if self.swapped else self.join(*arms)
        return out


class Net(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.stem, self.act = Conv(3, 16, 3), activation("relu")
        self.parts = nn.Sequential(*parts)
        self.pool = GlobalPool()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pool(self.parts(self.act(self.stem(x))))
        return out


def graph(*parts: nn.Module) -> fx.GraphModule:
    torch.manual_seed(0)
    return trace(Net(*parts).eval(), (3, 8, 8), (16, 1, 1))


@pytest.fixture
def fire() -> Pattern:
    """The example of the documentation."""
    path = Path(__file__).resolve().parents[2] / "docs" / "examples" / "fire.py"
    module = types.ModuleType("my_package_fire")
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    made: Pattern = module.fire
    return made


def test_every_place_is_found(fire: Pattern) -> None:
    module = graph(Fire(16), Fire(16, swapped=True))
    found, misses = find(fire, module)
    assert len(found) == 2 and not misses
    assert found[0].exit == found[1].entry
    assert all(len(f.nodes) == 7 for f in found)
    assert found[0].entry not in found[0].nodes and found[0].exit in found[0].nodes


def test_what_differs_is_told_with_how_far_it_came(fire: Pattern) -> None:
    found, misses = find(fire, graph(Fire(16, kernel=5), Fire(16, act="silu")))
    assert not found
    assert [m.total for m in misses] == [7, 7]
    assert "kernel 3" in misses[0].reason and "5" in misses[0].reason
    assert "Relu" in misses[1].reason and "silu" in misses[1].reason
    assert all(4 <= m.matched < 7 for m in misses)


def test_a_value_that_others_read_is_no_inner_one(fire: Pattern) -> None:
    class Leaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fire, self.other, self.add = Fire(16), Conv(8, 16, 1), Add()

        def forward(self, x: Tensor) -> Tensor:
            inner = self.fire.squeezed(self.fire.squeeze(x))
            arms = [self.fire.first(self.fire.small(inner)), self.fire.second(self.fire.large(inner))]
            out: Tensor = self.add(self.fire.join(*arms), self.other(inner))
            return out

    found, misses = find(fire, graph(Leaking()))
    assert not found
    assert [m.matched for m in misses] == [7] and "is also read by" in misses[0].reason


def test_optional_operations_checks_and_any() -> None:
    @pattern("pair")
    def pair(op: Ops, x: Value) -> Value:
        y = op.act(op.norm(op.Conv(x, groups=lambda g: g == 1)))
        return op.Conv(y, kernel=(3, 3), bias=lambda b: b is not None)

    plain = graph(Conv(16, 16, 1), Conv(16, 16, 3))
    dressed = graph(Conv(16, 16, 1), BatchNorm(16), Unary("Relu"), Conv(16, 16, 3))
    assert [len(f.nodes) for f in find(pair, plain)[0]] == [2]
    assert sorted(len(f.nodes) for f in find(pair, dressed)[0]) == [4]
    whatever = Pattern("whatever", lambda op, x: op.Conv(op.any(x)))
    assert len(find(whatever, plain)[0]) == 2  # the stem's ReLU, or the first convolution, before the convolution


def test_operands_of_sums_in_any_order_and_values_read_twice() -> None:
    class Residual(nn.Module):
        def __init__(self, *, turned: bool) -> None:
            super().__init__()
            self.conv, self.add, self.turned = Conv(16, 16, 3), Add(), turned

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            out: Tensor = self.add(x, y) if self.turned else self.add(y, x)
            return out

    residual = Pattern("residual", lambda op, x: op.Add(x, op.Conv(x)))
    for turned in (True, False):
        found, _ = find(residual, graph(Residual(turned=turned)))
        assert [len(f.nodes) for f in found] == [2]


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda op, x: x, "no operation that must be there"),
        (lambda op, x: op.act(op.norm(x)), "no operation that must be there"),
        (lambda op, x: None, "is no value of an operation"),
        (lambda op, x: op.Conv(3), "is no value of an operation"),
        (lambda op, x: op.Conv(Value()), "does not use its input"),
        (lambda op, x: op.act(op.Conv(x), x), "read one value"),
        (lambda op, x: op.Conv(x, kernel=lambda k: k > 3), "fails: TypeError"),
        (lambda op, x: op.Conv(x, weight=0), "fails: RuntimeError"),
        (lambda op, x: 1 / 0, "fails: ZeroDivisionError"),
    ],
)
def test_what_describes_no_part_is_told_by_the_patterns_name(build: Any, reason: str) -> None:
    with pytest.raises(HantcError, match=reason) as failure:
        match_regions(graph(Conv(16, 16, 3)), patterns=[Pattern("mine", build)])
    assert "'mine'" in failure.value.message


def test_long_patterns_take_no_time() -> None:
    """A whole stage: shared values are looked at once, not once for each way to them."""

    def stage(op: Ops, x: Value) -> Value:
        for _ in range(40):
            x = op.Relu(op.Add(op.Conv(op.Relu(op.Conv(x))), x))
        return x

    assert find(Pattern("stage", stage), graph(Fire(16)))[0] == []


def test_a_value_that_is_added_to_itself() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.add = Conv(16, 16, 1), Add()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            out: Tensor = self.add(y, y)
            return out

    def twice(op: Ops, x: Value) -> Value:
        y = op.Conv(x)
        return op.Add(y, y)

    assert len(find(Pattern("twice", twice), graph(Twice()))[0]) == 1


def test_a_missing_operation_is_missing_for_all_who_read_it() -> None:
    class Uneven(nn.Module):
        """One operand is read before the activation, the other behind it."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.other, self.add = Conv(16, 16, 1), activation("relu"), Conv(16, 16, 3), Add()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            out: Tensor = self.add(self.other(y), self.act(y))
            return out

    def even(op: Ops, x: Value) -> Value:
        h = op.act(op.Conv(x))
        return op.Add(op.Conv(h, kernel=3), h)

    assert find(Pattern("even", even), graph(Uneven()))[0] == []


def test_regions_follow_patterns(fire: Pattern) -> None:
    module = graph(Fire(16), Conv(16, 16, 3), Fire(16, kernel=5))
    plain, asked = match_regions(module), match_regions(module, patterns=[fire])
    kinds = [r.kind for r in asked.regions if len(r.atoms) == 1]
    assert kinds.count("residual") >= 1
    fits = find(fire, module)[0][0]
    assert [(r.input, r.output) for r in asked.regions if r.output == fits.exit and len(r.atoms) == 1] == [
        (fits.entry, fits.exit)
    ]
    assert any(m.where.startswith("fire at") and "of 7 operations fit" in m.reason for m in asked.misses)
    assert sum(len(r.nodes) for r in asked.regions if len(r.atoms) == 1) == sum(
        len(r.nodes) for r in plain.regions if len(r.atoms) == 1
    )


def test_names_win_over_patterns(fire: Pattern) -> None:
    module = graph(Fire(16), Fire(16))
    first, second = find(fire, module)[0]
    found = match_regions(module, named=[f"{first.entry}:{second.exit}"], patterns=[fire])
    assert any((r.input, r.output) == (first.entry, second.exit) for r in found.regions)
    assert sum("overlaps" in m.reason for m in found.misses) == 2


def test_a_part_off_the_main_line_is_a_near_miss() -> None:
    lone = Pattern("arm", lambda op, x: op.Relu(op.Conv(x, kernel=3)))
    found = match_regions(graph(Fire(16)), patterns=[lone])
    assert any("not every path" in m.reason for m in found.misses)


def test_depthwise_convolutions_that_are_nearly_inverted_residuals() -> None:
    module = graph(Conv(16, 16, 3, groups=16), Conv(16, 16, 3))
    assert any("wants a 1×1 convolution behind" in m.reason for m in match_regions(module).misses)


NO_PATTERN = 1


def install(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setitem(sys.modules, "fake_patterns", sys.modules[__name__])
    points = [EntryPoint("p", f"fake_patterns:{value}", patterns.GROUP)]

    def entry_points(**select: Any) -> list[EntryPoint]:
        assert select == {"group": "hantc.patterns"}
        return points

    monkeypatch.setattr(patterns, "entry_points", entry_points)


SIMPLE = Pattern("simple", lambda op, x: op.Conv(x))


def test_patterns_of_packages_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "SIMPLE")
    assert installed() == (SIMPLE,)
    install(monkeypatch, "NO_PATTERN")
    with pytest.raises(HantcError, match="is no hantc"):
        installed()
    install(monkeypatch, "absent")
    with pytest.raises(HantcError, match="does not load"):
        installed()
