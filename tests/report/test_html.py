"""report.html: right figures, self-contained, escaped, sensible without data, small."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hantc.core.errors import UsageError
from hantc.report import html as html_module
from hantc.report.charts import Point, thin
from hantc.report.html import write_report

MakeRun = Callable[..., Path]
_VOID = {"meta", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Tags, ids and links of a page; checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            assert not key.startswith("on"), key
            if key == "id":
                self.ids.append(value or "")
            if key in ("href", "src", "xlink:href", "action", "srcset"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def test_the_page_has_the_figures(run_folder: Path) -> None:
    path = write_report(run_folder)
    assert path == run_folder / "report.html"
    text = Page(path.read_text()).text
    for figure in ("3.6×", "3.11 ms", "0.870 ms", "78.2 %",
                   "77.1 %", "−1.10 points", "93.1 %", "2.53 ms", "1.23×", "4.6 %",
                   "blocks.0.0", "inverted_residual", "lagrangian+highs", "10 min 12 s", "classifier.1", "7 bits",
                   "Fine-tuned for 3 epochs.", "one image could not be read", "4000 validation images"):  # fmt: skip
        assert figure in text, figure
    for choice in json.loads((run_folder / "summary.json").read_text())["choices"]:
        assert choice["candidate"] in text and choice["runner_up"] in text


def test_the_page_is_self_contained(run_folder: Path) -> None:
    html = read(run_folder)
    assert re.findall(r"https?://", html) == []
    assert not re.search(r"\bsrc\s*=|@import|url\((?!#)", html)
    page = Page(html)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)


def test_charts(run_folder: Path) -> None:
    html = read(run_folder)
    charts = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(charts) == 3 + 6  # latency, front, operations, one panel per region
    for chart in charts:
        ET.fromstring(chart)
        assert "aria-label" in chart
        assert not re.search(r"#0[0-9a-f]{5}\b", chart)  # every stand-in colour has become a variable
    assert {m for m in re.findall(r"var\(--(\w[\w-]*)\)", html)} <= set(re.findall(r"--(\w[\w-]*):", html))
    tips = re.findall(r"<title>([^<]*\(chosen\))</title>", html)
    assert any("of the teacher), score" in tip for tip in tips)


def test_the_same_run_gives_the_same_page(run_folder: Path) -> None:
    assert read(run_folder) == read(run_folder)


def test_names_are_escaped(make_run: MakeRun, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>\"' onload=x $a_b$ \x00\x1b \ud800"
    folder = make_run(tmp_path / "r", n_regions=3, n_candidates=3, model=bad, target=bad, notes=[bad], status=bad,
                      hantc_version=bad, solver={bad: bad}, timings_s={bad: 1.0},
                      ops={"teacher": {bad: 3}, "student": {}})  # fmt: skip
    for name in ("summary.json", "lut.json", "scores.json", "regions.json"):
        content = (folder / name).read_text()
        quoted = json.dumps(bad)[1:-1]
        for plain in (
            "stem",
            "blocks.0.0",
            "cb_stack_k1_w0.25",
            "classifier.1",
            "inverted_residual",
            "needs a stride of 1",
        ):
            content = content.replace(f'"{plain}"', f'"{plain}{quoted}"')
        (folder / name).write_text(content)
    html = read(folder)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "\x00" not in html and "\x1b" not in html
    page = Page(html)  # no attribute was broken open: none begins with "on"
    assert "script" not in page.tags
    assert page.text.count("alert(1)") > 8


def test_a_run_without_data(bare_run: Path) -> None:
    html = read(bare_run)
    text = Page(html).text
    assert "no data: exact rewrites only" in text
    assert "--data would unlock trained replacements" in text
    assert "needs --data" in text
    assert "not known" in text
    assert "exact rewrite" in text
    assert "None" not in text and "nan" not in text.lower().split()
    assert html.count("<svg") == 1  # latency alone: no scores, no front, no operations


def test_a_run_with_nothing_measured(make_run: MakeRun, tmp_path: Path) -> None:
    unknown = dict.fromkeys(("latency_ms", "latency_iqr_ms", "accuracy", "size_bytes", "params", "macs"))
    folder = make_run(tmp_path / "r", teacher=unknown, student=unknown, baseline_int8=None, speedup=None,
                      agreement=None, choices=[], timings_s={},
                      data={"source": "synthetic", "labelled": False, "synthetic": True})  # fmt: skip
    text = Page(read(folder)).text
    assert "was not measured" in text
    assert "synthetic data" in text
    assert "No region was selected" in text
    assert "None" not in text


def test_infinite_scores_are_left_out(run_folder: Path) -> None:
    path = run_folder / "scores.json"
    rows = json.loads(path.read_text())["rows"]
    for row in rows[::2]:
        row["score"] = float("nan") if row["score"] > 0.1 else float("inf")
    path.write_text(json.dumps({"rows": rows}))
    html = read(run_folder)
    assert "<svg" in html
    assert "NaN" not in html and "Infinity" not in html


def test_predicted_figures_are_never_called_measured(make_run: MakeRun, tmp_path: Path) -> None:
    text = Page(read(make_run(tmp_path / "r", n_regions=2, predicted=True, backend="roofline"))).text
    assert "3.6× faster on xeon, as predicted" in text
    assert "predicted, not measured" in text
    assert "nothing was timed" in text
    assert "measured side by side" not in text
    assert "roofline" in text


def test_a_slower_student_is_said_to_be_slower(make_run: MakeRun, tmp_path: Path) -> None:
    assert "1.25× slower on xeon" in read(make_run(tmp_path / "r", n_regions=2, speedup=0.8))


def test_many_regions_and_candidates_keep_the_page_small(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = html_module._MAX_PANELS
    monkeypatch.setattr(html_module, "_MAX_PANELS", 4)
    html = read(make_run(tmp_path / "r", n_regions=7, n_candidates=120))
    assert html.count("Candidates of ") == 4
    assert "3 more regions have scores" in html
    assert len(re.findall(r"70 of \d+ shown", html)) == 4
    assert len(html) / 4 * limit < 3_000_000


def test_thinning_keeps_the_choice_and_the_front() -> None:
    points = [Point(f"c{i}", "efn", "fp32", 1 - i / 500, 1.0, i / 100, i == 321, False) for i in range(300, 0, -1)]
    points += [
        Point("best", "efn", "fp32", 0.01, 0.1, 0.0, False, False),
        Point("mine", "efn", "int8", 2.0, 2.0, 9.0, True, False),
    ]
    kept = thin(points, 20)
    assert len(kept) == 20
    assert {"best", "mine"} <= {p.candidate for p in kept}
    assert thin(points, 500) == points


def test_errors_name_the_folder(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(UsageError, match="has no summary"):
        write_report(tmp_path)
    (run_folder / "front.json").write_text("nonsense")
    with pytest.raises(UsageError, match=r"front\.json"):
        write_report(run_folder)
    assert not (run_folder / "report.html").exists()
