"""The registry, the grids, and third parties' families."""

from __future__ import annotations

import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

from hantc.core.errors import HantcError, UsageError
from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.conv import Conv
from hantc.dialect.graph import count_params, module_macs
from hantc.ops import registry
from hantc.ops.registry import FAMILIES, Family

WIDE = Signature((256, 14, 14), (256, 14, 14), "relu")
GRID_SIZES = {"identity": 1, "cb_stack": 40, "cb_bottle": 40, "cb_res": 40, "conv_cs": 40, "repvgg": 40}
GRID_SIZES |= {"efn": 27, "efnv2": 27, "tresnet": 12, "s2d": 2, "dense_conv": 9, "vit": 36, "bot_trans": 6, "lambda": 6}
GRID_SIZES |= {"mixer": 20}


class Pointwise(Family):
    """What a third party writes: one 1×1 convolution, in groups."""

    name = "pointwise"
    source = "this test"
    params = MappingProxyType({"g": (1, 2)})

    def misfit(self, spec: CandidateSpec, signature: Signature) -> str:
        if signature.in_shape[1:] != signature.out_shape[1:]:
            return "keeps the resolution"
        g = self.values(spec)["g"]
        return "" if signature.in_shape[0] % g == signature.out_shape[0] % g == 0 else f"channels do not divide by {g}"

    def build(self, spec: CandidateSpec, signature: Signature) -> nn.Module:
        groups = self.values(spec)["g"]
        return nn.Sequential(Conv(signature.in_shape[0], signature.out_shape[0], groups=groups))


class Liar(Pointwise):
    """Builds another shape than asked for."""

    name = "liar"

    def build(self, spec: CandidateSpec, signature: Signature) -> nn.Module:
        return nn.Sequential(Conv(signature.in_shape[0], signature.out_shape[0] + 1))


class Impostor(Pointwise):
    """Takes a built-in family's name."""

    name = "efn"


NOT_A_FAMILY = dict


def _install(monkeypatch: pytest.MonkeyPatch, *attributes: str) -> None:
    monkeypatch.setitem(sys.modules, "fake_family_package", sys.modules[__name__])
    points = [EntryPoint(a.lower(), f"fake_family_package:{a}", registry.GROUP) for a in attributes]

    def entry_points(**select: Any) -> list[EntryPoint]:
        assert select == {"group": "hantc.candidates"}
        return points

    monkeypatch.setattr(registry, "entry_points", entry_points)


def test_grid_sizes() -> None:
    assert {name: len(f.grid()) for name, f in FAMILIES.items()} == GRID_SIZES
    fitting = {name: len(f.specs(WIDE)) for name, f in FAMILIES.items()}
    assert fitting == {**GRID_SIZES, "dense_conv": 0, "s2d": 0, "mixer": 0}, "for wider, for stems, for tokens"
    assert len(registry.propose(WIDE)) == sum(fitting.values()) == 315


def test_names_are_unique() -> None:
    names = [spec.name for f in FAMILIES.values() for spec in f.grid()]
    assert len(set(names)) == len(names)
    assert "cb_stack_k3_w0.5" in names
    assert "efn_e6_k3_se0.25" in names


def test_weight_names_are_unique_and_readable() -> None:
    spec = CandidateSpec.make("efn", e=3, k=3, se=0.25)
    traced = registry.build(spec, Signature((16, 8, 8), (16, 8, 8)))
    names = [n for n, _ in traced.named_parameters(remove_duplicate=False)]
    assert len(set(names)) == len(names)
    assert "body.depthwise.conv.weight" in names
    assert len({id(p) for p in traced.parameters()}) == len(names)


def test_narrow_widths_are_proposed_once() -> None:
    narrow = Signature((16, 8, 8), (16, 8, 8))
    rows = FAMILIES["cb_stack"].survey(narrow)
    assert len(rows) == 40
    assert len(FAMILIES["cb_stack"].specs(narrow)) == 4 * 5  # 8, 16, 32, 48 and 64 channels
    reasons = {spec.name: reason for spec, reason in rows}
    assert reasons["cb_stack_k3_w0.0625"] == "same as cb_stack_k3_w0.5 here"
    assert reasons["cb_stack_k3_w0.5"] == ""
    spec = CandidateSpec.make("cb_stack", k=3, w=1 / 16)  # a twin is no error, just not proposed
    assert registry.build(spec, narrow)(torch.zeros(1, 16, 8, 8)).shape == (1, 16, 8, 8)


