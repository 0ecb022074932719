"""What `hantc` prints: rich renderables. Names go in as `Text`, never as markup."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, Group, OverflowMethod, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from hantc.report import text as fmt
from hantc.report.facts import (
    choices_data,
    diff_runs_data,
    explain_region_data,
    limits,
    networks,
    summary_data,
)
from hantc.report.records import read_run
from hantc.report.summary import Summary

_STATUS_STYLE = {"chosen": "bold green", "runner-up": "cyan", "dropped": "red", "skipped": "dim", "not scored": "dim"}


def summary_table(summary: Summary) -> RenderableType:
    """Teacher, INT8 teacher and student: latency, speed-up, accuracy, size; parameters where there is room."""
    data = summary_data(summary)
    wide = ["", "latency", "speed-up", "accuracy", "size", "params", "MACs"]
    tables = []
    for headings in (wide, [h for h in wide if h != "params"]):
        table = _table(headings, right_from=1)
        for key, title, net in networks(summary):
            row = data[key]
            if net is None or row is None:
                table.add_row(_text(title), *[Text("–", "dim")] * (len(headings) - 1))
                continue
            cells = {
                "": title,
                "latency": fmt.fmt_ms(net.latency_ms),
                "speed-up": fmt.fmt_times(row["speedup"]),
                "accuracy": accuracy_text(net.accuracy, None if key == "teacher" else row["accuracy_change"]),
                "size": fmt.fmt_bytes(net.size_bytes),
                "params": fmt.fmt_count(net.params),
                "MACs": fmt.fmt_count(net.macs),
            }
            table.add_row(*(_text(cells[h]) for h in headings), style="bold" if key == "student" else None)
        if summary.baseline_int8 is None:
            table.caption = _text(f"no INT8 teacher: {summary.baseline_int8_reason or 'it was not built'}")
        tables.append(table)
    return _Fitted(*tables)


def accuracy_text(accuracy: float | None, change: float | None) -> str:
    """`77.1 % (−1.10 points)`."""
    if accuracy is None:
        return fmt.NA
    return fmt.fmt_percent(accuracy) + ("" if change is None else f" ({fmt.fmt_points(-change)})")


def choices_table(summary: Summary) -> RenderableType:
    """What became of each region: choice, precision, cost against the teacher's, score; the runner-up too where
    the terminal is wide enough (`hantc explain` names it anyway)."""
    wide = ["region", "kind", "choice", "in", "ms", "teacher", "ratio", "score", "runner-up"]
    tables = []
    for headings in (wide, wide[:6] + wide[7:8]):
        table = _table(headings, whole=True)
        for column in table.columns[4:8]:
            column.justify = "right"
        for row in choices_data(summary):
            cells = {
                **{k: row[k] for k in ("region", "kind")},
                "choice": row["candidate"],
                "in": row["precision"],
                "ms": _bare_ms(row["cost_ms"]),
                "teacher": _bare_ms(row["teacher_cost_ms"]),
                "ratio": fmt.fmt_share(row["ratio"], 0),
                "score": fmt.fmt_score(row["score"]),
                "runner-up": row["runner_up"] or "–",
            }
            style = "dim" if row["change"] == "kept" else None
            table.add_row(*(_text(cells[h]) for h in headings), style=style)
        if not summary.choices:
            table.caption = "no region was selected"
        tables.append(table)
    return _Fitted(*tables)


class _Fitted:
    """The first of two tables if it fits, else the second."""

    def __init__(self, wide: Table, narrow: Table) -> None:
        self.wide, self.narrow = wide, narrow

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Table]:
        fits = Measurement.get(console, options.update(width=10_000), self.wide).maximum <= options.max_width
        yield self.wide if fits else self.narrow


def _bare_ms(value: float | None) -> str:
    return fmt.fmt_ms(value).removesuffix(" ms")


def verification_table(found: dict[str, Any]) -> RenderableType:
    """`hantc verify RUN`: recorded figures beside those measured now, and the verdict."""
    was = found["recorded"]
    table = _table(["figure", "recorded", "now"], right_from=1)
    for title, key in (("teacher", "teacher"), ("student", "student")):
        pair = (was[key]["latency_ms"], found[key]["latency_ms"])
        table.add_row(f"{title} latency", *(fmt.fmt_ms(v) for v in pair))
    table.add_row("speed-up", fmt.fmt_times(was["speedup"]), fmt.fmt_times(found["speedup"]))
    if cold := found.get("cold"):
        times = " → ".join(fmt.fmt_ms(cold[f"{n}_ms"]) for n in ("teacher", "student"))
        table.add_row("with cold caches", "", f"{times}, {fmt.fmt_times(cold['speedup'])}")
    for key in ("teacher", "student"):
        table.add_row(f"{key} accuracy", *(fmt.fmt_percent(f[key]["accuracy"], 2) for f in (was, found)))
    table.add_row("agreement", *(fmt.fmt_share(f["agreement"], 2) for f in (was, found)))
    verdict_line = Text("confirmed", "bold green") if found["ok"] else Text("not confirmed", "bold red")
    lines = [_text(f"differs: {d}", limit=2000) for d in found["differences"]]
    return Group(table, *lines, *(_text(f"note: {n}", limit=2000) for n in found["notes"]), verdict_line)


def explain_region(run_folder: str | os.PathLike[str], region: str) -> RenderableType:
    """`hantc explain RUN REGION`: all candidates of a region and what became of each. UsageError, listing the
    regions, if there is no such region."""
    data = explain_region_data(run_folder, region)
    own, counts = data["region"], data["counts"]
    lines = [_line(own["name"], own.get("kind") or "region", style="bold")]
    if "in_shape" in own:
        shapes = f"{_shape(own['in_shape'])} → {_shape(own['out_shape'])}"
        size = (
            f"{fmt.fmt_count(own['params'])} parameters, {fmt.fmt_count(own['macs'])} MACs, {len(own['nodes'])} nodes"
        )
        lines.append(_text(f"{shapes}, {size}"))
    lines.append(_text(verdict(data)))
    lines.append(_text(", ".join(f"{n} {status}" for status, n in counts.items()) or "no candidate on record"))
    wide = ["candidate", "in", "ms", "ratio", "score", "±", "Δ accuracy", "agreement", "outcome"]
    tables = []
    for headings in (wide, ["candidate", "in", "ms", "score", "outcome"]):
        table = _table(headings, whole=True)
        for column in table.columns[2:-1]:
            column.justify = "right"
        table.columns[-1].no_wrap = False
        for row in data["candidates"]:
            cells = _candidate_cells(row)
            table.add_row(*(cells[h] for h in headings))
        tables.append(table)
    return Group(*lines, _Fitted(*tables)) if data["candidates"] else Group(*lines)


def _candidate_cells(row: dict[str, Any]) -> dict[str, Text]:
    outcome = f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]
    style = _STATUS_STYLE.get(row["status"], "")
    drop, agreement = row["accuracy_drop"], row["agreement"]
    return {
        "candidate": _text(row["candidate"], style),
        "in": _text(row["precision"]),
        "ms": _text(_bare_ms(row["cost_ms"]) + (" (predicted)" if row["cost_predicted"] else "")),
        "ratio": _text(fmt.fmt_share(row["ratio"], 0)),
        "score": _text(fmt.fmt_score(row["score"])),
        "±": _text(fmt.fmt_score(row["score_stderr"]) if row["score_stderr"] else ""),
        "Δ accuracy": _text("–" if drop is None else fmt.fmt_points(drop)),
        "agreement": _text("–" if agreement is None else fmt.fmt_share(agreement)),
        "outcome": _text(outcome, style),
    }


def verdict(data: dict[str, Any]) -> str:
    """One sentence on what was done with the region that `explain_region_data` describes."""
    choice = data["choice"]
    if choice is None:
        cover = ", ".join(data["covered_by"])
        return f"not in the plan by itself: covered by {cover}" if cover else "not in the plan: left as it is"
    cost = f"{fmt.fmt_ms(choice['cost_ms'])} instead of {fmt.fmt_ms(choice['teacher_cost_ms'])}"
    score = "" if choice["score"] is None else f", score {fmt.fmt_score(choice['score'])}"
    runner = f"; runner-up {choice['runner_up']}" if choice["runner_up"] else ""
    return f"chosen: {choice['candidate']} in {choice['precision']}, {cost}{score}{runner}"


def inspect_run(run_folder: str | os.PathLike[str]) -> RenderableType:
    """`hantc inspect RUN`: the networks, the prediction, each region's choice, the limits of the figures."""
    run = read_run(run_folder)
    s = run.summary
    threads = "" if s.device.threads is None else f", {s.device.threads} thread{'' if s.device.threads == 1 else 's'}"
    parts: list[RenderableType] = [
        _line(s.model, f"→ {s.target}, {s.status}", style="bold"),
        _text(f"{s.device.cpu}{threads}; hantc {s.hantc_version}, seed {s.seed}", "dim"),
        summary_table(s),
        _text(
            f"agreement {fmt.fmt_share(s.agreement)}; predicted {fmt.fmt_ms(s.predicted_latency_ms)}, "
            f"off by {fmt.fmt_share(None if s.prediction_error is None else abs(s.prediction_error))}"
        ),
        choices_table(s),
    ]
    if run.rejections:
        parts.append(_text(f"not in any region: {len(run.rejections)} (reasons in report.html)", "dim"))
    parts += [_text(f"• {note}", limit=2000) for note in limits(run)]
    return Group(*parts)


