"""A training stage learns the same when it is killed and started again, and with micro-batches of any size."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import Tiny
from training_stages import CPU, Killed, Steps, outputs, preference, run_stage, sample

from cai.training.metrics import read_metrics

LORA = {"lora": {"rank": 4}}
SETTINGS = {"train": {"num_train_epochs": 2, "learning_rate": 1e-3, "save_steps": 2}}


def rows_for(kind: str) -> list[dict[str, Any]]:
    if kind == "sft":
        return [sample(number) for number in range(20)]
    return [preference(number, p=0.6 + 0.4 * (number % 3) / 2) for number in range(22)]


@pytest.mark.parametrize(
    ("kind", "changes"), [("sft", {}), ("reward", {}), ("dpo", {}), ("dpo", LORA), ("reward", LORA)]
)
def test_a_killed_stage_ends_with_equal_bytes(kind: str, changes: dict[str, Any], tmp_path: Path, tiny: Tiny) -> None:
    settings = {**SETTINGS, **changes}
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


KILLED_SCRIPT = """
import os, sys
from pathlib import Path
import training_stages
from cai.models.reference import resolve
from test_training_invariance import SETTINGS, rows_for
class Deadly(training_stages.Steps):
    def advance(self, items=1, tokens=0):
        self.n_finished += items
        if self.n_finished == 3: os.kill(os.getpid(), 9)
folder = Path(sys.argv[2])
model = resolve(sys.argv[1], folder=folder.parent)
training_stages.run_stage('sft', folder, rows_for('sft'), model, progress=Deadly(), **SETTINGS)
"""


def test_sigkill_in_a_process_of_its_own(tmp_path: Path, tiny: Tiny) -> None:
    model = tiny("llama")
    run_stage("sft", tmp_path / "undisturbed", rows_for("sft"), model, **SETTINGS)
    folder, here = tmp_path / "killed", Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent / 'support'}"}
    command = [sys.executable, "-c", KILLED_SCRIPT, model.path, str(folder)]
    completed = subprocess.run(command, env=environment, capture_output=True)
    assert completed.returncode == -signal.SIGKILL, completed.stderr.decode()
    steps = Steps()
    run_stage("sft", folder, rows_for("sft"), model, progress=steps, **SETTINGS)
    assert steps.notes == ["resuming from checkpoint-2"]
    assert outputs(folder) == outputs(tmp_path / "undisturbed")


SAMPLES = [sample(number) for number in range(22)]
EQUAL_LABELS = [preference(number, p=0.8) for number in range(15)]
MIXED_LABELS = [preference(number, p=0.5 + 0.5 * (number % 5) / 4) for number in range(13)]


@pytest.mark.parametrize(("kind", "rows", "n_steps", "settings"), [
    ("sft", SAMPLES, 6, {}),
    ("reward", EQUAL_LABELS, 4, {}),
    ("dpo", MIXED_LABELS, 4, {}),
    ("dpo", MIXED_LABELS, 4, {"sft_weight": 0.5}),
], ids=["sft", "reward", "dpo", "dpo-sft"])  # fmt: skip
def test_micro_batches_change_neither_the_steps_nor_their_losses(
    kind: str, rows: list[Any], n_steps: int, settings: dict[str, Any], tmp_path: Path, tiny: Tiny
) -> None:
    losses = []
    for micro_batch in (1, 4, 8):
        folder = tmp_path / f"micro{micro_batch}"
        profile = CPU.model_copy(update={"micro_batch": micro_batch})
        train = {"learning_rate": 1e-3, "num_train_epochs": 2}
        run_stage(kind, folder, rows, tiny("llama"), profile=profile, train=train, **settings)
        losses.append([entry["loss"] for entry in read_metrics(folder)])
    assert len(losses[0]) == n_steps
    for other_losses in losses[1:]:
        assert losses[0] == pytest.approx(other_losses, abs=1e-4)
