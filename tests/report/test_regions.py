"""What the matcher found, for the terminal and for machines."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from hantc.core.types import MatchResult, Region, Rejection
from hantc.report.regions import regions_json, regions_table

WIDE = Region("r00", "plain_conv", "x", "y", ("c",), (16, 32, 32), (16, 32, 32), 9 * 256 * 1024, 9 * 256, (0,))
DEEP = Region("r01", "plain_conv", "y", "z", ("d",), (512, 2, 2), (512, 2, 2), 3 * 512 * 512, 512 * 512, (1,))
FOUND = MatchResult((WIDE, DEEP), (Rejection("head", "no region"),), 2)


def shown(found: MatchResult, **options: Any) -> str:
    text = io.StringIO()
    Console(width=160, file=text).print(regions_table(found, **options))
    return text.getvalue()


def test_arithmetic_intensity() -> None:
    """A convolution of large images multiplies much with each weight; one of 2×2 pixels is bound by memory."""
    assert WIDE.flops_per_byte == pytest.approx(2 * 9 * 256 * 1024 / 4 / (2 * 16 * 1024 + 9 * 256))
    assert DEEP.flops_per_byte == pytest.approx(2 * 3 / 4, rel=0.02)
    text = shown(FOUND)
    assert "FLOP/B" in text and " 34" in text and " 1.5" in text
    assert [r["flops_per_byte"] for r in regions_json(FOUND)["regions"]] == [WIDE.flops_per_byte, DEEP.flops_per_byte]


def test_what_is_no_region_is_told() -> None:
    assert "no region" in shown(FOUND)
    assert "no near misses" in shown(FOUND, why=True) and "near misses" not in shown(FOUND)
