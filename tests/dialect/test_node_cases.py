"""onnx's own node tests of the operators that vision networks are made of: computed in torch alone, and as onnx states.

`tools/bench/onnx_node_tests.py` counts all the others too.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

_FILE = Path(__file__).resolve().parents[2] / "tools" / "bench" / "onnx_node_tests.py"
_SPEC = importlib.util.spec_from_file_location("onnx_node_tests", _FILE)
assert _SPEC is not None and _SPEC.loader is not None
bench = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bench)

# torch has no integers below 8 bits, no strings, and 8-bit floats that do not saturate
_LACKING = ("e4m3fn", "e5m2", "int4", "int2", "float4e2m1", "string")


@pytest.fixture(scope="module")
def by_operator() -> dict[str, list[tuple[str, Any]]]:
    ort.set_default_logger_severity(4)
    found: dict[str, list[tuple[str, Any]]] = defaultdict(list)
    for op, name, case in bench.cases():
        if op in bench.VISION:
            found[op].append((name, case))
    return found


@pytest.mark.parametrize("op", sorted(bench.VISION))
def test_native_and_right(by_operator: dict[str, list[tuple[str, Any]]], op: str) -> None:
    cases = [(name, case) for name, case in by_operator[op] if not any(word in name for word in _LACKING)]
    assert cases
    wrong = {name: found for name, case in cases if (found := bench.verdict(case))[0] != "native"}
    assert not wrong


def test_enough_cases_are_left(by_operator: dict[str, list[tuple[str, Any]]]) -> None:
    names = [name for cases in by_operator.values() for name, _ in cases]
    lacking = [n for n in names if any(word in n for word in _LACKING)]
    assert len(lacking) <= 0.02 * len(names), lacking


@pytest.mark.parametrize("word", ["sequence", "identity", "loop"])
def test_values_that_are_no_tensors_pass(word: str) -> None:
    """In and out, as sequences and optional values, also where there is none."""
    ort.set_default_logger_severity(4)
    cases = [(name, case) for _, name, case in bench.cases() if word in name and bench.runs(case)]
    assert len(cases) > 2
    wrong = {name: found for name, case in cases if (found := bench.verdict(case))[0] not in ("native", "opaque")}
    assert not wrong
