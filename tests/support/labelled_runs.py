"""A run on disk whose judge and `prefer` stages are done, without having run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cai.feedback.labelled_votes import LabelRule
from cai.storage import run_folder
from cai.storage.files import write_json
from cai.storage.journal import RECORDS
from cai.storage.rows import row_lines, stable_id


def finish_stage(
    run: Path, stage_id: str, kind: str, gives: str, rows: Sequence[Mapping[str, Any]], *reads: str,
    rule: LabelRule | None = None, number: int = 0,
) -> Path:  # fmt: skip
    """Makes the folder of a finished stage, of which `number` tells several apart, and lets it stand for the stage."""
    folder = run / f"{stage_id}-{number:016x}"
    folder.mkdir(parents=True)
    (folder / RECORDS).write_text("".join(row_lines(rows)), encoding="utf-8")
    if rule:
        rule.write(folder)
    standing = {name: run_folder.finished(path) for name, path in run_folder.latest(run).items()}
    inputs = {name: {"folder": standing[name].folder.name, "digest": standing[name].digest} for name in reads}
    facts = {
        "id": stage_id, "kind": kind, "gives": gives, "inputs": inputs, "ended": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0, "failures": 0,
    }  # fmt: skip
    write_json(folder / run_folder.STAGE, facts)
    run_folder.mark_done(folder, run_folder.Outputs(stable_id(list(rows)), {}))
    run_folder.set_latest(run, stage_id, folder)
    return folder


def labelled_run(run: Path, rows: Sequence[Mapping[str, Any]], rule: LabelRule) -> Path:
    """A run with the stages `votes`, which holds the rows, and `preferences`, which holds the rule; its folder."""
    finish_stage(run, "votes", "judge", "votes", rows)
    finish_stage(run, "preferences", "prefer", "preferences", [], "votes", rule=rule)
    facts = {"recipe": "/recipes/trial.yaml", "overrides": [], "profile": "cpu", "stages": ["votes", "preferences"]}
    write_json(run / run_folder.RUN, facts)
    return run
