"""Regions that the user asks for by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from onnx import helper
from torch import fx

from hantc.core.errors import UsageError
from hantc.dialect.activation import Unary
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Add
from hantc.dialect.functions.registry import function_of
from hantc.dialect.linear import Linear
from hantc.dialect.pool import GlobalPool
from hantc.dialect.shape import Flatten
from hantc.dialect.verbatim import Verbatim
from hantc.passes.match import match_regions

if TYPE_CHECKING:
    from tests.passes.conftest import Sketch

Pen = type["Sketch"]


@pytest.fixture
def network(sketch: Pen) -> fx.GraphModule:
    """A stem, two residual blocks, a convolution, a head."""
    s = sketch(3, 12, 12)
    at = s.chain("x", stem=Conv(3, 8, 3), stem_act=Unary("Relu"))
    for tag in ("b", "c"):
        body = s.chain(at, **{f"{tag}1": Conv(8, 8, 3), f"{tag}r": Unary("Relu"), f"{tag}2": Conv(8, 8, 3)})
        s.add(f"{tag}add", Add(), body, at)
        at = s.add(f"{tag}act", Unary("Relu"))
    at = s.chain(at, last=Conv(8, 8, 3), last_act=Unary("Relu"))
    return s.done(s.chain(at, pool=GlobalPool(), flat=Flatten(), fc=Linear(8, 4)))


def ends(module: fx.GraphModule, *named: str) -> list[tuple[str, str]]:
    return [(r.input, r.output) for r in match_regions(module, named=named).regions if len(r.atoms) == 1]


def test_two_blocks_as_one(network: fx.GraphModule) -> None:
    assert ends(network) == [("x", "stem_act"), ("stem_act", "bact"), ("bact", "cact"), ("cact", "last_act")]
    assert ends(network, "stem_act:cact") == [("x", "stem_act"), ("stem_act", "cact"), ("cact", "last_act")]
    found = match_regions(network, named=["stem_act:cact"])
    assert set(found.region("r01").nodes) == {f"{t}{n}" for t in "bc" for n in ("1", "r", "2", "add", "act")}


def test_what_lies_around_is_matched_as_before(network: fx.GraphModule) -> None:
    found = match_regions(network, named=["stem:bact"])
    assert (found.regions[0].kind, found.regions[0].output) == ("stem", "stem")
    assert ends(network, "stem:bact", "bact:last") == [("x", "stem"), ("stem", "bact"), ("bact", "last")]


def test_the_file_s_own_names_serve_too(network: fx.GraphModule) -> None:
    for node in network.graph.nodes:
        node.meta["onnx_name"] = f"/layers/{node.name}"
    assert ("stem_act", "cact") in ends(network, "/layers/stem_act:/layers/cact")


def test_the_dialect_s_names_go_first(network: fx.GraphModule) -> None:
    """A file may call its second ReLU what the dialect calls the first."""
    others = {"stem_act": "bact", "bact": "stem_act"}
    for node in network.graph.nodes:
        node.meta["onnx_name"] = others.get(node.name, "")
    assert ends(network, "stem_act:bact") == ends(network)


def test_names_with_colons(network: fx.GraphModule) -> None:
    for node in network.graph.nodes:
        node.meta["onnx_name"] = f"{node.name}:0"
    assert ("stem_act", "cact") in ends(network, "stem_act:0:cact:0")


def test_what_is_asked_for_is_not_joined_with_others(network: fx.GraphModule) -> None:
    assert all(len(r.atoms) == 1 for r in match_regions(network, named=["stem_act:bact"]).regions if "bact" in r.nodes)


@pytest.mark.parametrize(
    ("named", "what"),
    [
        (["stem_act"], "is not FROM:TO"),
        (["stem_act:nowhere"], "has no node 'nowhere'"),
        (["stem_act:b2"], "not every path from input to output passes 'b2'"),
        (["cact:stem_act"], "'stem_act' does not come after 'cact'"),
        (["stem_act:bact", "x:bact"], "overlaps with another"),
    ],
)
def test_what_cannot_be_a_region_is_said(network: fx.GraphModule, named: list[str], what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        match_regions(network, named=named)
    assert f"--region {named[-1]}" in str(caught.value)


def test_near_names_are_offered(network: fx.GraphModule) -> None:
    with pytest.raises(UsageError) as caught:
        match_regions(network, named=["stem_akt:cact"])
    assert "stem_act" in caught.value.hint


@pytest.mark.parametrize("op", ["Mish", "Gelu", "PRelu"])
def test_activations_without_a_leaf_belong_to_the_operation_before_them(sketch: Pen, op: str) -> None:
    function = function_of("", op)
    assert function is not None
    slopes = {"s": np.full((8, 1, 1), 0.1, np.float32)} if op == "PRelu" else {}
    act = Verbatim(helper.make_node(op, ["x", *slopes], ["y"]), ("x",), slopes, {"": 20}, function)
    s = sketch(3, 8, 8)
    found = match_regions(s.done(s.chain("x", first=Conv(3, 8, 3), act=act, second=Conv(8, 8, 3))))
    assert [(r.kind, r.output) for r in found.regions if len(r.atoms) == 1] == [
        ("stem", "act"),
        ("plain_conv", "second"),
    ]
