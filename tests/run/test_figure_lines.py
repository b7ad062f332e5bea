"""The figures at the end of a run and of `cai status`: an accuracy that chance would reach is called that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from cai.cli import main
from cai.run.status import figure_lines
from cai.storage import run_folder


def figure(value: float | None, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "n": 39, "topics": 39, "interval": [low, high]}


SUMMARY = {
    "gate": {"gate": {"accuracy": 20 / 39, "interval": [0.36, 0.66]}},
    "labels": {"accuracy": figure(0.46, 0.21, 0.73), "longer_wins": figure(0.5, 0.4, 0.6)},
    "reward": {"accuracy": figure(0.48, 0.37, 0.59), "label_accuracy": figure(0.9, 0.8, 0.95)},
}


def test_accuracies_that_chance_would_reach_are_called_that() -> None:
    assert figure_lines(SUMMARY) == [
        "gate accuracy          0.51 [0.36, 0.66], not distinguishable from chance",
        "labels accuracy        0.46 [0.21, 0.73], not distinguishable from chance",
        "labels longer wins     0.50 [0.40, 0.60]",
        "reward accuracy        0.48 [0.37, 0.59], not distinguishable from chance",
        "reward label accuracy  0.90 [0.80, 0.95]",
    ]


def test_an_accuracy_below_chance_and_one_that_is_missing() -> None:
    worse, missing = figure(0.2, 0.1, 0.3), figure(None, 0.0, 1.0)
    lines = figure_lines({"labels": {"accuracy": worse, "agreement_with_people": missing}})
    assert lines == [
        "labels accuracy               0.20 [0.10, 0.30], worse than chance",
        "labels agreement with people  -",
    ]


def test_status_shows_them_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / run_folder.RUN).write_text('{"stages": []}')
    (tmp_path / "run" / run_folder.SUMMARY).write_text(json.dumps(SUMMARY))
    result = CliRunner().invoke(main, ["status", "run", "--runs", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "\n".join(figure_lines(SUMMARY)) in result.stdout
