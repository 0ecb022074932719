"""The pool as rows and tables."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from rich.table import Table

from hantc.core.errors import UsageError
from hantc.core.types import Signature
from hantc.ops import catalog, registry

SHAPE = (64, 14, 14)


def _printed(table: Table) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_every_grid_point_has_a_row() -> None:
    signature = Signature(SHAPE, (32, 7, 7))
    rows = catalog.describe(signature)
    assert len(rows) == 346 + sum(len(f.grid()) for f in registry.DERIVED.values())
    fitting = {row.candidate for row in rows if not row.reason}
    assert fitting == {spec.name for spec in registry.propose(signature)}
    by_name = {row.candidate: row for row in rows}
    assert by_name["identity"].reason == "the identity cannot drop channels (64 to 32)"
    assert by_name["identity"].macs is None
    assert by_name["slim_keep0.5"].reason == "made from the teacher's region, not from shapes"
    stack = by_name["cb_stack_k3_w1"]
    assert stack.macs == 49 * 9 * (64 * 32 + 32 * 32)
    assert stack.params == 9 * (64 * 32 + 32 * 32) + 2 * 2 * 32


def test_data_is_plain_and_of_one_family() -> None:
    data = catalog.pool_data("efn", SHAPE, SHAPE)
    assert len(data) == 27
    assert {row["family"] for row in data} == {"efn"}
    assert set(data[0]) == {"candidate", "family", "hyper", "macs", "params", "reason"}
    assert json.loads(json.dumps(data)) == data


def test_tables() -> None:
    text = _printed(catalog.pool_table("cb_stack", (16, 8, 8), (16, 8, 8)))
    assert "16×8×8 → 16×8×8: 20 of 40 candidates fit" in text
    assert "same as cb_stack_k3_w0.5 here" in text
    assert "295 k" in text
    text = _printed(catalog.families_table())
    assert all(name in text for name in (*registry.FAMILIES, *registry.DERIVED))
    assert {row["family"]: row["size"] for row in catalog.families_data()}["cb_bottle"] == 40


def test_unknown_family() -> None:
    with pytest.raises(UsageError, match="unknown candidate family 'nope'"):
        catalog.pool_data("nope", SHAPE, SHAPE)
