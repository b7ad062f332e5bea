"""A training stage that is killed and started again ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import Tiny
from training_stages import Killed, Steps, outputs, preference, run_stage, sample


def rows_for(kind: str) -> list[dict[str, Any]]:
    if kind == "sft":
        return [sample(number) for number in range(20)]
    return [preference(number, p=0.6 + 0.4 * (number % 3) / 2) for number in range(22)]


def settings_for(kind: str) -> dict[str, Any]:
    return {"train": {"num_train_epochs": 2, "learning_rate": 1e-3, "save_steps": 2}}


@pytest.mark.parametrize(("kind", "changes"), [("sft", {}), ("reward", {}), ("dpo", {}), ("dpo", {"lora": {"rank": 4}}),
                                            ("reward", {"lora": {"rank": 4}})])  # fmt: skip
def test_killed_and_started_again_a_stage_ends_with_the_same_bytes(
    kind: str, changes: dict[str, Any], tmp_path: Path, tiny: Tiny
) -> None:
    settings = {**settings_for(kind), **changes}
    undisturbed = run_stage(kind, tmp_path / "undisturbed", rows_for(kind), tiny("llama"), **settings)
    for die_at in (5, 1):  # in the second epoch, one step after a resume point; then before there is any
        folder = tmp_path / f"killed{die_at}"
        with pytest.raises(Killed):
            run_stage(kind, folder, rows_for(kind), tiny("llama"), progress=Steps(die_at), **settings)
        steps = Steps()
        figures = run_stage(kind, folder, rows_for(kind), tiny("llama"), progress=steps, **settings)
        assert steps.notes == (["resuming from checkpoint-4"] if die_at == 5 else [])
        assert outputs(folder) == outputs(tmp_path / "undisturbed")
        assert len(outputs(folder)) >= 2
        assert figures == undisturbed


def test_sigkill_in_a_process_of_its_own(tmp_path: Path, tiny: Tiny) -> None:
    model = tiny("llama")
    run_stage("sft", tmp_path / "undisturbed", rows_for("sft"), model, **settings_for("sft"))
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "import training_stages; from test_training_resumes import rows_for, settings_for\n"
        "from cai.models.reference import resolve\n"
        "class Deadly(training_stages.Steps):\n"
        "    def advance(self, items=1, tokens=0):\n"
        "        self.n_finished += items\n"
        "        if self.n_finished == 3: os.kill(os.getpid(), 9)\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "folder = Path(sys.argv[3])\n"
        "training_stages.run_stage('sft', folder, rows_for('sft'), resolve(sys.argv[2], folder=folder.parent),\n"
        "                          progress=Deadly(), **settings_for('sft'))\n"
    )
    here = Path(__file__).parent
    support = here.parent / "support"
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{support}"}
    folder = tmp_path / "killed"
    completed = subprocess.run(
        [sys.executable, "-c", script, str(support), model.path, str(folder)], env=environment, capture_output=True
    )
    assert completed.returncode == -signal.SIGKILL, completed.stderr.decode()
    steps = Steps()
    run_stage("sft", folder, rows_for("sft"), model, progress=steps, **settings_for("sft"))
    assert steps.notes == ["resuming from checkpoint-2"]
    assert outputs(folder) == outputs(tmp_path / "undisturbed")