def diff_runs(run_a: str | os.PathLike[str], run_b: str | os.PathLike[str]) -> RenderableType:
    """`hantc diff A B`: settings, figures and choices that differ."""
    data = diff_runs_data(run_a, run_b)
    parts: list[RenderableType] = [_line("a", data["runs"][0]), _line("b", data["runs"][1])]
    if data["settings"]:
        table = _table(["setting", "a", "b"])
        for key, pair in data["settings"].items():
            table.add_row(*(_text("none" if v is None else v) for v in (key, pair["a"], pair["b"])))
        parts.append(table)
    table = _table(["figure", "a", "b", "change"], right_from=1)
    for row in data["figures"]:
        if row["a"] is not None or row["b"] is not None:
            show = _figure_format(row["name"])
            sign = "" if row["change"] is None else "+" if row["change"] > 0 else ""
            table.add_row(*map(_text, (row["name"], show(row["a"]), show(row["b"]), sign + show(row["change"]))))
    parts.append(table)
    changed = [row for row in data["choices"] if row["changed"]]
    if changed:
        table = _table(["region", "a", "b"])
        for row in changed:
            table.add_row(_text(row["region"]), _text(_choice_text(row["a"])), _text(_choice_text(row["b"])))
        parts.append(table)
    parts.append(_text(f"{len(changed)} of {len(data['choices'])} regions differ"))
    return Group(*parts)


