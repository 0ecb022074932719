"""Figures as text, and names made harmless."""

from __future__ import annotations

import pytest

from hantc.report import text as fmt


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (0.1129, "0.113 ms"),
        (0.9999, "1.00 ms"),
        (3.11, "3.11 ms"),
        (12.34, "12.3 ms"),
        (104.2, "104 ms"),
        (None, "n/a"),
    ],
)
def test_milliseconds(value: float | None, says: str) -> None:
    assert fmt.fmt_ms(value) == says


def test_other_units() -> None:
    assert fmt.fmt_times(3.5747) == "3.6×"
    assert fmt.fmt_times(1.107) == "1.11×"
    assert fmt.fmt_points(1.1) == "−1.10 points"
    assert fmt.fmt_points(-0.3) == "+0.30 points"
    assert fmt.fmt_points(0.001) == "±0.00 points"
    assert fmt.fmt_bytes(16_100_000) == "16.1 MB"
    assert fmt.fmt_bytes(0) == "0 B"
    assert fmt.fmt_count(4_020_000) == "4.0 M"
    assert fmt.fmt_count(999_900) == "1.0 M"
    assert fmt.fmt_score(-0.00259) == "−0.00259"
    assert fmt.fmt_seconds(612) == "10 min 12 s"
    assert fmt.fmt_seconds(5400) == "1 h 30 min"


def test_nan_is_not_a_figure() -> None:
    nan = float("nan")
    shown = {
        f(nan) for f in (fmt.fmt_ms, fmt.fmt_times, fmt.fmt_percent, fmt.fmt_bytes, fmt.fmt_score, fmt.fmt_seconds)
    }
    assert shown == {"n/a"}
    assert fmt.plain({"a": [nan, (1.0, float("inf"))]}) == {"a": [None, [1.0, None]]}


def test_clean_takes_out_what_drives_a_terminal() -> None:
    assert fmt.clean("a\x1b[31mb\u202ec\ud800") == "a\ufffd[31mb\ufffdc\ufffd"
    assert fmt.clean("two\nlines") == "two lines"
    long = fmt.clean("x" * 500 + "end", 50)
    assert len(long) == 50 and long.endswith("end")


@pytest.mark.parametrize(
    ("candidate", "family"),
    [("cb_stack_k3_w0.5", "cb_stack"), ("efnv2_e6_k3", "efnv2"), ("teacher_fold_pad", "teacher"),
     ("identity", "identity"), ("low_rank_r0.25", "low_rank"), ("bot_trans_e0.5", "bot_trans")],
)  # fmt: skip
def test_family(candidate: str, family: str) -> None:
    assert fmt.family(candidate) == family
    assert fmt.is_exact(candidate) == (family == "teacher")
    assert not fmt.is_kept(candidate)
