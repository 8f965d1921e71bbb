"""The report: offline, escaped, whole where pieces are missing, and right in its arithmetic."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from dodistill.commands.cell import record_of_summary
from dodistill.errors import DodistillError
from dodistill.report.card import model_card, usage
from dodistill.report.compare_page import write_compare
from dodistill.report.format import count, duration, number, percent
from dodistill.report.images import save_grid
from dodistill.report.paired import paired_table
from dodistill.report.report import write_report
from dodistill.report.shares import advice, shares
from dodistill.report.tables import markdown_table
from helpers import assert_offline

CONFIG: dict[str, Any] = {
    "teacher": {"spec": "wrn40_2", "weights": "teacher.safetensors"},
    "student": {"spec": "wrn16_1", "weights": ""},
    "source": {"name": "fast", "K": 10},
    "intervention": "kdci",
    "kdci": {"scale": 1.0},
    "loop": {"steps": 400, "batch": 64, "seed": 3},
}
SUMMARY: dict[str, Any] = {
    "teacher_accuracy": 94.87,
    "student_accuracy": 86.42,
    "best_on_test": 87.1,
    "delivered_accuracy": 87.02,
    "agreement": 91.9,
    "delivered": "ema",
    "student_parameters": 175066,
    "teacher_parameters": 2243546,
    "seconds": 1268.0,
    "acquire_seconds": 810.0,
    "match_seconds": 440.0,
    "images": 25600,
    "steps": 400,
    "peak_memory_mb": 900.0,
    "command": "dodistill distill --source fast --intervention kdci --out runs/a",
    "versions": {"torch": "2.8.0"},
    "machine": "2 CPU cores",
    "warnings": [],
}


def lines(shares_: list[float], test: bool = True) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for step in range(20, 401, 20):
        out.append(
            {"kind": "log", "step": step, "seconds": step / 10, "rate": 300.0, "lr": 0.1, "loss": 2 / step}
            | {"match/kl": 2 / step, "source/ce": 0.3, "source/bn": 40 / step, "kdci/F_over_S": 0.003}
            | {"kdci/attention_entropy": 1.9, "kdci/agreement_with_F": 0.5, "kdci/agreement": 0.6}
        )
        if step % 100 == 0:
            out.append(
                {"kind": "eval", "step": step, "agreement": 80.0, "agreement_ema": 82.0}
                | ({"test": 70.0 + step / 100, "test_ema": 75.0} if test else {})
            )
            out.append({"kind": "pool", "step": step, "size": step, "class_shares": shares_, "drawn_shares": shares_})
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(CONFIG))
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines([0.1] * 10))))
    (run / "dictionary.json").write_text(json.dumps({"P": [0.5, 0.5, 0.0], "Z": [[1.0, -2.0]] * 3}))
    save_grid(torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8), run / "samples.png")
    return run


def test_whole_report(folder: Path) -> None:
    text = write_report(folder).read_text()
    assert_offline(text)
    names = {path.name for path in (folder / "figures").iterdir()}
    assert {"report-test-accuracy.pdf", "report-class-shares.pdf", "report-dictionary-Z.pdf"} <= names
    assert len(names) == text.count('<svg class="plot"')
    assert len(ids := re.findall(r' id="([^"]*)"', text)) == len(set(ids))
    for piece in (
        "86.42 %",
        "94.87 %",
        "87.02 %",
        "91.90 %",
        "12.8×",
        "21 min 08 s",
        "175,066",
        "2 CPU cores",
        "torch 2.8.0",
    ):
        assert piece in text
    for piece in ("last epoch", "best on test (selection on the test set; as the literature reports)", "load_model"):
        assert piece in text
    assert SUMMARY["command"] in re.sub(r"</?span[^>]*>", "", text)
    assert "hardly changed the loss" in text
    assert "1 empty" in text
    assert "with F 50 %" in text  # a fraction in the log, a percentage on the page
    assert not list(folder.glob("*.part"))


def test_what_the_user_wrote_is_escaped(folder: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=y>"
    config = {**CONFIG, "teacher": {"spec": evil}, evil: {evil: evil}, "intervention": evil}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps({**SUMMARY, "warnings": [evil], "command": evil, "machine": evil}))
    record = {"kind": "log", "step": 1, f"match/{evil}": 1.0, f"match/b{evil}": 1.0, evil: 3.0}
    (folder / "metrics.jsonl").write_text(json.dumps(record))
    text = write_report(folder, pdf=False).read_text()
    assert_offline(text)
    assert "&lt;script&gt;alert(1)" in text


@pytest.mark.parametrize("gone", ["config.json", "summary.json", "metrics.jsonl", "dictionary.json", "samples.png"])
def test_each_piece_may_be_missing_or_torn(folder: Path, gone: str) -> None:
    whole = (folder / gone).read_bytes()
    (folder / gone).write_bytes(whole[: len(whole) // 2])
    assert_offline(write_report(folder, pdf=False).read_text())
    (folder / gone).unlink()
    assert_offline(write_report(folder, pdf=False).read_text())


def test_interrupted_run_says_so(folder: Path) -> None:
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines([0.1] * 10, test=False))) + '\n{"kind": "lo')
    text = write_report(folder, pdf=False).read_text()
    assert "This run is not finished" in text
    assert "step 400 of 400" in text
    assert "no test set was given" in text
    assert "Test accuracy, last epoch" not in text
    assert "82.00 %" in text


def test_odd_metrics_do_not_break_it(folder: Path) -> None:
    odd = ["", "[]", "7", '{"kind": "log"}', '{"kind": "log", "step": 1, "loss": NaN}', '{"kind": "other", "step": 1}']
    odd += ['{"kind": "eval", "step": 5, "agreement": null}', '{"kind": "pool", "step": 5, "class_shares": [0, 0]}']
    (folder / "metrics.jsonl").write_text("\n".join(odd))
    (folder / "dictionary.json").write_text('{"P": [], "Z": [[1], [1, 2]]}')
    assert_offline(write_report(folder, pdf=False).read_text())


def test_no_run_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DodistillError, match="holds no run"):
        write_report(tmp_path)
    with pytest.raises(DodistillError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_shares() -> None:
    even = shares([2, 2, 2, 2])
    assert even is not None
    assert (even.ratio, even.missing, even.skewed) == (1.0, [], False)
    assert even.effective == pytest.approx(4)
    one = shares([1.0, 0.0])
    assert one is not None
    assert (one.ratio, one.missing, one.effective) == (math.inf, [1], 1.0)
    assert shares([]) is shares([0.0, 0.0]) is shares(None) is shares("abc") is None


def test_advice_on_skew_names_the_knob() -> None:
    skewed, even = shares([0.9, 0.05, 0.05]), shares([1, 1, 1])
    assert advice(None, None, "none") == ("quiet", [])
    assert advice(even, even, "none")[0] == "good"
    tone, says = advice(skewed, skewed, "none")
    assert tone == "warn"
    assert "class 0 was drawn 18 times as often as class 1" in says[0]
    assert "`--intervention stratified`" in says[1]
    assert "`--intervention kdci+stratified`" in advice(skewed, None, "kdci")[1][1]
    assert "--intervention" not in " ".join(advice(skewed, skewed, "stratified")[1])
    assert "but the draw is balanced" in advice(skewed, even, "stratified")[1][0]
    assert "Class 2 never appears" in advice(shares([1, 1, 0]), None, "none")[1][0]


CELLS: list[dict[str, Any]] = [
    {"label": {"source": s, "intervention": i, "seed": seed, "pair": "a|b"}, "last": last + seed, "best": last + 2}
    | {"agreement": 90.0, "seconds": 60.0 + seed, "published": 88.0 if i == "none" else None}
    for s, i, last in (("fast", "none", 80.0), ("fast", "kdci", 81.5), ("dfnd", "none", 70.0))
    for seed in range(3)
]


def test_markdown_table_means_and_sds() -> None:
    table = markdown_table(CELLS).splitlines()
    head = [c.strip() for c in table[0].strip("|").split("|")]
    assert head[:2] == ["source", "intervention"]
    assert head[2:] == ["last epoch", "best on test*", "published", "agreement", "time", "n"]
    row = [c.strip() for c in table[2].strip("|").split("|")]
    values = [80.0, 81.0, 82.0]
    mean_sd = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    assert row == ["fast", "none", mean_sd, "82.00 ± 0.00", "88.00", "90.00 ± 0.00", "1 min 01 s", "3"]
    assert "In all rows: pair a\\|b." in table
    assert len({len(line) for line in table[:5]}) == 1


def test_changes_are_paired_by_seed() -> None:
    cells = [
        c | {"last": c["last"] + (c["label"]["seed"] if c["label"]["intervention"] == "kdci" else 0)} for c in CELLS
    ]
    lines = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in paired_table(cells, {"intervention": "none"}).splitlines()
    ]
    assert lines[0] == ["source", "intervention", "last epoch, minus none", "by seed", "n"]
    assert lines[2:] == [["fast", "kdci", "+2.50 ± 1.00", "+1.50, +2.50, +3.50", "3"]]
    del cells[3]["last"]  # a pair that is not complete is left out
    assert "+3.00 ± 0.71" in paired_table(cells, {"intervention": "none"})
    assert paired_table(CELLS[:3], {"intervention": "none"}) == "No pair is complete yet."
    with pytest.raises(ValueError, match="no cell has intervention=plain; the values are none, kdci"):
        paired_table(CELLS, {"intervention": "plain"})


def test_changes_against_an_arm_of_two_axes_and_of_what_was_logged() -> None:
    arms = [("none", "plain", 50.0, 9.0), ("bank", "replay", 60.0, 4.0), ("bank", "exact", 61.0, None)]
    cells = [
        {
            "label": {"seed": seed, "replay": replay, "update": update}, "last": last + seed * (replay == "bank"),
            "agreement": 1.0, "summary": {"log": {} if variance is None else {"late/test/variance": variance}},
        }
        for seed in (0, 1) for replay, update, last, variance in arms
    ]  # fmt: skip
    table = paired_table(cells, {"replay": "none", "update": "plain"}, ["late/test/variance"])
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    assert lines[0] == [
        "replay", "update", "last epoch, minus none, plain", "by seed", "late/test/variance, minus none, plain", "n",
    ]  # fmt: skip
    assert lines[2:] == [
        ["bank", "replay", "+10.50 ± 0.71", "+10.00, +11.00", "-5.00 ± 0.00", "2"],
        ["bank", "exact", "+11.50 ± 0.71", "+11.00, +12.00", "–", "2"],
    ]


def test_a_class_without_images_is_named() -> None:
    """Its ratio is bounded by half an image, and means nothing. Of very many images, a share of 0 may be rounded."""

    def of(least: float, images: int) -> dict[str, Any]:
        return record_of_summary({"seed": str(images)}, {
            "class_shares": [1 - least, least], "images": images, "agreement": 90.0, "seconds": 1.0,
        }) | {"config": {"pool": {"capacity": 300_000}}}  # fmt: skip

    table = markdown_table([of(0.0, 1000), of(0.25, 1000)])
    assert "class missing |" in table
    assert "Class missing: in a run, the teacher assigns no image to some class." in table
    for cells in ([of(0.25, 1000)], [of(0.0, 250_000)]):
        assert "missing" not in markdown_table(cells)
        assert ":1 |" in markdown_table(cells)


def test_what_was_logged_at_the_end_can_be_shown() -> None:
    cells = [c | {"summary": {"log": {"kdci/F_over_S": 0.25 + 0.05 * c["label"]["seed"]}}} for c in CELLS[:3]]
    table = markdown_table(cells, ["kdci/F_over_S", "kdci/never"])
    assert "0.3 ± 0.05" in table
    assert "kdci/never" in table


def test_markdown_table_of_unfinished_single_and_no_cells() -> None:
    cells = [*CELLS[:2], {"label": {**CELLS[2]["label"]}, "last": None}]
    assert "2 of 3" in markdown_table(cells)
    assert "80.50 ± 0.71" in markdown_table(cells)
    assert "| 80.00 |" in re.sub(" +", " ", markdown_table(CELLS[:1]))
    assert markdown_table([]) == "No runs yet."
    assert "–" in markdown_table([{"label": {"source": "fast", "seed": 0}}])


def test_compare_page(tmp_path: Path) -> None:
    evil = "<script>x</script>"
    cells = [*CELLS, {"label": {"source": evil, "intervention": evil, "seed": 0, "pair": "a|b"}, "last": 50.0}]
    text = write_compare(cells, tmp_path / "new" / "compare.html", title=evil).read_text()
    assert_offline(text)
    assert "81.00 ± 1.00" in text
    published = re.findall(r"published", text)
    assert len(published) >= 2  # a column of the table, and a mark in the figure
    assert text.count('<svg class="plot"') == len(list((tmp_path / "new" / "figures").iterdir())) > 0
    assert "&lt;script&gt;" in text
    assert "No runs yet" in write_compare([], tmp_path / "none.html").read_text()


def test_model_card() -> None:
    text = model_card(CONFIG, SUMMARY)
    for piece in (
        "`wrn16_1` distilled from `wrn40_2`",
        "86.42 %",
        "selection on the test set",
        "None of the teacher's",
    ):
        assert piece in text
    assert SUMMARY["command"] in text
    assert 'load_model("student.safetensors")' in text
    assert "inherit its terms" in text
    bare = model_card({}, {})
    assert "accuracy of this model is not known" in bare
    assert "No values were measured" in bare
    assert "`Net` distilled from `the teacher`" in model_card({"student": {"spec": ""}}, {"student_name": "Net"})
    tricky = model_card({"teacher": {"spec": "a`b\n# c"}}, {"command": "x ``` y", "warnings": ["<b>"]})
    assert "``a`b # c``" in tricky
    assert "````sh\nx ``` y\n````" in tricky


def test_the_printed_command_is_quoted() -> None:
    assert usage("my runs/a b")[1] == "dodistill evaluate 'my runs/a b/student.safetensors' --test path/to/test"
    named = usage("my runs", spec="my nets/net.py:make")[1]
    assert named.startswith("dodistill evaluate 'my nets/net.py:make' --weights 'my runs/student.safetensors' --test ")


def test_numbers() -> None:
    assert [number(v) for v in (0.12345, 12345.6, 1e-7, math.nan, None, True, 0)] == (
        ["0.1235", "12346", "1.00e-07", "–", "–", "–", "0"]
    )
    assert [duration(v) for v in (0.05, 59.6, 228, 7322, None)] == [
        "0.1 s",
        "1 min 00 s",
        "3 min 48 s",
        "2 h 02 min",
        "–",
    ]
    assert (count(175066), percent(91.234), percent(None)) == ("175,066", "91.23 %", "–")
