"""The page of a grid: curves with their spread, differences, links, the recipe; and its tables as CSV and LaTeX."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dodistill.report import arms
from dodistill.report.compare_page import write_compare
from dodistill.report.paired import first_arm, paired
from dodistill.report.table_files import csv_table, latex, latex_tables, paired_csv
from dodistill.report.tables import footnote, group, markdown_table
from helpers import assert_offline


def records(
    folder: Path | None = None, arms: tuple[str, ...] = ("plain", "kdci"), seeds: int = 3
) -> list[dict[str, Any]]:
    """Runs of two sources; kdci is 2 points better in seed 0, 3 in seed 1, 4 in seed 2."""
    found = []
    for source in ("fast", "dfnd"):
        for arm in arms:
            for seed in range(seeds):
                last = 70.0 + seed + (2 + seed if arm == "kdci" else 0)
                run = f"runs/{source}-{arm}-{seed}"
                found.append({
                    "label": {"source": source, "arm": arm, "seed": str(seed)}, "last": last, "agreement": 90.0,
                    "seconds": 60.0, "teacher": 95.0, "folder": run,
                })  # fmt: skip
                if folder is not None:
                    (folder / run).mkdir(parents=True)
                    lines = [{"kind": "eval", "step": s, "test": last - 30 + s / 10, "agreement": 80.0 + seed}
                             for s in (100, 200, 300)]  # fmt: skip
                    (folder / run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
                    if seed < 2:
                        (folder / run / "report.html").write_text("a report")
    return found


def test_the_page_has_all_parts(tmp_path: Path) -> None:
    recipe = "name: x\nbase: {a: <b>}\n"
    page = write_compare(records(tmp_path), tmp_path / "compare.html", "grid", recipe=recipe)
    text = page.read_text()
    assert_offline(text)
    for piece in (
        "Test accuracy during training", "one standard deviation to each side", "Difference from plain",
        "+3.00 ± 1.00", "+2.00, +3.00, +4.00", 'href="runs/fast-plain-0/report.html"', "base: {a: &lt;b&gt;}",
    ):  # fmt: skip
        assert piece in text, piece
    assert "runs/fast-plain-2/report.html" not in text  # it has none
    assert "best on test" not in text
    assert text.count('<svg class="plot"') == 8  # two panels of each of two curves and two measures
    assert text.count('class="band"') == 8
    assert text.count("teacher 95 %") == 6  # in the legend, the name and the title of each panel of the test accuracy
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"compare-curve-test-fast.pdf", "compare-curve-agreement-dfnd.pdf"} <= names


def test_a_grid_without_test_set_runs_or_seeds(tmp_path: Path) -> None:
    cells = [{**c, "last": None, "teacher": None, "agreement": 80.0 + i} for i, c in enumerate(records(seeds=1))]
    text = write_compare(cells, tmp_path / "compare.html", pdf=False).read_text()
    assert_offline(text)
    table = text[text.index("<table>") : text.index("</table>")]
    assert "last epoch" not in table
    assert "±" not in text
    assert "Agreement of each arm minus plain" in text
    assert "report of seed" not in text
    assert "during training" not in text
    one = write_compare(records(arms=("plain",), seeds=1)[:1], tmp_path / "one.html", pdf=False).read_text()
    assert "Difference from" not in one


def test_links_of_odd_names_stay_links(tmp_path: Path) -> None:
    (cell,) = records(seeds=1)[:1]
    odd = 'runs/a b"><script>-%41'
    (tmp_path / odd).mkdir(parents=True)
    (tmp_path / odd / "report.html").write_text("x")
    text = write_compare([{**cell, "folder": odd}], tmp_path / "compare.html", pdf=False).read_text()
    assert_offline(text)
    assert "runs/a%20b%22%3E%3Cscript%3E-%2541/report.html" in text


def test_curves_are_the_mean_and_spread_of_the_seeds(tmp_path: Path) -> None:
    row = group(records(tmp_path)).rows[1]
    found = arms.series("kdci", arms.evaluations(row, tmp_path), "test")
    assert found is not None
    assert list(found.x) == [100, 200, 300]
    assert found.y[0] == pytest.approx(54.0)  # of 52, 54, 56
    assert found.spread[0] == pytest.approx(2.0)
    few = arms.series(
        "kdci", [[{"step": 1, "test": 3.0}, {"step": 2, "test": 4.0}], [{"step": 2, "test": 6.0}]], "test"
    )
    assert few is not None
    assert (list(few.x), list(few.y)) == ([2], [5.0])  # only where every seed was evaluated
    alone = arms.series("kdci", [[{"step": 1, "test": 3.0}]], "test")
    assert alone is not None
    assert not alone.spread
    assert arms.series("kdci", [], "test") is None
    assert arms.teacher(group(records()).rows) == ("teacher", 95.0)
    assert arms.teacher(group([*records(), {**records()[0], "teacher": 90.0}]).rows) is None


def test_more_arms_than_colours_are_several_figures(tmp_path: Path) -> None:
    found = group(records(tmp_path, tuple(f"arm {k}" for k in range(14)), seeds=1))
    figures = arms.figures([("", found.rows[:14], ["arm"])], tmp_path)
    assert [f.title.strip() for f in figures[0][1]] == ["(1 to 6 of 14)", "(7 to 12 of 14)", "(13 to 14 of 14)"]


def test_the_first_arm() -> None:
    assert first_arm(records()) == {"arm": "plain"}
    assert first_arm(records(arms=("plain",))) == {"source": "fast"}
    assert first_arm(records(arms=("plain",), seeds=2)[:2]) == first_arm([]) == {}


def test_csv() -> None:
    found = list(csv.reader(io.StringIO(csv_table(group(records())))))
    assert found[0] == ["source", "arm", "last epoch", "last epoch sd", "agreement", "agreement sd", "time", "time sd",
                        "n", "older code"]  # fmt: skip
    assert found[1][:4] == ["fast", "plain", "71.0", "1.0"]
    assert found[1][-2:] == ["3", "no"]
    one = list(csv.reader(io.StringIO(csv_table(group(records(seeds=1))))))
    assert one[1][2:4] == ["70.0", ""]  # no deviation of one seed
    pairs = list(csv.reader(io.StringIO(paired_csv(paired(records())))))
    head = [
        "source",
        "arm",
        "last epoch, minus plain",
        "last epoch, minus plain, sd",
        "n",
        "seed 0",
        "seed 1",
        "seed 2",
    ]
    assert pairs[0] == head
    assert pairs[1] == ["fast", "kdci", "3.0", "1.0", "3", "2.0", "3.0", "4.0"]


def test_latex() -> None:
    assert latex("a_b & 5 % ± {x} \\ – ~") == (
        r"a\_b \& 5 \% $\pm$ \{x\} \textbackslash{} -- \textasciitilde{}"
    )  # fmt: skip
    text = latex_tables(group(records()), paired(records()))
    assert text.count(r"\toprule") == text.count(r"\midrule") - 2 == text.count(r"\bottomrule") == 2
    assert r"\begin{tabular}{llrrrr}" in text
    assert r"fast & plain & 71.00 $\pm$ 1.00 & 90.00 $\pm$ 0.00 & 1 min 00 s & 3 \\" in text
    assert r"fast & kdci & +3.00 $\pm$ 1.00 & 3 \\" in text
    assert text.startswith(r"% \usepackage{booktabs}")
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert not re.search(r"(?<!\\)[%#_]", "\n".join(body))


def test_latex_lines_that_begin_as_an_argument() -> None:
    """The line's end before them would take [0.4] as a length, and * as its own."""
    rows = [r | {"label": {"lr": "[0.4]" if r["last"] > 71 else "*", "seed": "0"}} for r in records()]
    text = latex_tables(group(rows))
    assert "\n{}[0.4] & " in text
    assert "\n{}* & " in text


