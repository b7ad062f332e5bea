"""How many optimizer steps a stage has taken, in its folder while it trains. This module does not import torch."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from cai.storage.files import read_json, write_json
from cai.training.metrics import read_metrics

FILE = "steps.json"
"""File in a training stage's folder, from its first step until its model is there."""


@dataclass(frozen=True)
class StepCount:
    """Optimizer steps of a stage that trains or was interrupted."""

    total: int
    finished_before: int = 0
    """Steps of earlier processes, which this process went on from."""
    in_resume_point: int = 0
    """Steps that the newest resume point holds: what an interruption leaves."""
    began: float = field(default_factory=time.time)
    """When the first step of this process began, in seconds since the epoch."""

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The count of the stage in `folder`; None before its first step and after its last."""
        fields = read_json(folder / FILE)
        return None if fields is None else cls(**fields)

    def write(self, folder: Path) -> None:
        """Writes it into a stage's folder."""
        write_json(folder / FILE, asdict(self))

    def finished(self, folder: Path) -> int:
        """Steps that the process at work has finished and logged, and those before it."""
        logged = [int(entry["step"]) for entry in read_metrics(folder)[-1:]]
        return max([self.finished_before, *logged])


def record_resume_point(folder: Path, step: int) -> None:
    """Records that the stage in `folder` has a resume point after this step."""
    if count := StepCount.read(folder):
        replace(count, in_resume_point=step).write(folder)


def remove_step_count(folder: Path) -> None:
    """Removes the file: the number of steps is part of the figures of a stage that is done."""
    (folder / FILE).unlink(missing_ok=True)