def _choice_text(choice: dict[str, Any] | None) -> str:
    if choice is None:
        return "not in the plan"
    return f"{choice['candidate']} {choice['precision']}, {fmt.fmt_ms(choice['cost_ms'])}"


def _figure_format(name: str) -> Callable[[float | None], str]:
    last = name.rsplit(".", 1)[-1]
    known: dict[str, Callable[[float | None], str]] = {
        "speedup": fmt.fmt_times,
        "agreement": fmt.fmt_share,
        "prediction_error": fmt.fmt_share,
        "accuracy": fmt.fmt_percent,
        "latency_ms": fmt.fmt_ms,
        "predicted_latency_ms": fmt.fmt_ms,
        "size_bytes": fmt.fmt_bytes,
        "params": fmt.fmt_count,
        "macs": fmt.fmt_count,
        "activation_bytes": fmt.fmt_bytes,
        "regions": lambda v: fmt.NA if v is None else f"{v:.0f}",
        "accuracy_drop": lambda v: fmt.NA if v is None else f"{v:.2f} points",
    }
    return known[last]


def _shape(dims: Iterable[int]) -> str:
    return "×".join(str(d) for d in dims)


def _table(headings: list[str], right_from: int | None = None, *, whole: bool = False) -> Table:
    """`whole`: cells are cut rather than folded where the terminal is too narrow for them."""
    table = Table(box=None, pad_edge=False, header_style="dim", caption_justify="left")
    for i, heading in enumerate(headings):
        right = right_from is not None and i >= right_from
        overflow: OverflowMethod = "ellipsis" if whole else "fold"
        table.add_column(heading, justify="right" if right else "left", overflow=overflow, no_wrap=whole)
    return table


def _text(value: object, style: str = "", limit: int = 400) -> Text:
    return Text(fmt.clean(value, limit), style)


def _line(head: str, rest: str, style: str = "") -> Text:
    return Text.assemble((fmt.clean(head), style), "  ", fmt.clean(rest))
