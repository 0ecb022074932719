"""Finds families by name: the built-in ones, and third parties' through the entry point group `hantc.candidates`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from itertools import chain
from types import MappingProxyType

import torch
from torch import fx
from torch.func import functional_call

from hantc.core.errors import HantcError, UsageError
from hantc.core.plugins import load_point
from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.graph import trace
from hantc.ops.affine import Affine
from hantc.ops.bot_trans import BotTrans
from hantc.ops.cb_bottle import CBBottle
from hantc.ops.cb_res import CBRes
from hantc.ops.cb_stack import CBStack
from hantc.ops.conv_cs import ConvCS
from hantc.ops.dense_conv import DenseConv
from hantc.ops.derived import DerivedFamily, Origin
from hantc.ops.efn import EFN
from hantc.ops.efnv2 import EFNV2
from hantc.ops.exact import Exact
from hantc.ops.family import Family
from hantc.ops.identity import Identity
from hantc.ops.lambda_layer import LambdaLayer
from hantc.ops.low_rank import LowRank
from hantc.ops.merged import Merged
from hantc.ops.mixer import Mixer
from hantc.ops.repvgg import RepVGG
from hantc.ops.s2d import S2D
from hantc.ops.slim import Slim
from hantc.ops.teacher_s2d import TeacherS2D
from hantc.ops.tresnet import TResNet
from hantc.ops.vit import ViT

__all__ = [
    "DERIVED",
    "FAMILIES",
    "GROUP",
    "Family",
    "Origin",
    "build",
    "estimate",
    "families",
    "get_family",
    "is_exact",
    "propose",
]

GROUP = "hantc.candidates"

_BUILTIN: tuple[Family, ...] = (
    Identity(),
    CBStack(),
    CBBottle(),
    CBRes(),
    ConvCS(),
    RepVGG(),
    EFN(),
    EFNV2(),
    TResNet(),
    S2D(),
    DenseConv(),
    ViT(),
    BotTrans(),
    LambdaLayer(),
    Mixer(),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in _BUILTIN})
"""The built-in families, by name."""

DERIVED: Mapping[str, DerivedFamily] = MappingProxyType(
    {family.name: family for family in (TeacherS2D(), Exact(), Slim(), LowRank(), Affine(), Merged())}
)
"""The families that start from the teacher's own weights, by name."""


def families() -> Mapping[str, Family]:
    """All families by name, the built-in ones first; those of installed packages are loaded anew each time, so
    ask once and pass the answer on as `among`. HantcError if a package's family does not load, or takes the
    name of another: leaving it out silently would change results."""
    found: dict[str, Family] = dict(FAMILIES)
    for point in entry_points(group=GROUP):
        family = _load(point)
        if family.name in found or family.name in DERIVED:
            raise HantcError(
                f"the candidate family {family.name!r} of {point.value} has the name of another",
                hint="remove or rename its package's family",
            )
        found[family.name] = family
    return MappingProxyType(found)


def get_family(name: str, *, among: Mapping[str, Family] | None = None) -> Family:
    """The family called `name`. UsageError if there is none."""
    if among is None and name in FAMILIES:  # spares the search for entry points
        return FAMILIES[name]
    if among is None and name in DERIVED:
        return DERIVED[name]
    known = {**families(), **DERIVED} if among is None else among
    if name not in known:
        raise UsageError(f"unknown candidate family {name!r}", hint="one of: " + ", ".join(known))
    return known[name]


def is_exact(spec: CandidateSpec) -> bool:
    """Whether the candidate computes what its region does."""
    return spec.family in DERIVED and DERIVED[spec.family].exact


def propose(signature: Signature, *, among: Mapping[str, Family] | None = None) -> list[CandidateSpec]:
    """Every spec of every family (of `among`, if given) that fits `signature`; the teacher is not among them."""
    known = families() if among is None else among
    return [spec for family in known.values() for spec in family.specs(signature)]


def estimate(
    spec: CandidateSpec, signature: Signature, *, among: Mapping[str, Family] | None = None
) -> tuple[int, int]:
    """(multiply-accumulates per sample, weights) that `build` would give, without building.
    HantcError if the spec is rejected."""
    return get_family(spec.family, among=among).estimate(spec, signature)


def build(
    spec: CandidateSpec,
    signature: Signature,
    *,
    origin: Origin | None = None,
    among: Mapping[str, Family] | None = None,
) -> fx.GraphModule:
    """The candidate as a graph of leaves that can be emitted on its own, (N, *in_shape) → (N, *out_shape), in
    evaluation mode as imported models are.

    Weights come from torch's global generator: seed it for repeatable ones. HantcError with the reason if the
    spec is rejected, or if its family builds something of another shape. Families in DERIVED start from
    `origin`, and need it.
    """
    if spec.family in DERIVED:
        if origin is None:
            raise HantcError("is made from the teacher's region, which is not at hand", where=f"candidate {spec.name}")
        derived = DERIVED[spec.family].make(spec, signature, origin)
        _check_shape(derived, spec, signature)
        return derived
    family = get_family(spec.family, among=among)
    family.require(spec, signature)
    traced = trace(family.build(spec, signature), signature.in_shape, signature.out_shape)
    traced.eval()
    _check_shape(traced, spec, signature)
    return traced


def _check_shape(traced: fx.GraphModule, spec: CandidateSpec, signature: Signature) -> None:
    tensors = chain(traced.named_parameters(), traced.named_buffers())
    meta = {name: value.to("meta") for name, value in tensors}  # shapes alone: computes nothing
    try:
        made = functional_call(traced, meta, torch.empty(1, *signature.in_shape, device="meta")).shape[1:]
    except RuntimeError as e:
        raise HantcError(f"does not run on {signature.in_shape}: {e}", where=f"candidate {spec.name}") from e
    if tuple(made) != signature.out_shape:
        raise HantcError(f"makes {tuple(made)} instead of {signature.out_shape}", where=f"candidate {spec.name}")


def _load(point: EntryPoint) -> Family:
    family = load_point(point, "candidate family", lambda kind: kind())
    if not isinstance(family, Family):
        raise HantcError(f"the candidate family {point.name!r} ({point.value}) is no hantc.ops.registry.Family")
    return family
