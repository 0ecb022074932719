"""What a run's records say, as plain JSON-able dicts: the twins of the terminal tables, for `--json`."""

from __future__ import annotations

import difflib
import os
from dataclasses import asdict
from typing import Any

from hantc.core.errors import UsageError
from hantc.core.types import CostRow, ScoreRow
from hantc.report.records import RunRecords, read_run
from hantc.report.summary import ChoiceRow, NetworkStats, Summary, load
from hantc.report.text import clean, family, finite, fmt_share, is_exact, is_kept, plain_dict

_NEVER_TRAINED = "never trained: the prefilter kept others"
_ORDER = ("chosen", "runner-up", "considered", "dropped", "not scored", "skipped")


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, or None where either is unknown or b is not positive."""
    a, b = finite(a), finite(b)
    return None if a is None or b is None or b <= 0 else a / b


def networks(summary: Summary) -> list[tuple[str, str, NetworkStats | None]]:
    """(key, title, figures) of the teacher, the teacher in BF16 (on targets that have it), in INT8, the file as given
    (where it was quantised), and the student."""
    rare = [
        ("baseline_bf16", "Teacher in BF16", summary.baseline_bf16),
        ("baseline_given", "File as given", summary.baseline_given),
    ]
    return [
        ("teacher", "Teacher", summary.teacher),
        *(row for row in rare if row[2] is not None),
        ("baseline_int8", "Teacher in INT8", summary.baseline_int8),
        ("student", "Student", summary.student),
    ]


def summary_data(summary: Summary) -> dict[str, Any]:
    """The three networks side by side, each with its speed-up over the teacher and its change of accuracy in
    points (negative: worse)."""
    base = summary.teacher
    out: dict[str, Any] = {}
    for key, _, net in networks(summary):
        row = None if net is None else net.model_dump()
        if row is not None and net is not None:
            both = net.accuracy is not None and base.accuracy is not None
            row["speedup"] = ratio(base.latency_ms, net.latency_ms)
            row["accuracy_change"] = (net.accuracy or 0) - (base.accuracy or 0) if both else None
        out[key] = row
    if summary.speedup is not None:
        out["student"]["speedup"] = summary.speedup
    if out["baseline_int8"] is None:
        out["baseline_int8_reason"] = summary.baseline_int8_reason
    return {**out, "agreement": summary.agreement, "status": summary.status}


def choices_data(summary: Summary) -> list[dict[str, Any]]:
    """One dict per region: the choice, its family, its cost over the teacher's, and what kind of change it is
    (`kept`, `lower precision`, `exact rewrite`, `replaced`)."""
    return [
        {
            **c.model_dump(),
            "family": family(c.candidate),
            "change": change(c),
            "ratio": ratio(c.cost_ms, c.teacher_cost_ms),
        }
        for c in summary.choices
    ]


def change(choice: ChoiceRow) -> str:
    """What was done to the region, in words."""
    if not is_exact(choice.candidate):
        return "replaced"
    if not is_kept(choice.candidate):
        return "exact rewrite"
    return "lower precision" if choice.precision == "int8" else "kept"


def limits(run: RunRecords) -> list[str]:
    """What a reader must know before trusting the figures; the run's own notes last, nothing twice."""
    s = run.summary
    found: list[str] = []
    if s.status in ("budget_missed", "drop_exceeded"):
        found.append("The asked constraint was not met: this is the nearest that the search reached.")
    elif s.status != "done":
        found.append(f"The run's status is “{s.status}”, not “done”.")
    found += _data_limits(s)
    if run.costs is not None:
        predicted = sum(r.predicted for r in run.costs.rows)
        if predicted:
            found.append(
                f"{predicted} of {len(run.costs.rows)} candidate costs are predicted by a model, not measured."
            )
    if s.predicted:
        found.append("All latencies, the speed-up too, are predicted by a model of the machine: nothing was timed.")
    if s.student.latency_ms is None:
        found.append("The student's latency was not measured here; only the predicted figure is given.")
    if s.prediction_error is not None and abs(s.prediction_error) > 0.1:
        found.append(
            f"Predicted and measured latency differ by {fmt_share(abs(s.prediction_error), 0)}: trust the measured one."
        )
    if s.baseline_int8 is None and s.baseline_int8_reason:
        found.append(f"No INT8 teacher to compare with: {s.baseline_int8_reason}")
    notes = [*s.device.notes, *(s.data.notes if s.data else ()), *s.notes, *run.warnings]
    return list(dict.fromkeys([*found, *notes]))


