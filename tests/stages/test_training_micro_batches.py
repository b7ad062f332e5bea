"""Micro-batches of any size give the same optimizer steps and losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import Tiny
from training_stages import CPU, preference, run_stage, sample

from cai.training.metrics import read_metrics

SAMPLES = [sample(number) for number in range(22)]
EQUAL_LABELS = [preference(number, p=0.8) for number in range(15)]
MIXED_LABELS = [preference(number, p=0.5 + 0.5 * (number % 5) / 4) for number in range(13)]


@pytest.mark.parametrize(
    ("kind", "rows", "n_steps", "settings"),
    [
        ("sft", SAMPLES, 6, {}),
        ("reward", EQUAL_LABELS, 4, {}),
        ("dpo", MIXED_LABELS, 4, {}),
        ("dpo", MIXED_LABELS, 4, {"sft_weight": 0.5}),
    ],
    ids=["sft", "reward", "dpo", "dpo-sft"],
)
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
