"""The demo, shortened: every method, every arm, the table, the picture and the pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from dodistill.commands import demo as module


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_runs_and_every_plain_student_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "ARMS", {"plain": "none", "+strat.": "stratified"})
    cells = module.demo(tmp_path, steps=120)
    assert len(cells) == 6
    for cell in cells:
        assert cell["last"] > 30, cell["label"]  # ten classes: chance is 10
    for page in ("compare.html", "samples.png", "teacher.safetensors", "fast-none/report.html"):
        assert (tmp_path / page).exists()
    said = capsys.readouterr().out
    for name in module.SOURCES:
        assert name in said