def test_the_page_holds_its_tables(tmp_path: Path) -> None:
    text = write_compare(records(), tmp_path / "compare.html", pdf=False).read_text()
    held = {name: base64.b64decode(data).decode() for name, data in
            re.findall(r'download="([^"]+)" href="data:text/plain;base64,([^"]*)"', text)}  # fmt: skip
    assert held == {
        "compare.csv": csv_table(group(records())), "compare-paired.csv": paired_csv(paired(records())),
        "compare.tex": latex_tables(group(records()), paired(records())),
    }  # fmt: skip


def test_the_footnote_is_about_what_is_there() -> None:
    assert footnote(group(records())) == (
        "Mean ± standard deviation over the seeds. Agreement: with the teacher, on held-back substitution data."
    )
    assert "chosen on the test set" in footnote(group([{**c, "best": 90.0} for c in records()]))
    assert "±" not in footnote(group(records(seeds=1)))
    assert "best on test" not in markdown_table(records())
    told = [("bf16: measured 1.21 times as fast", "AMD EPYC (AVX512), 1 thread(s)"), ("fp32, as set", "NVIDIA H100")]
    mixed = [
        {**c, "summary": {"precision": p, "machine": m}} for c, (p, m) in zip(records(), [told[0], *11 * [told[1]]])
    ]
    assert footnote(group(mixed)).endswith(
        "The runs differ in precision (1 bf16, 11 fp32) and machine (1 AMD EPYC (AVX512), 11 NVIDIA H100): a "
        "difference of rows may come from that."
    )
    assert "differ" not in footnote(group(mixed[1:]))
