"""One process with what GPU profiles set learns what the tuning for CPUs does, and continues as if undisturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu_paths
import pytest
from rank_pair import reinforced
from tiny_models import Tiny
from training_stages import CPU, Killed, Steps, outputs, preference, run_stage, sample

from cai.attention import cpu_tuning
from cai.training.metrics import read_metrics

GPU = CPU.model_copy(update=gpu_paths.GPU_SETTINGS)
ADAPTER = {"lora": {"rank": 4}}


def run(kind: str, folder: Path, model: Any, profile: Any, changes: dict[str, Any], die_at: int | None = None) -> None:
    train = {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    progress = Steps(die_at=die_at)
    if kind in {"ppo", "rloo"}:
        folder.mkdir(exist_ok=True)
        size: dict[str, Any] = {"rollouts": 2, "rollout_size": 16} if kind == "ppo" else {"n": 2}
        reinforced(kind, folder, model, profile, progress, {**size, "train": train, **changes})
        return
    rows = [sample(n) for n in range(24)] if kind == "sft" else [preference(n, p=0.8) for n in range(30)]
    run_stage(kind, folder, rows, model, profile=profile, progress=progress, train={"max_steps": 4, **train}, **changes)


@pytest.mark.parametrize("changes", [{}, ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_losses_are_those_of_tuned_float32_up_to_rounding(
    kind: str, changes: dict[str, Any], tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(kind, tmp_path / "gpu", tiny("llama"), GPU, changes)
    monkeypatch.setattr(cpu_tuning, "applies_to", lambda device: device.type == "cpu")
    run(kind, tmp_path / "cpu", tiny("llama"), CPU, changes)
    gpu, cpu = ([entry["loss"] for entry in read_metrics(tmp_path / name)] for name in ("gpu", "cpu"))
    assert gpu != cpu, "another way of computing leaves no trace"
    assert gpu == pytest.approx(cpu, rel=0.02)


@pytest.mark.parametrize(("kind", "changes"), [("sft", {}), ("dpo", ADAPTER), ("ppo", {}), ("ppo", ADAPTER)])
def test_killed_and_resumed_leaves_the_bytes_of_an_undisturbed_run(
    kind: str, changes: dict[str, Any], tmp_path: Path, tiny: Tiny
) -> None:
    run(kind, tmp_path / "undisturbed", tiny("llama"), GPU, changes)
    with pytest.raises(Killed):
        run(kind, tmp_path / "killed", tiny("llama"), GPU, changes, die_at=3)
    run(kind, tmp_path / "killed", tiny("llama"), GPU, changes)
    assert len(outputs(tmp_path / "undisturbed")) >= 2
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "undisturbed")
