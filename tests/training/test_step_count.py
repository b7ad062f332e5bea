"""A stage that trains leaves in its folder how many steps there are and how many a resume point holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import Tiny
from training_stages import Killed, Steps, run_stage, sample

from cai.training.step_count import FILE, StepCount


def test_a_killed_stage_leaves_its_steps_and_a_finished_one_does_not(tmp_path: Path, tiny: Tiny) -> None:
    folder, rows = tmp_path / "stage", [sample(number) for number in range(16)]
    train = {"num_train_epochs": 3, "save_steps": 2}

    def count(die_at: int) -> tuple[int, int, int, int]:
        with pytest.raises(Killed):
            run_stage("sft", folder, rows, tiny("llama"), train=train, progress=Steps(die_at=die_at))
        steps = StepCount.read(folder)
        assert steps is not None
        return steps.total, steps.finished_before, steps.in_resume_point, steps.finished(folder)

    assert count(die_at=1) == (6, 0, 0, 0)
    assert count(die_at=4) == (6, 0, 2, 3)
    assert count(die_at=5) == (6, 2, 4, 4)
    run_stage("sft", folder, rows, tiny("llama"), train=train)
    assert not (folder / FILE).exists()