def _data_limits(s: Summary) -> list[str]:
    if s.data is None:
        if any("--data" in note for note in s.notes):
            return []  # the run has said so itself
        return ["No data was given: only exact rewrites were admitted. --data would unlock trained replacements."]
    if s.data.synthetic:
        return [
            "Distilled and compared on synthetic images (--data synthetic): how the student does on real images "
            "was not measured."
        ]
    if not s.data.labelled:
        return ["The images have no labels: accuracy is not known; agreement compares the two networks' answers."]
    return []


def explain_region_data(run_folder: str | os.PathLike[str], region: str) -> dict[str, Any]:
    """Every candidate that was considered for one region, with what became of it. UsageError, naming the
    regions, if the run has no such region."""
    return explain(read_run(run_folder), region)


def explain(run: RunRecords, region: str) -> dict[str, Any]:
    """As `explain_region_data`, from records already read."""
    names = run.region_names()
    if region not in names:
        near = difflib.get_close_matches(region, names, n=1)
        listed = ", ".join(clean(n, 80) for n in names[:60]) + (f", … ({len(names)} in all)" if len(names) > 60 else "")
        start = f"did you mean {clean(near[0], 80)}? " if near else ""
        raise UsageError(
            f"this run has no region {clean(region, 80)!r}",
            where=str(run.folder),
            hint=f"{start}regions: {listed or 'none'}",
        )
    matched = next((r for r in run.regions if r.name == region), None)
    choice = next((c for c in run.summary.choices if c.region == region), None)
    rows = _candidates(run, region, choice)
    return plain_dict(
        {
            "region": asdict(matched) if matched else {"name": region, "kind": choice.kind if choice else ""},
            "choice": choice.model_dump() if choice else None,
            "covered_by": [] if choice else _covering(run, region),
            "teacher_cost_ms": teacher_costs(run).get(region),
            "counts": {s: n for s in _ORDER if (n := sum(r["status"] == s for r in rows))},
            "candidates": rows,
        }
    )


def _covering(run: RunRecords, region: str) -> list[str]:
    """Regions of the plan that share an atom with a region that has no choice of its own."""
    atoms = {r.name: set(r.atoms) for r in run.regions}
    own = atoms.get(region, set())
    return [c.region for c in run.summary.choices if own & atoms.get(c.region, set())]


def teacher_costs(run: RunRecords) -> dict[str, float]:
    """What the teacher's own operation costs in each region, in ms: its row, else the sum over the atoms of a
    span, else what the plan says. Regions of unknown cost are left out."""
    rows = run.costs.rows if run.costs else ()
    found: dict[str, float] = {}
    for r in rows:
        if is_kept(r.candidate) and r.precision != "int8":
            found[r.region] = min(r.latency_ms, found.get(r.region, r.latency_ms))
    atoms = {r.atoms[0]: found[r.name] for r in run.regions if len(r.atoms) == 1 and r.name in found}
    for region in run.regions:
        if region.name not in found and region.atoms and all(a in atoms for a in region.atoms):
            found[region.name] = sum(atoms[a] for a in region.atoms)
    for choice in run.summary.choices:
        if choice.teacher_cost_ms is not None:
            found.setdefault(choice.region, choice.teacher_cost_ms)
    return found


def _candidates(run: RunRecords, region: str, choice: ChoiceRow | None) -> list[dict[str, Any]]:
    costs = {(r.candidate, r.precision): r for r in (run.costs.rows if run.costs else ()) if r.region == region}
    scores = {(r.candidate, r.precision): r for r in run.scores if r.region == region}
    skipped = {(c, p): why for r, c, p, why in (run.costs.skipped if run.costs else ()) if r == region}
    picked = (choice.candidate, choice.precision) if choice else None
    keys = list(dict.fromkeys([*([picked] if picked else []), *costs, *scores, *skipped]))
    # "*" stands for every precision: it explains the measured ones, and has a row of its own only without them
    seen = {name for name, precision in keys if precision != "*"}
    keys = [k for k in keys if k[1] != "*" or k[0] not in seen]
    teacher = teacher_costs(run).get(region)
    why = {k: skipped.get(k, skipped.get((k[0], "*"))) for k in keys}
    rows = [_candidate(k, costs.get(k), scores.get(k), why[k], teacher, choice) for k in keys]
    scored = {r["candidate"]: r["precision"] for r in rows if r["score"] is not None}
    for row in rows:
        if row["reason"] == _NEVER_TRAINED and row["candidate"] in scored:
            row["reason"] = f"judged in {scored[row['candidate']]}, where it is faster"

    def rank(row: dict[str, Any]) -> tuple[int, float, float]:
        score, cost = row["score"], row["cost_ms"]
        return _ORDER.index(row["status"]), _or_inf(score), _or_inf(cost)

    return sorted(rows, key=rank)


def _or_inf(value: float | None) -> float:
    value = finite(value)
    return float("inf") if value is None else value


