"""matplotlib figures as inline SVG for one page: text stays text, colours follow the page's theme, ids are
stable and unique, and nothing points outside."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET  # reads only what matplotlib wrote
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# matplotlib knows no CSS variables: each of these stand-in colours becomes the variable of its name, which
# the page defines for a light and a dark theme.
INK, MUTED, GRID, SURFACE = "#010101", "#020202", "#030303", "#040404"
TEACHER, INT8, STUDENT = "#050505", "#060606", "#070707"
SERIES = tuple(f"#0000{i:02x}" for i in range(16, 24))
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface", TEACHER: "teacher", INT8: "int8",
             STUDENT: "student", **{c: f"series{i}" for i, c in enumerate(SERIES)}}  # fmt: skip

_STYLE: dict[Any, Any] = {  # matplotlib types the keys as a closed set of literals
    "svg.fonttype": "none",
    "text.parse_math": False,  # names hold dollar signs
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "figure.facecolor": "none",
    "legend.frameon": False,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_XLINK = "{http://www.w3.org/1999/xlink}href"

Tips = Mapping[str, Sequence[str]]


def render(
    draw: Callable[[Figure], Tips],
    size: tuple[float, float],
    name: str,
    label: str,
    margins: tuple[float, float, float, float] | None = None,
) -> Markup:
    """Draw on a fresh figure of `size` inches and return an `<svg>` element.

    `draw` returns hover texts by artist gid, one per point in drawing order. `name` (letters, digits, dashes)
    prefixes every id; `label` is what screen readers say. `margins` (left, right, bottom, top, as fractions)
    spare the layout search, which takes most of the time of a small figure.
    """
    out = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Names in scripts that the font lacks are fine: the browser picks the font.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure = Figure(figsize=size, layout=None if margins else "constrained")
        if margins:
            left, right, bottom, top = margins
            figure.subplots_adjust(left=left, right=right, bottom=bottom, top=top)
        FigureCanvasSVG(figure)
        tips = draw(figure)
        figure.savefig(out, format="svg", metadata=_NO_METADATA)
    root = ET.fromstring(out.getvalue())
    _drop_style(root)
    _add_tips(root, tips)
    _localise(root, name)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label, "class": "chart"}
    return Markup(ET.tostring(root, encoding="unicode"))  # safe: ElementTree has escaped every text


def _drop_style(root: ET.Element) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if _tag(child) in ("style", "metadata"):
                parent.remove(child)


def _tag(element: ET.Element) -> str:
    return element.tag.rsplit("}", 1)[-1]


def _add_tips(root: ET.Element, tips: Tips) -> None:
    for group in root.iter():
        texts = tips.get(group.get("id", ""))
        if not texts:
            continue
        marks = [e for e in group.iter() if _tag(e) == "use"]
        for mark, text in zip(marks, texts, strict=True):
            ET.SubElement(mark, "title").text = text


def _localise(root: ET.Element, name: str) -> None:
    """Strip namespaces (an inline SVG needs none), renumber ids under `name`, put CSS variables for colours."""
    used: set[str] = set()
    for element in root.iter():
        used.update(re.findall(r"url\(#([^)]+)\)", element.get("clip-path", "")))
        used.add(element.get(_XLINK, "").removeprefix("#"))
    ids = {key: f"{name}-{i}" for i, key in enumerate(sorted(used - {""}))}
    for element in root.iter():
        element.tag = _tag(element)
        if element.tag != "text" and not (element.text or "").strip() and len(element) == 0:
            element.text = None
        element.tail = None
        old = dict(element.attrib)
        element.attrib.clear()
        for key, value in old.items():
            if key == "id":
                if value in ids:
                    element.set("id", ids[value])
            elif key == _XLINK:
                element.set("href", f"#{ids[value.removeprefix('#')]}")
            elif key == "clip-path":
                element.set(key, re.sub(r"#([^)]+)", lambda m: f"#{ids[m.group(1)]}", value))
            else:
                element.set(key, _attribute(element.tag, key, value))
    for element in root.iter():
        if element.tag in ("g", "defs", "svg", "clipPath", "use") and not (element.text or "").strip():
            element.text = None


def _attribute(tag: str, key: str, value: str) -> str:
    if key == "style":
        if tag == "text":  # the page's own font
            value = re.sub(r"font-family: [^;]*(; )?", "", value)
            value = re.sub(r"font: (\S+) '[^;]*", r"font-size: \1", value)
        return re.sub(r"#[0-9a-f]{6}", lambda m: _colour(m.group()), value)
    if key == "d":
        return re.sub(r"\s+", " ", _round(value)).strip()
    return _round(value) if key in ("x", "y", "transform") else value


def _colour(value: str) -> str:
    return f"var(--{VARIABLES[value]})" if value in VARIABLES else value


def _round(value: str) -> str:
    return re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m.group()):.2f}", value)
