"""Draws `docs/overview.svg`, the picture at the top of the README.

    python tools/docs/overview.py [FILE]

A sketch of what hantc does, not of a measurement: box widths stand for latency, figures are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

TARGET = Path(__file__).resolve().parents[2] / "docs" / "overview.svg"
INK, GREY, SOFT = "#1f2933", "#9aa5b1", "#e4e7eb"
KEPT, QUANTISED, REPLACED, REMOVED = "#cbd2d9", "#f0b429", "#2680c2", "#b44d12"
# teacher's region, its width, what becomes of it, that width, colour
REGIONS = (
    ("stem", 1.0, "stem", 0.55, QUANTISED),
    ("MBConv + SE", 2.0, "cb_stack", 0.62, REPLACED),
    ("MBConv + SE", 2.4, "cb_bottle", 0.75, REPLACED),
    ("MBConv + SE", 1.6, "", 0.0, REMOVED),
    ("MBConv + SE", 2.2, "cb_stack", 0.65, REPLACED),
    ("MBConv + SE", 1.5, "MBConv", 1.5, KEPT),
    ("conv", 0.8, "conv", 0.45, QUANTISED),
)
# per region: candidates as (share of the teacher's latency, loss when plugged in alone); the first is chosen
DOTS = (
    ((0.55, 0.05), (1.0, 0.0), (0.4, 0.7), (0.8, 0.3)),
    ((0.35, 0.15), (1.0, 0.0), (0.15, 0.8), (0.6, 0.1), (0.25, 0.5), (0.75, 0.45)),
    ((0.33, 0.2), (1.0, 0.0), (0.12, 0.9), (0.55, 0.12), (0.7, 0.3)),
    ((0.03, 0.12), (1.0, 0.0), (0.4, 0.1), (0.25, 0.35), (0.6, 0.4)),
    ((0.3, 0.1), (1.0, 0.0), (0.12, 0.55), (0.5, 0.08), (0.8, 0.2)),
    ((1.0, 0.0), (0.4, 0.75), (0.6, 0.6), (0.2, 0.95), (0.8, 0.5)),
    ((0.56, 0.03), (1.0, 0.0), (0.3, 0.6)),
)
GAP, X0, HEIGHT = 0.22, 2.3, 1.15


def box(ax: Axes, x: float, y: float, width: float, text: str, colour: str, size: float = 8.5) -> None:
    """A labelled box; the label stands upright where the box is narrow."""
    style = "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch((x, y), width, HEIGHT, boxstyle=style, facecolor=colour, edgecolor="none"))
    ink = "white" if colour in (REPLACED, REMOVED) else INK
    turned = 90 if width < 1.0 else 0
    ax.text(x + width / 2, y + HEIGHT / 2, text, ha="center", va="center", fontsize=size, color=ink, rotation=turned)


def draw(ax: Axes) -> None:
    """Teacher above, candidates per region in the middle, student below."""
    x = X0
    centres = []
    for name, width, _, _, _ in REGIONS:
        box(ax, x, 5.0, width, name, SOFT)
        centres.append((x, width))
        x += width + GAP
    right = x - GAP
    for (left, width), dots, (_, _, _, _, colour) in zip(centres, DOTS, REGIONS, strict=True):
        ax.plot([left, left, left + width], [4.5, 3.0, 3.0], color=GREY, lw=0.8)
        for i, (cost, loss) in reversed(list(enumerate(dots))):
            face = (INK if colour == KEPT else colour) if i == 0 else SOFT
            ax.plot(
                left + 0.08 + cost * (width - 0.16),
                3.1 + 1.25 * loss,
                "o",
                ms=8 if i == 0 else 5,
                mec=GREY,
                mew=0.6,
                mfc=face,
            )
    x = X0
    for _, _, name, width, colour in REGIONS:
        if width:
            box(ax, x, 1.0, width, name, colour, 7)
            x += width + GAP
    end = x - GAP
    ax.annotate("", (end, 0.55), (X0, 0.55), arrowprops={"arrowstyle": "<->", "color": INK, "lw": 1})
    ax.annotate("", (right, 6.6), (X0, 6.6), arrowprops={"arrowstyle": "<->", "color": INK, "lw": 1})
    ax.text(
        (X0 + right) / 2, 6.75, "latency on the target, measured", ha="center", va="bottom", fontsize=8.5, color=INK
    )
    ax.text((X0 + end) / 2, 0.42, "the asked budget", ha="center", va="top", fontsize=8.5, color=INK)
    notes = (
        (5.45, "model.onnx", "the teacher, split into regions"),
        (3.7, "candidates", "right: slower, up: worse;\ntimed, distilled, scored"),
        (1.45, "RUN/model.onnx", "best choice within the budget,\nfine-tuned, verified"),
    )
    for y, head, text in notes:
        ax.text(X0 - 0.25, y + 0.12, head, ha="right", va="bottom", fontsize=10, weight="bold", color=INK)
        ax.text(X0 - 0.25, y + 0.02, text, ha="right", va="top", fontsize=7.5, color=INK, linespacing=1.3)
    legend = ((REPLACED, "replaced"), (REMOVED, "removed"), (QUANTISED, "INT8"), (KEPT, "kept"))
    for i, (colour, text) in enumerate(legend):
        ax.plot(end + 1.0 + 1.75 * i, 1.45, "s", ms=9, color=colour)
        ax.text(end + 1.2 + 1.75 * i, 1.45, text, va="center", fontsize=8.5, color=INK)
    ax.set_xlim(-1.1, right + 0.1)
    ax.set_ylim(0, 7.2)
    ax.axis("off")


def main() -> None:
    """Write the file."""
    # no date, fixed ids: the same picture is the same file
    with matplotlib.rc_context({"svg.hashsalt": "hantc", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(10, 3.9))
        draw(figure.add_axes((0.0, 0.0, 1.0, 1.0)))
        target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
        figure.savefig(target, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