def _candidate(
    key: tuple[str, str],
    cost: CostRow | None,
    score: ScoreRow | None,
    skip_reason: str | None,
    teacher_ms: float | None,
    choice: ChoiceRow | None,
) -> dict[str, Any]:
    name, precision = key
    chosen = choice is not None and key == (choice.candidate, choice.precision)
    cost_ms = cost.latency_ms if cost else choice.cost_ms if chosen and choice else None
    value = score.score if score else choice.score if chosen and choice else None
    status, reason = "considered", ""
    if chosen:
        status = "chosen"
    elif choice is not None and choice.runner_up in (name, f"{name} {precision}"):
        status = "runner-up"
    elif score is not None and score.dropped:
        status, reason = "dropped", score.dropped
    elif skip_reason is not None:
        status, reason = "skipped", skip_reason
    elif score is None and not is_exact(name):
        status, reason = "not scored", _why_not_scored(cost_ms, teacher_ms)
    return {
        "candidate": name,
        "precision": precision,
        "family": family(name),
        "status": status,
        "reason": reason,
        "cost_ms": cost_ms,
        "cost_iqr_ms": cost.iqr_ms if cost else None,
        "cost_predicted": cost.predicted if cost else None,
        "ratio": ratio(cost_ms, teacher_ms),
        "score": value,
        "score_stderr": score.stderr if score else None,
        "accuracy_drop": score.accuracy_drop if score else None,
        "agreement": score.agreement if score else None,
        "mse": score.mse if score else None,
        "macs": cost.macs if cost else None,
        "params": cost.params if cost else None,
        "note": cost.note if cost else "",
    }


def _why_not_scored(cost_ms: float | None, teacher_ms: float | None) -> str:
    if cost_ms is not None and teacher_ms is not None and cost_ms >= teacher_ms:
        return "not faster than the teacher's own operation: never trained"
    return _NEVER_TRAINED


def inspect_run_data(run_folder: str | os.PathLike[str]) -> dict[str, Any]:
    """A run in one dict: the summary, the three networks, the choices, and what limits the figures."""
    run = read_run(run_folder)
    return plain_dict(
        {
            "run": str(run.folder),
            "summary": run.summary.model_dump(),
            "networks": summary_data(run.summary),
            "choices": choices_data(run.summary),
            "rejections": [asdict(r) for r in run.rejections],
            "limits": limits(run),
        }
    )


def diff_runs_data(run_a: str | os.PathLike[str], run_b: str | os.PathLike[str]) -> dict[str, Any]:
    """Two runs compared: settings that differ, figures with b − a, and one entry per region of either run."""
    a, b = load(run_a), load(run_b)
    settings = {
        "model": (a.model, b.model),
        "target": (a.target, b.target),
        "status": (a.status, b.status),
        "cpu": (a.device.cpu, b.device.cpu),
        "threads": (a.device.threads, b.device.threads),
        "data": (a.data.source if a.data else None, b.data.source if b.data else None),
        "seed": (a.seed, b.seed),
        "hantc_version": (a.hantc_version, b.hantc_version),
    }
    rows_a, rows_b = ({c.region: c for c in s.choices} for s in (a, b))
    pairs = [(name, rows_a.get(name), rows_b.get(name)) for name in dict.fromkeys([*rows_a, *rows_b])]
    return plain_dict(
        {
            "runs": [str(run_a), str(run_b)],
            "settings": {k: {"a": x, "b": y} for k, (x, y) in settings.items() if x != y},
            "figures": [_figure(name, x, y) for name, x, y in _figures(a, b)],
            "choices": [
                {"region": n, "a": x and x.model_dump(), "b": y and y.model_dump(), "changed": _op(x) != _op(y)}
                for n, x, y in pairs
            ],
        }
    )


def _op(choice: ChoiceRow | None) -> tuple[str, str] | None:
    return (choice.candidate, choice.precision) if choice else None


def _figure(name: str, a: float | None, b: float | None) -> dict[str, Any]:
    return {"name": name, "a": a, "b": b, "change": b - a if a is not None and b is not None else None}


def _figures(a: Summary, b: Summary) -> list[tuple[str, float | None, float | None]]:
    names = [("speedup", "speedup"), ("accuracy_drop", "accuracy_drop"), ("agreement", "agreement"),
             ("predicted_latency_ms", "predicted_latency_ms"), ("prediction_error", "prediction_error"),
             ("regions", "regions")]  # fmt: skip
    out = [(title, getattr(a, key), getattr(b, key)) for title, key in names]
    for part in ("teacher", "student"):
        for key in ("latency_ms", "accuracy", "size_bytes", "params", "macs", "activation_bytes"):
            out.append((f"{part}.{key}", getattr(getattr(a, part), key), getattr(getattr(b, part), key)))
    return out
