"""Mixer blocks on token sequences."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch

from hantc.core.types import CandidateSpec, Signature
from hantc.dialect.emitter import emit
from hantc.dialect.graph import count_params
from hantc.dialect.qdq import QuantSpec, quantize_for_timing
from hantc.ops import registry

TOKENS = Signature((10, 24), (10, 24))


def spec(tokens: float, channels: float) -> CandidateSpec:
    return CandidateSpec.make("mixer", tokens=tokens, channels=channels)


def test_token_sequences_have_the_identity_and_mixers() -> None:
    assert {s.family for s in registry.propose(TOKENS)} == {"identity", "mixer"}
    identity = registry.build(CandidateSpec("identity"), TOKENS)
    x = torch.randn(3, 10, 24)
    assert torch.equal(identity(x), x)


def test_it_begins_at_the_identity_and_learns() -> None:
    torch.manual_seed(0)
    module = registry.build(spec(1.0, 0.5), TOKENS)
    x = torch.randn(3, 10, 24)
    assert torch.equal(module(x), x)
    module(x).square().sum().backward()
    reached = {n for n, p in module.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert {n for n, _ in module.named_parameters() if "second" in n} == reached, "where both pairs begin to learn"


@pytest.mark.parametrize(("tokens", "channels"), [(0.5, 0.0), (0.0, 1.0), (2.0, 0.25)])
def test_sizes_are_those_of_the_built_module(tokens: float, channels: float) -> None:
    one = spec(tokens, channels)
    macs, params = registry.estimate(one, TOKENS)
    module = registry.build(one, TOKENS)
    assert params == count_params(module)
    hidden = {0.25: 8, 0.5: 8, 1.0: 24, 2.0: 24}  # of ten tokens, and 24 channels, in eights
    wanted = 0
    if tokens:
        wanted += 2 * 24 * 10 * hidden[tokens]
    if channels:
        wanted += 2 * 10 * 24 * hidden[channels]
    assert macs == wanted


def test_emitted_it_computes_the_same_and_quantises() -> None:
    torch.manual_seed(0)
    module = registry.build(spec(1.0, 1.0), TOKENS)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(2, 10, 24)
    model = emit(module).model
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert np.allclose(got, module(x).numpy(), atol=1e-5)
    rounded = quantize_for_timing(model, QuantSpec(reduce_range=False))
    assert any(n.op_type == "QuantizeLinear" for n in rounded.graph.node)


@pytest.mark.parametrize(
    ("one", "signature", "reason"),
    [
        (spec(0.0, 0.0), TOKENS, "same as the identity"),
        (spec(-1.0, 1.0), TOKENS, "not negative"),
        (spec(1.0, 1.0), Signature((10, 24), (10, 48)), "keeps the shape"),
        (spec(1.0, 1.0), Signature((10, 24), (10, 24), "relu"), "no activation"),
        (spec(1.0, 1.0), Signature((24, 8, 8), (24, 8, 8)), "not of the form (T, C)"),
        (CandidateSpec("identity"), Signature((10, 24), (5, 24)), "keeps tokens and channels"),
    ],
)
def test_where_it_does_not_go(one: CandidateSpec, signature: Signature, reason: str) -> None:
    assert reason in registry.get_family(one.family).reject(one, signature)


def test_families_of_feature_maps_do_not_serve_tokens() -> None:
    for family in registry.FAMILIES.values():
        if family.name not in ("identity", "mixer"):
            assert not family.specs(TOKENS)
