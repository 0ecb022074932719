"""The report's charts. Each returns an inline `<svg>`; figures in ms, shares as fractions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hantc.report import svg
from hantc.report.facts import networks, summary_data
from hantc.report.records import Solution
from hantc.report.summary import Summary
from hantc.report.text import clean, finite, fmt_ms, fmt_percent, fmt_score, fmt_share, fmt_times

MARKERS = {"fp32": "o", "int8": "s", "fp16": "^", "bf16": "^"}
OTHER = "other"
_X_MAX = 1.6  # candidates dearer than this (teacher = 1) are drawn at the edge


@dataclass(frozen=True)
class Point:
    """One candidate in a region's panel. `cost` is its latency over the teacher's."""

    candidate: str
    family: str
    precision: str
    cost: float
    cost_ms: float
    score: float
    chosen: bool
    dropped: bool


def latency_bars(summary: Summary) -> Markup | None:
    """Median latency of the teacher, the INT8 teacher and the student, with their interquartile ranges."""
    data = summary_data(summary)
    colours = {"baseline_int8": svg.INT8, "baseline_given": svg.INT8, "student": svg.STUDENT}
    rows = [(key, title, net) for key, title, net in networks(summary) if net and net.latency_ms is not None]
    if not rows:
        return None
    values = [net.latency_ms or 0.0 for _, _, net in rows]

    def draw(figure: Figure) -> svg.Tips:
        ax = figure.subplots()
        for y, ((key, _, net), value) in enumerate(zip(rows, values, strict=True)):
            ax.barh(y, value, height=0.56, color=colours.get(key, svg.TEACHER))
            half = (net.latency_iqr_ms or 0) / 2
            if half:
                ax.errorbar(value, y, xerr=half, color=svg.INK, lw=1, capsize=2.5)
            times = "" if key == "teacher" else f"  ({fmt_times(data[key]['speedup'])})"
            ax.annotate(
                fmt_ms(value) + times, (value + half, y), (5, 0), textcoords="offset points", va="center", weight="bold"
            )
        ax.set_yticks(range(len(rows)), [title for _, title, _ in rows])
        ax.set_xlim(0, max(values) * 1.3 or 1)
        ax.set_xlabel("median latency, ms (line: interquartile range)", fontsize=8)
        _bars_look(ax)
        return {}

    spoken = ", ".join(f"{title} {fmt_ms(net.latency_ms)}" for _, title, net in rows)
    return svg.render(draw, (5.6, 0.75 + 0.38 * len(rows)), "latency", f"Latency: {spoken}")


def _bars_look(ax: Axes) -> None:
    ax.invert_yaxis()
    ax.grid(axis="x")
    ax.tick_params(length=0)
    ax.spines["bottom"].set_visible(False)
    for label in ax.get_yticklabels():
        label.set_color(svg.INK)
        label.set_fontsize(9)
    ax.xaxis.set_major_locator(MaxNLocator(5))


def op_bars(teacher: Mapping[str, int], student: Mapping[str, int], limit: int = 24) -> Markup | None:
    """Operations by type in both networks, the most frequent first; the rest summed up."""
    total = Counter(teacher) + Counter(student)
    if not total:
        return None
    names = sorted(total, key=lambda n: (-total[n], n))
    shown, rest = names[:limit], names[limit:]
    rows = [(clean(n, 28), teacher.get(n, 0), student.get(n, 0)) for n in shown]
    if rest:
        rows.append(
            (f"{len(rest)} more types", sum(teacher.get(n, 0) for n in rest), sum(student.get(n, 0) for n in rest))
        )
    top = max(max(t, s) for _, t, s in rows)

    def draw(figure: Figure) -> svg.Tips:
        ax = figure.subplots()
        for y, (_, t, s) in enumerate(rows):
            for value, shift, colour in ((t, -0.19, svg.TEACHER), (s, 0.19, svg.STUDENT)):
                ax.barh(y + shift, value, height=0.34, color=colour)
                ax.annotate(str(value), (value, y + shift), (3, 0), textcoords="offset points", va="center", fontsize=7)
        ax.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        ax.set_xlim(0, top * 1.08)
        ax.set_ylim(-0.6, len(rows) - 0.4)
        _bars_look(ax)
        return {}

    return svg.render(draw, (5.6, 0.4 + 0.3 * len(rows)), "ops", "Number of operations by type, teacher and student")


def family_colours(families: Sequence[str]) -> dict[str, str]:
    """A colour for each of the eight most frequent families (ties by name); the teacher has its own."""
    counts = Counter(f for f in families if f != "teacher")
    ranked = sorted(counts, key=lambda f: (-counts[f], f))
    named = dict(zip(ranked, svg.SERIES, strict=False))
    return {"teacher": svg.TEACHER, **named}


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` points: the chosen one, the Pareto front, then an even sample over the scores."""
    if len(points) <= limit:
        return list(points)
    ordered = sorted(points, key=lambda p: (p.score, p.cost))
    kept: dict[int, Point] = {i: p for i, p in enumerate(ordered) if p.chosen}
    cheapest = float("inf")
    for i, p in enumerate(ordered):
        if p.cost < cheapest and len(kept) < limit:
            kept[i], cheapest = p, p.cost
    rest = [i for i in range(len(ordered)) if i not in kept]
    room = limit - len(kept)
    for k in range(room):
        i = rest[k * len(rest) // room]
        kept[i] = ordered[i]
    return [kept[i] for i in sorted(kept)]


def region_panel(
    points: Sequence[Point], colours: Mapping[str, str], name: str, title: str, max_score: float, min_score: float
) -> Markup:
    """One region's candidates: latency over the teacher's against score, colour by family, marker by
    precision, the chosen one ringed. The score axis is shared by all panels: linear up to 0.1, then
    logarithmic, since scores run from noise to collapse."""

    def draw(figure: Figure) -> svg.Tips:
        ax = figure.subplots()
        tips: dict[str, list[str]] = {}
        ax.axvline(1, color=svg.MUTED, lw=0.8, ls=(0, (3, 3)))
        for n, key in enumerate(sorted({(p.family, p.precision) for p in points})):
            group = [p for p in points if (p.family, p.precision) == key]
            gid = f"points-{n}"
            style: dict[str, Any] = {"s": 24, "lw": 0.7, "edgecolors": svg.SURFACE, "clip_on": False, "gid": gid}
            ax.scatter(
                [min(p.cost, _X_MAX) for p in group],
                [p.score for p in group],
                color=colours.get(key[0], svg.MUTED),
                marker=MARKERS.get(key[1], "D"),
                alpha=0.9,
                zorder=3,
                **style,
            )
            tips[gid] = [_tip(p) for p in group]
        for p in points:
            if p.chosen:
                x = min(p.cost, _X_MAX)
                ax.scatter(
                    [x],
                    [p.score],
                    s=110,
                    facecolors="none",
                    edgecolors=svg.INK,
                    linewidths=1.6,
                    zorder=4,
                    clip_on=False,
                )
        _panel_look(ax, max_score, min_score)
        return tips

    label = f"Candidates of {title}: latency against score"
    return svg.render(draw, (2.9, 2.1), name, label, margins=(0.15, 0.98, 0.16, 0.97))


def _tip(p: Point) -> str:
    out = " (dropped)" if p.dropped else " (chosen)" if p.chosen else ""
    cost = f"{fmt_ms(p.cost_ms)} ({fmt_share(p.cost, 0)} of the teacher)"
    return f"{clean(p.candidate, 80)} {clean(p.precision, 20)}: {cost}, score {fmt_score(p.score)}{out}"


def _panel_look(ax: Axes, max_score: float, min_score: float) -> None:
    ax.set_yscale("symlog", linthresh=0.1, linscale=1.0)
    ticks = [t for t in (-1, -0.1, 0, 0.1, 1, 10, 100) if min_score * 1.2 <= t <= max(max_score * 1.2, 0.1)]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_ylim(min(min_score * 1.2, -0.02), max(max_score * 1.4, 0.12))
    ax.set_xlim(0, _X_MAX)
    ax.set_xticks([0, 0.5, 1, 1.5], ["0", "0.5", "1", "1.5"])
    ax.grid()
    ax.tick_params(length=0)
    ax.set_xlabel("latency / teacher's", fontsize=8, labelpad=1)
    ax.set_ylabel("score (divergence)", fontsize=8, labelpad=1)


def front(solutions: Sequence[Solution], budget_ms: float | None) -> Markup | None:
    """The evaluated students: latency against accuracy (percent), or against the predicted score where no
    accuracy is known. Hollow: latency predicted, not measured. The emitted one is ringed."""
    by_accuracy = any(finite(s.accuracy) is not None for s in solutions)
    rows = [(s, finite(s.latency_ms), finite(s.accuracy if by_accuracy else s.score)) for s in solutions]
    known = [(s, x, y) for s, x, y in rows if x is not None and y is not None]
    if not known:
        return None

    def draw(figure: Figure) -> svg.Tips:
        ax = figure.subplots()
        tips: dict[str, list[str]] = {}
        for gid, measured in (("measured", True), ("predicted", False)):
            part = [(s, x, y) for s, x, y in known if (finite(s.measured_ms) is not None) == measured]
            if part:
                xs, ys = [x for _, x, _ in part], [y for _, _, y in part]
                face = svg.STUDENT if measured else "none"
                ax.scatter(
                    xs, ys, s=34, facecolors=face, edgecolors=svg.STUDENT, lw=1, gid=gid, zorder=3, clip_on=False
                )
                tips[gid] = [_solution_tip(s) for s, _, _ in part]
        for s, x, y in known:
            if s.chosen:
                ax.scatter(
                    [x], [y], s=150, facecolors="none", edgecolors=svg.INK, linewidths=1.6, zorder=4, clip_on=False
                )
                ax.annotate("chosen", (x, y), (0, 10), textcoords="offset points", ha="center", weight="bold")
        if budget_ms is not None:
            ax.axvline(budget_ms, color=svg.MUTED, lw=0.9, ls=(0, (3, 3)))
            ax.annotate(
                "budget",
                (budget_ms, 0),
                (3, 4),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                color=svg.MUTED,
            )
        ax.margins(x=0.12, y=0.12)
        ax.grid()
        ax.tick_params(length=0)
        ax.set_xlabel("latency, ms", fontsize=8)
        ax.set_ylabel("accuracy, %" if by_accuracy else "predicted score (lower is better)", fontsize=8)
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        return tips

    return svg.render(draw, (5.6, 2.9), "front", "Evaluated students: latency against accuracy or score")


def _solution_tip(s: Solution) -> str:
    parts = [f"predicted {fmt_ms(s.predicted_ms)}", f"measured {fmt_ms(s.measured_ms)}", f"score {fmt_score(s.score)}"]
    if finite(s.accuracy) is not None:
        parts.append(f"accuracy {fmt_percent(s.accuracy)}")
    return ", ".join(parts) + (" (chosen)" if s.chosen else "")
