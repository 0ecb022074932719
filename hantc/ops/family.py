"""What a family of candidate operations is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from itertools import product
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from hantc.core.errors import HantcError
from hantc.core.types import CandidateSpec, ParamValue, Signature
from hantc.dialect.activation import activation
from hantc.dialect.graph import count_params, module_macs, trace

PAPER = "HANT/LANA, arXiv 2107.10624"


class Family(ABC):
    """A family of candidates: one architecture with hyper-parameters.

    Subclasses set `name` (the family part of a spec), `source` (where it comes from) and `params` (the grid
    that is proposed), and write `misfit` and `build`. Third parties add a family through the entry point group
    `hantc.candidates`, whose object is the subclass. Families hold no state: any number of instances are equal.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    params: ClassVar[Mapping[str, tuple[ParamValue, ...]]] = MappingProxyType({})
    options: ClassVar[Mapping[str, ParamValue]] = MappingProxyType({})  # further parameters' defaults, not in the grid

    @abstractmethod
    def build(self, spec: CandidateSpec, signature: Signature) -> nn.Module:
        """A module of dialect leaves, (N, *in_shape) → (N, *out_shape), freshly initialised from torch's global
        generator. Only called where `reject` has no reason."""

    def misfit(self, spec: CandidateSpec, signature: Signature) -> str:
        """Why these well-formed parameters cannot serve this signature of (C, H, W) shapes; "" if they can."""
        return ""

    def structure(self, spec: CandidateSpec, signature: Signature) -> Hashable:
        """What the built module depends on: specs with equal structure are the same operation."""
        return spec.params

    def grid(self) -> list[CandidateSpec]:
        """Every combination of `params`, the last one varying fastest."""
        return [
            CandidateSpec.make(self.name, **dict(zip(self.params, values, strict=True)))
            for values in product(*self.params.values())
        ]

    def survey(self, signature: Signature) -> list[tuple[CandidateSpec, str]]:
        """The whole grid, each spec with the reason why it is not proposed, or "".

        Beside `reject`'s reasons: of specs that come to the same operation (narrow widths round to the same
        number of channels) only the last is proposed, so that nothing is trained twice.
        """
        rejected = [(spec, self.reject(spec, signature)) for spec in self.grid()]
        structures = {spec: self.structure(spec, signature) for spec, reason in rejected if not reason}
        kept = {structure: spec for spec, structure in structures.items()}
        rows = []
        for spec, reason in rejected:
            twin = spec if reason else kept[structures[spec]]
            rows.append((spec, reason or ("" if twin == spec else f"same as {twin.name} here")))
        return rows

    def specs(self, signature: Signature) -> list[CandidateSpec]:
        """The specs to propose for `signature`."""
        return [spec for spec, reason in self.survey(signature) if not reason]

    def reject(self, spec: CandidateSpec, signature: Signature) -> str:
        """Why `spec` cannot be built for `signature`; "" if it can."""
        return self._malformed(spec) or self.unserved(signature) or self.misfit(spec, signature)

    def unserved(self, signature: Signature) -> str:
        """Why the family serves no such shapes at all; "" if it may. Here: feature maps, (C, H, W), alone."""
        return unserved(signature)

    def estimate(self, spec: CandidateSpec, signature: Signature) -> tuple[int, int]:
        """(multiply-accumulates per sample, weights) of the built module. HantcError if rejected.

        Here: counted on a module without storage (torch's meta device); families may override it by a formula.
        """
        self.require(spec, signature)
        with torch.device("meta"):
            traced = trace(self.build(spec, signature).eval())
            return module_macs(traced, signature.in_shape), count_params(traced)

    def require(self, spec: CandidateSpec, signature: Signature) -> None:
        """HantcError with the reason if `spec` is rejected."""
        if reason := self.reject(spec, signature):
            raise HantcError(
                f"cannot replace {signature.in_shape} → {signature.out_shape}: {reason}",
                where=f"candidate {spec.name}",
                hint=f"`hantc pool --family {self.name}` lists what fits",
            )

    def values(self, spec: CandidateSpec) -> dict[str, Any]:
        """All parameters of `spec`, options filled in."""
        return {**self.options, **spec.kwargs}

    def _malformed(self, spec: CandidateSpec) -> str:
        given = spec.kwargs
        if spec.family != self.name:
            return f"family is {spec.family}, not {self.name}"
        if unknown := sorted(set(given) - set(self.params) - set(self.options)):
            return (
                f"unknown parameter {', '.join(unknown)}; known: {', '.join([*self.params, *self.options]) or 'none'}"
            )
        if missing := sorted(set(self.params) - set(given)):
            return f"parameter {', '.join(missing)} is missing"
        for name, value in given.items():
            like = self.params[name][0] if name in self.params else self.options[name]
            if not _same_kind(value, like):
                return f"parameter {name}={value!r} should be of type {type(like).__name__}"
        if "act" in given and given["act"] != self.options.get("act") and not known_activation(str(given["act"])):
            return f"unknown activation act={given['act']}"
        return ""


def known_activation(name: str) -> bool:
    """Whether the dialect has an activation of this name."""
    try:
        activation(name)
    except KeyError:
        return False
    return True


def _same_kind(value: ParamValue, like: ParamValue) -> bool:
    if isinstance(value, bool) or isinstance(like, bool):
        return type(value) is type(like)
    if isinstance(like, float):  # plans read back from JSON may hold 1 for 1.0
        return isinstance(value, (int, float))
    return type(value) is type(like)


def unserved_tokens(signature: Signature) -> str:
    """Why `signature` is not one of token sequences, (T, C) to (T, C); "" if it is."""
    for what, shape in (("input", signature.in_shape), ("output", signature.out_shape)):
        if len(shape) != 2 or min(shape) < 1:
            return f"the {what} {shape} is not of the form (T, C)"
    return ""


def unserved(signature: Signature) -> str:
    """Why no family serves `signature`; "" if its shapes are of the form (C, H, W)."""
    for what, shape in (("input", signature.in_shape), ("output", signature.out_shape)):
        if len(shape) == 1:
            return f"the {what} {shape} is a feature vector; candidates need (C, H, W)"
        if len(shape) != 3:
            return f"the {what} {shape} is not of the form (C, H, W)"
        if min(shape) < 1:
            return f"the {what} {shape} is empty"
    if signature.final_act and not known_activation(signature.final_act):
        return f"unknown final activation {signature.final_act}"
    return ""
