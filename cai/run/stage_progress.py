"""How far a stage is that runs or was interrupted, from what lies in its folder: items in its journal, or steps."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from cai.storage import run_folder, stage_folders
from cai.storage.files import read_json
from cai.storage.journal import count_items
from cai.training.step_count import StepCount

FINISHED_BEFORE = "finished_before"
"""Key of stage.json: items that were on disk when the stage began in this process."""


class StageProgress(NamedTuple):
    """What of a stage is finished, counted in its unit, and since when."""

    finished: int
    total: int
    unit: str
    """What is counted: steps of training, or what a feedback stage calls its items."""
    kept: int
    """As many as an interruption leaves."""
    finished_before: int
    """Those that this process has not computed."""
    began: float
    """When this process began with the others, in seconds since the epoch."""

    @property
    def share(self) -> float:
        """Finished part of the stage, from 0 to 1."""
        return self.finished / self.total if self.total else 1.0

    def seconds_left(self) -> float | None:
        """Estimated from the speed of this process so far; None before it has finished anything."""
        finished_here = self.finished - self.finished_before
        if finished_here <= 0:
            return None
        return max(time.time() - self.began, 0.0) / finished_here * (self.total - self.finished)


def stage_progress(folder: Path) -> StageProgress | None:
    """The progress of an unfinished stage; None where nothing is counted yet, while a model is loaded for example."""
    if steps := StepCount.read(folder):
        kept = steps.in_resume_point
        if steps.began < stage_folders.began(folder):  # an earlier process's: this one still loads what it trains
            return StageProgress(kept, steps.total, "steps", kept, kept, time.time())
        finished = steps.finished(folder)
        return StageProgress(finished, steps.total, "steps", kept, steps.finished_before, steps.began)
    if count := count_items(folder):
        facts = read_json(folder / run_folder.STAGE)
        began = datetime.fromisoformat(facts["began"]).timestamp()
        before = max(facts.get(FINISHED_BEFORE, 0), count.n_known)  # neither was computed by this process
        return StageProgress(count.n_finished, count.n_items, count.unit, count.n_finished, before, began)
    return None
