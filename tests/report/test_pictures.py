"""Training curves: what was logged is drawn, and what was not leaves no empty panel."""

from __future__ import annotations

import json
from pathlib import Path

from cai.report.pictures import draw_training_curves

PANELS = {"reward": {"reward/a": "first", "reward/b": "second"}, "KL, nats": {"kl": "KL"}}


def drawn(folder: Path, rows: list[dict[str, object]]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = draw_training_curves(folder, PANELS)
    return "" if path is None else path.read_text()


def test_every_metric_that_was_logged_has_a_line_and_equal_runs_equal_bytes(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"step": step, "reward/a": step, "reward/b": -step, "kl": None} for step in (1, 2)]
    two_lines = drawn(tmp_path, rows)
    one_line = drawn(tmp_path, [{"step": row["step"], "reward/a": row["reward/a"]} for row in rows])
    assert two_lines == drawn(tmp_path, rows)
    assert two_lines.count("<path") > one_line.count("<path")
    assert two_lines.count('id="axes_') == 1, "KL was never logged"
    assert drawn(tmp_path, [{**row, "kl": 0.5} for row in rows]).count('id="axes_') == 2


def test_a_run_that_logged_none_of_it_has_no_picture(tmp_path: Path) -> None:
    assert drawn(tmp_path, [{"step": 1, "loss": 2.0}]) == ""
    assert not (tmp_path / "curves.svg").exists()