def test_tables_are_immutable() -> None:
    with pytest.raises(TypeError):
        FAMILIES["x"] = FAMILIES["efn"]  # type: ignore[index]
    with pytest.raises(TypeError):
        FAMILIES["efn"].params["k"] = (9,)  # type: ignore[index]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (CandidateSpec.make("cb_stack", k=3), "w is missing"),
        (CandidateSpec.make("cb_stack", k=3, w=1.0, z=1), "unknown parameter z"),
        (CandidateSpec.make("cb_stack", k=4, w=1.0), "odd"),
        (CandidateSpec.make("cb_stack", k=-1, w=1.0), "odd"),
        (CandidateSpec.make("cb_stack", k=3.0, w=1.0), "type int"),
        (CandidateSpec.make("cb_stack", k=True, w=1.0), "type int"),
        (CandidateSpec.make("cb_stack", k=3, w=0.0), "positive"),
        (CandidateSpec.make("cb_bottle", k=3, w=float("nan")), "positive"),
        (CandidateSpec.make("efn", e=0, k=3, se=0.0), "positive"),
        (CandidateSpec.make("efn", e=1, k=3, se=2.0), "within 0 and 1"),
        (CandidateSpec.make("efn", e=1, k=3, se=0.0, act="gelu?"), "unknown activation"),
        (CandidateSpec.make("identity", k=3), "unknown parameter k"),
        (CandidateSpec.make("cb_stack", k=31, w=1.0), "larger than its 14×14 input"),
    ],
)
def test_bad_specs_are_rejected_with_a_reason(spec: CandidateSpec, reason: str) -> None:
    assert reason in FAMILIES[spec.family].reject(spec, WIDE)
    with pytest.raises(HantcError, match="cannot replace") as error:
        registry.build(spec, WIDE)
    assert reason in str(error.value)
    assert spec.name in str(error.value)
    with pytest.raises(HantcError):
        registry.estimate(spec, WIDE)


def test_a_spec_read_from_json_may_hold_whole_numbers() -> None:
    assert FAMILIES["cb_stack"].reject(CandidateSpec.make("cb_stack", k=3, w=1), WIDE) == ""


def test_family_of_another_name() -> None:
    assert "not efn" in FAMILIES["efn"].reject(CandidateSpec.make("efnv2", e=1, k=3, se=0.0), WIDE)
    with pytest.raises(UsageError, match="unknown candidate family") as error:
        registry.build(CandidateSpec("nothing"), WIDE)
    assert "cb_stack" in str(error.value)


def test_third_party_family(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "Pointwise")
    known = registry.families()
    assert list(known) == [*FAMILIES, "pointwise"]
    assert "pointwise" not in FAMILIES
    signature = Signature((4, 5, 5), (6, 5, 5))
    specs = [s for s in registry.propose(signature, among=known) if s.family == "pointwise"]
    assert [s.name for s in specs] == ["pointwise_g1", "pointwise_g2"]
    for spec, weights in zip(specs, (4 * 6 + 6, 4 * 6 // 2 + 6), strict=True):
        traced = registry.build(spec, signature)
        assert registry.estimate(spec, signature) == (weights * 25 - 150, weights)
        assert registry.estimate(spec, signature) == (module_macs(traced, (4, 5, 5)), count_params(traced))
    assert "pointwise_g2" not in [s.name for s in registry.propose(Signature((3, 5, 5), (6, 5, 5)))]
    with pytest.raises(HantcError, match="keeps the resolution"):
        registry.build(specs[0], Signature((4, 8, 8), (4, 4, 4)))


@pytest.mark.parametrize(
    ("attribute", "message"),
    [("Missing", "does not load"), ("Impostor", "name of another"), ("NOT_A_FAMILY", "is no hantc")],
)
def test_bad_third_party_family(monkeypatch: pytest.MonkeyPatch, attribute: str, message: str) -> None:
    _install(monkeypatch, attribute)
    with pytest.raises(HantcError, match=message):
        registry.families()


def test_a_family_that_builds_the_wrong_shape_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "Liar")
    with pytest.raises(HantcError, match=r"liar_g1: makes \(7, 5, 5\) instead of \(6, 5, 5\)"):
        registry.build(CandidateSpec.make("liar", g=1), Signature((4, 5, 5), (6, 5, 5)))


def test_the_example_of_the_docs_is_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded as a third party's package would be, it is proposed, built and counted like any other."""
    path = Path(__file__).resolve().parents[2] / "docs" / "examples" / "separable.py"
    module = types.ModuleType("my_package_separable")
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    point = EntryPoint("separable", f"{module.__name__}:Separable", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    for signature in (WIDE, Signature((16, 9, 9), (24, 5, 5))):
        specs = [s for s in registry.propose(signature) if s.family == "separable"]
        assert [s.name for s in specs] == ["separable_k3", "separable_k5", "separable_k7"]
        built = registry.build(specs[0], signature)
        assert registry.estimate(specs[0], signature) == (module_macs(built, signature.in_shape), count_params(built))
