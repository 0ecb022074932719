"""Reductions over whole maps become global pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from onnx import NodeProto, helper

from hantc.dialect.rewrites.global_pool import MakeGlobalPool

if TYPE_CHECKING:
    from tests.dialect.rewrites.conftest import Rewriting


def node(op: str, inputs: list[str], outputs: tuple[str, ...] = ("a",), **attrs: Any) -> NodeProto:
    return helper.make_node(op, inputs, list(outputs), **attrs)


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (node("ReduceMean", ["x"], ("y",), axes=[2, 3]), ["GlobalAveragePool"]),
        (node("ReduceMean", ["x"], ("y",), axes=[-1, -2]), ["GlobalAveragePool"]),
        (node("ReduceMax", ["x"], ("y",), axes=[3, 2]), ["GlobalMaxPool"]),
        (node("ReduceMean", ["x"], ("y",), axes=[2, 3], keepdims=0), ["GlobalAveragePool", "Flatten"]),
        (node("AveragePool", ["x"], ("y",), kernel_shape=[8, 8]), ["GlobalAveragePool"]),
        (node("MaxPool", ["x"], ("y",), kernel_shape=[8, 8], strides=[8, 8]), ["GlobalMaxPool"]),
    ],
    ids=lambda v: v.op_type if isinstance(v, NodeProto) else "",
)
def test_global_pool(rewriting: Rewriting, made: NodeProto, wanted: list[str]) -> None:
    r = rewriting.run(MakeGlobalPool(), [made])
    assert r.after == wanted and r.missed == []


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (node("ReduceMean", ["x"], ("y",), axes=[1, 2, 3]), "not the spatial ones"),
        (node("ReduceMean", ["x"], ("y",), axes=[3]), "not the spatial ones"),
        (node("ReduceMean", ["x"], ("y",), axes=[1]), ""),
        (node("ReduceSum", ["x", "two"], ("y",)), ""),
        (node("AveragePool", ["x"], ("y",), kernel_shape=[7, 7], strides=[2, 2]), "is not the whole map [8, 8]"),
        (node("AveragePool", ["x"], ("y",), kernel_shape=[4, 4]), ""),
    ],
    ids=lambda v: v.op_type if isinstance(v, NodeProto) else "",
)
def test_not_global(rewriting: Rewriting, kept: NodeProto, reason: str) -> None:
    r = rewriting.run(MakeGlobalPool(), [kept], {"two": np.array([2])})
    assert r.after == r.before and r.applied == []
    assert [reason in m for m in r.reasons] == ([True] if reason else [])


def test_mean_over_features_of_tokens_stays(rewriting: Rewriting) -> None:
    r = rewriting.run(MakeGlobalPool(), [node("ReduceMean", ["x"], ("y",), axes=[-1])], x=("N", 5, 6))
    assert r.after == ["ReduceMean"] and r.missed == []


def test_flatten_output_serves_all_users(rewriting: Rewriting) -> None:
    nodes = [node("ReduceMean", ["x"], axes=[2, 3], keepdims=0), node("Add", ["a", "a"], ("y",))]
    r = rewriting.run(MakeGlobalPool(), nodes)
    assert r.after == ["GlobalAveragePool", "Flatten", "Add"]
    assert r.module(torch.ones(2, 4, 8, 8).double()).shape == (2, 4)


LAST = node("Transpose", ["x"], perm=[0, 2, 3, 1])


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        ([LAST, node("ReduceMean", ["a"], ("y",), axes=[1, 2], keepdims=0)], ["GlobalAveragePool", "Flatten"]),
        ([LAST, node("ReduceMax", ["a"], ("y",), axes=[-3, -2])], ["GlobalMaxPool", "Transpose"]),
        (
            [node("Reshape", ["x", "flat"]), node("ReduceMean", ["a"], ("y",), axes=[-1], keepdims=0)],
            ["GlobalAveragePool", "Flatten"],
        ),
        (
            [node("Reshape", ["x", "flat"]), node("ReduceMean", ["a"], ("y",), axes=[2])],
            ["GlobalAveragePool", "Reshape"],
        ),
        (
            [node("ReduceMean", ["x"], axes=[3]), node("ReduceMean", ["a"], ("y",), axes=[2])],
            ["GlobalAveragePool"],
        ),
        (
            [node("ReduceMean", ["x"], axes=[2], keepdims=0), node("ReduceMean", ["a"], ("y",), axes=[2], keepdims=0)],
            ["GlobalAveragePool", "Flatten"],
        ),
    ],
    ids=["channels last", "channels last, kept", "flattened", "flattened, kept", "two steps", "two steps, dropped"],
)
def test_what_was_changed_before(rewriting: Rewriting, nodes: list[NodeProto], wanted: list[str]) -> None:
    r = rewriting.run(MakeGlobalPool(), nodes, {"flat": np.array([0, 4, -1])})
    assert r.after == wanted and r.before != wanted


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Transpose", ["x"], perm=[0, 1, 3, 2]), node("ReduceMean", ["a"], ("y",), axes=[1, 2])],
        [node("Transpose", ["x"], perm=[2, 1, 0, 3]), node("ReduceMean", ["a"], ("y",), axes=[0, 3], keepdims=0)],
        [node("Reshape", ["x", "other"]), node("ReduceMean", ["a"], ("y",), axes=[2])],
        [node("ReduceMax", ["x"], axes=[3]), node("ReduceMean", ["a"], ("y",), axes=[2])],
        [node("ReduceMean", ["x"], axes=[3], keepdims=0), node("ReduceMean", ["a"], ("y",), axes=[2])],
        [node("ReduceMean", ["x"], axes=[3]), node("ReduceMean", ["a"], ("y",), axes=[1])],
    ],
    ids=["other dims", "channels first", "other rows", "a maximum's mean", "dims dropped once", "over channels"],
)
def test_what_is_no_map(rewriting: Rewriting, nodes: list[NodeProto]) -> None:
    r = rewriting.run(MakeGlobalPool(), nodes, {"other": np.array([0, 8, -1])})
    assert r.after == r.before and not r.applied
