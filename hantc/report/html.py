"""`report.html`: one self-contained page about a run, made from its folder's files."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hantc.core.atomic import write_text
from hantc.core.types import untouched
from hantc.report import charts, facts, svg
from hantc.report import text as fmt
from hantc.report.charts import Point
from hantc.report.records import RunRecords, Solution, read_run
from hantc.report.summary import Summary

FILE_NAME = "report.html"
_MAX_PANELS = 60
_MAX_POINTS = 70  # per panel; together they keep the page under 3 MB
_MAX_ROWS = 300  # of a table


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` into a run folder from the files that are there; returns its path. UsageError if
    the folder is no run folder or a file in it is broken."""
    run = read_run(run_folder)
    path = run.folder / FILE_NAME
    write_text(path, _environment().get_template("report.html.j2").render(_context(run)))
    return path


def _environment() -> Environment:
    env = Environment(
        loader=PackageLoader("hantc.report", "templates"),
        autoescape=True,  # names come from model files
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    formats = {"ms": fmt.fmt_ms, "times": fmt.fmt_times, "percent": fmt.fmt_percent, "share": fmt.fmt_share,
               "points": fmt.fmt_points, "score": fmt.fmt_score, "bytes": fmt.fmt_bytes, "count": fmt.fmt_count,
               "seconds": fmt.fmt_seconds}  # fmt: skip
    env.filters.update(formats)
    return env


def _finalize(value: Any) -> Any:
    return value if value is None or isinstance(value, Markup) else fmt.clean(value, 2000)


def _context(run: RunRecords) -> dict[str, Any]:
    s = run.summary
    choices = facts.choices_data(s)
    stages = sum(s.timings_s.values())
    slowest = max(s.timings_s.values(), default=0.0) or 1.0
    panels, legend, left_out = _panels(run)
    front = sorted(run.solutions, key=_front_order)
    return {
        "s": s,
        "style": _css(),
        "model": Path(s.model).name or s.model,
        "headline": _headline(s),
        "networks": _network_rows(s),
        "limits": facts.limits(run),
        "badges": _badges(s),
        "latency_chart": charts.latency_bars(s),
        "choices": choices[:_MAX_ROWS],
        "choices_left_out": max(0, len(choices) - _MAX_ROWS),
        "changes": ", ".join(f"{n} {what}" for what, n in Counter(c["change"] for c in choices).most_common()),
        "changed": sum(c["change"] != "kept" for c in choices),
        "widest": max((c["teacher_cost_ms"] or 0 for c in choices), default=0) or 1.0,
        "panels": panels,
        "legend": legend,
        "panels_left_out": left_out,
        "op_chart": charts.op_bars(s.ops.teacher, s.ops.student),
        "front_chart": charts.front(run.solutions, run.plan.budget_ms if run.plan else None),
        "front": front[:_MAX_ROWS],
        "by_accuracy": any(x.accuracy is not None for x in front),
        "solver": {k: _plain_value(v) for k, v in s.solver.items()},
        "stages": [(name, value, value / slowest) for name, value in s.timings_s.items()],
        "total_s": stages,
        "rejections": run.rejections[:_MAX_ROWS],
        "rejections_left_out": max(0, len(run.rejections) - _MAX_ROWS),
        "candidates": _counts(run),
        "validation_images": (s.data.counts.get("validation") or s.data.counts.get("val")) if s.data else None,
    }


def _css() -> Markup:
    # Our own file, read as it is: it holds no "</style".
    source, _, _ = PackageLoader("hantc.report", "templates").get_source(Environment(autoescape=True), "report.css")
    return Markup(source)


def _headline(s: Summary) -> str:
    """The result in one sentence."""
    if s.speedup is None:
        return f"The student's speed on {s.target} was not measured."
    how = ", as predicted" if s.predicted else ""
    if s.speedup < 0.995:
        text = f"{fmt.fmt_times(1 / s.speedup)} slower on {s.target}{how}"
    elif s.speedup < 1.005:
        text = f"As fast as the teacher on {s.target}{how}"
    else:
        text = f"{fmt.fmt_times(s.speedup)} faster on {s.target}{how}"
    if s.accuracy_drop is not None:
        gain = "more" if s.accuracy_drop < 0 else "less"
        text += (
            f", with {abs(s.accuracy_drop):.2f} points {gain} accuracy" if s.accuracy_drop else ", at equal accuracy"
        )
    elif s.agreement is not None and s.data is not None:
        text += f"; both networks agree on {fmt.fmt_share(s.agreement)} of the inputs"
    return text + "."


def _badges(s: Summary) -> list[tuple[str, str]]:
    """(text, css class) of what must be seen at once."""
    out = [(s.status.replace("_", " "), "good" if s.status == "done" else "bad")]
    if s.data is None:
        out.append(("no data: exact rewrites only", "warn"))
    elif s.data.synthetic:
        out.append(("synthetic data", "warn"))
    elif not s.data.labelled:
        out.append(("no labels", "warn"))
    if s.predicted or s.student.latency_ms is None:
        out.append(("latency predicted", "warn"))
    return out


def _network_rows(s: Summary) -> list[dict[str, Any]]:
    data = facts.summary_data(s)
    return [
        {"key": key, "title": title, "net": net, "row": data[key]}
        for key, title, net in facts.networks(s)
        if net is not None
    ]


def _plain_value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_plain_value(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain_value(v) for v in value)
    return "none" if value is None else str(value)


def _front_order(x: Solution) -> tuple[bool, float]:
    latency = fmt.finite(x.latency_ms)
    return latency is None, latency or 0.0


def _counts(run: RunRecords) -> dict[str, int]:
    """How many candidates got how far."""
    return {
        "costed": len(run.costs.rows) if run.costs else 0,
        "skipped": len(run.costs.skipped) if run.costs else 0,
        "scored": len(run.scores),
        "dropped": sum(bool(r.dropped) for r in run.scores),
    }


def _panels(run: RunRecords) -> tuple[list[dict[str, Any]], dict[str, list[tuple[str, str]]], int]:
    """The scatter panels (name, chart, points shown and known), their legend, and how many regions with
    scores are left out. Regions that were changed come first when there are too many."""
    points = _points(run)
    changed = {c.region for c in run.summary.choices if facts.change(c) == "replaced"}
    order = [n for n in run.region_names() if n in points]
    shown = set(sorted(order, key=lambda n: n not in changed)[:_MAX_PANELS])
    # The teacher and exact rewrites are few: colours are for the families that compete.
    colours = charts.family_colours([p.family for n in order for p in points[n]])
    scores = [p.score for n in shown for p in points[n]] or [0.0]
    kinds = {r.name: r.kind for r in run.regions} | {c.region: c.kind for c in run.summary.choices}
    panels = []
    for i, name in enumerate(n for n in order if n in shown):
        kept = charts.thin(points[name], _MAX_POINTS)
        chart = charts.region_panel(kept, colours, f"region{i}", fmt.clean(name, 80), max(scores), min(scores))
        panels.append(
            {"name": name, "kind": kinds.get(name, ""), "chart": chart, "shown": len(kept), "known": len(points[name])}
        )
    used = {p.family for n in shown for p in points[n]}
    named = [(f, svg.VARIABLES[c]) for f, c in colours.items() if f in used]
    if used - set(colours):
        named.append(("other families", svg.VARIABLES[svg.MUTED]))
    marks = {"fp32": "●", "int8": "■", "fp16": "▲", "bf16": "▲"}
    precisions = [(p, marks.get(p, "◆")) for p in sorted({p.precision for n in shown for p in points[n]})]
    return panels, {"families": named, "precisions": precisions}, len(order) - len(shown)


def _points(run: RunRecords) -> dict[str, list[Point]]:
    """Candidates by region that have both a finite cost and a score; regions of trained candidates only."""
    costs = run.costs.by_key() if run.costs else {}
    choices = {(c.region, c.candidate, c.precision): c for c in run.summary.choices}
    teachers = facts.teacher_costs(run)
    found: dict[str, list[Point]] = defaultdict(list)
    for row in run.scores:
        key = (row.region, row.candidate, row.precision)
        choice = choices.get(key)
        cost = costs[key].latency_ms if key in costs else choice.cost_ms if choice else None
        share = facts.ratio(cost, teachers.get(row.region))
        score = fmt.finite(row.score)
        if share is None or cost is None or score is None:
            continue
        family = fmt.family(row.candidate)
        found[row.region].append(
            Point(row.candidate, family, row.precision, share, cost, score, choice is not None, bool(row.dropped))
        )
    return _with_teachers(run, found, teachers)


def _with_teachers(
    run: RunRecords, found: dict[str, list[Point]], teachers: dict[str, float]
) -> dict[str, list[Point]]:
    """Add the teacher's own operation, whose score is 0 by definition, where no row says so."""
    picked = {c.region: c for c in run.summary.choices}
    base = next((r.precision for r in run.scores if untouched(r.candidate, r.precision)), "fp32")
    for name, points in found.items():
        if name in teachers and not any(fmt.is_kept(p.candidate) for p in points):
            choice = picked.get(name)
            chosen = choice is not None and untouched(choice.candidate, choice.precision)
            points.append(Point("teacher", "teacher", base, 1.0, teachers[name], 0.0, chosen, False))
    return dict(found)
