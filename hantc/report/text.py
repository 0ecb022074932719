"""Figures and names as text. Names come from model files, so they are never trusted."""

from __future__ import annotations

import itertools
import math
import unicodedata
from typing import Any

from hantc.core.types import CandidateSpec

NA = "n/a"
_HIDDEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")  # Unicode categories


def clean(value: object, limit: int = 400) -> str:
    """`value` on one line without control, surrogate and direction-changing characters (they become U+FFFD),
    so that a name can neither drive the terminal nor break the page; cut in the middle at `limit` characters."""
    text = "".join(_visible(c) for c in str(value))
    if len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail - 1]}…{text[-tail:]}"


def _visible(char: str) -> str:
    if char in "\n\r\t":
        return " "
    return "\ufffd" if unicodedata.category(char) in _HIDDEN else char


def finite(value: float | None) -> float | None:
    """`value`, or None where it is NaN or infinite (JSON has neither)."""
    return value if value is not None and math.isfinite(value) else None


def plain(value: Any) -> Any:
    """A copy of nested dicts and sequences that strict JSON can hold: NaN and infinities become None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return finite(value) if isinstance(value, float) else value


def plain_dict(value: dict[str, Any]) -> dict[str, Any]:
    """`plain` of a dict."""
    return {k: plain(v) for k, v in value.items()}


def fmt_ms(value: float | None) -> str:
    """Milliseconds with three significant digits: `0.113 ms`, `3.11 ms`, `104 ms`."""
    value = finite(value)
    if value is None:
        return NA
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2 if abs(value) >= 0.9995 else 3
    return f"{value:.{digits}f} ms"


def fmt_times(value: float | None) -> str:
    """A speed-up: `3.7×`, `1.15×`."""
    value = finite(value)
    if value is None:
        return NA
    return f"{value:.2f}×" if value < 1.995 else f"{value:.1f}×"


def fmt_percent(value: float | None, digits: int = 1) -> str:
    """A figure that is already in percent: `78.2 %`."""
    value = finite(value)
    return NA if value is None else f"{value:.{digits}f} %"


def fmt_share(value: float | None, digits: int = 1) -> str:
    """A share between 0 and 1, in percent."""
    value = finite(value)
    return NA if value is None else fmt_percent(100 * value, digits)


def fmt_points(value: float | None) -> str:
    """A loss of accuracy in points; a gain has a plus sign: `−1.2 points`."""
    value = finite(value)
    if value is None:
        return NA
    rounded = round(-value, 2) + 0.0
    sign = "−" if rounded < 0 else "+" if rounded > 0 else "±"
    return f"{sign}{abs(rounded):.2f} points"


def fmt_score(value: float | None) -> str:
    """A score (divergence from the teacher) with three significant digits."""
    value = finite(value)
    if value is None:
        return NA
    return "0" if value == 0 else f"{value:.3g}".replace("-", "−", 1) if value < 0 else f"{value:.3g}"


def fmt_bytes(value: float | None) -> str:
    """Decimal units, as on a download page: `14.2 MB`."""
    return NA if finite(value) is None else _scaled(value or 0, ("B", "kB", "MB", "GB", "TB"))


def fmt_count(value: float | None) -> str:
    """Parameters or multiply-accumulates: `4.0 M`."""
    return NA if finite(value) is None else _scaled(value or 0, ("", "k", "M", "G", "T")).rstrip()


def _scaled(value: float, units: tuple[str, ...]) -> str:
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.0f} {units[step]}" if step == 0 or abs(value) >= 99.95 else f"{value:.1f} {units[step]}"


def fmt_seconds(value: float | None) -> str:
    """A duration: `0.07 s`, `12.3 s`, `4 min 05 s`, `1 h 30 min`."""
    value = finite(value)
    if value is None:
        return NA
    if value < 99.95:
        return f"{value:.2f} s" if value < 9.995 else f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def family(candidate: str) -> str:
    """The family that a candidate's name begins with: `cb_stack_k3_w0.5` → `cb_stack`, `efnv2_e6` → `efnv2`,
    `teacher_fold_pad` → `teacher`. `CandidateSpec.name` joins family and parameters by underscores."""
    first, *rest = candidate.split("_")
    if first == "teacher":
        return first
    words = itertools.takewhile(lambda part: not any(c.isdigit() for c in part), rest)
    return "_".join([first, *words])


def is_kept(candidate: str) -> bool:
    """Whether the region stays exactly as the teacher has it."""
    return candidate == CandidateSpec.make("teacher").name


def is_exact(candidate: str) -> bool:
    """Whether the candidate is the teacher's own operation, as it is or rewritten without error."""
    return family(candidate) == "teacher"
