"""What is trained is float32 and what is frozen in the profile's precision, in every training stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import Tiny
from torch import nn
from training_stages import BFLOAT16, CPU, TRAINING_KINDS, record_trainers, train_briefly

ADAPTER = {"lora": {"rank": 4}}


def dtypes(parameters: Any) -> set[torch.dtype]:
    return {parameter.dtype for parameter in parameters}


@pytest.mark.parametrize("kind", TRAINING_KINDS)
def test_an_adapter_and_its_head_are_float32_over_a_bfloat16_base(
    kind: str, tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = record_trainers(monkeypatch)
    train_briefly(kind, tmp_path / "stage", tiny("lora"), **ADAPTER)
    (trainer,) = trainers
    parameters = list(trainer.model.parameters())
    assert dtypes(parameter for parameter in parameters if parameter.requires_grad) == {torch.float32}
    assert dtypes(parameter for parameter in parameters if not parameter.requires_grad) == {torch.bfloat16}
    assert getattr(trainer, "ref_model", None) is None
    saved = load_file(tmp_path / "stage" / "model" / "adapter_model.safetensors")
    assert dtypes(saved.values()) == {torch.float32}
    assert any("score" in name for name in saved) == (kind == "reward")
    assert all(weight.abs().max() > 0 for weight in saved.values()), "learned"


@pytest.mark.parametrize("kind", TRAINING_KINDS)
def test_trained_in_full_all_weights_are_float32_and_the_reference_mostly_bfloat16(
    kind: str, tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = record_trainers(monkeypatch)
    train_briefly(kind, tmp_path / "stage", tiny("lora"))
    (trainer,) = trainers
    assert dtypes(trainer.model.parameters()) == {torch.float32}
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert dtypes(load_file(tmp_path / "stage" / "model" / "model.safetensors").values()) == {torch.float32}
    reference = getattr(trainer, "reference" if kind == "ppo" else "ref_model", None)
    assert (reference is None) == (kind in {"sft", "reward"})
    if reference is not None:
        products = [module.weight for module in reference.modules() if isinstance(module, nn.Linear)]
        assert dtypes(products) == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in reference.parameters())


@pytest.mark.parametrize("settings", [{}, ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize(("kind", "metric"), [("dpo", "log_ratio/chosen"), ("ppo", "kl"), ("rloo", "kl")])
def test_before_the_first_step_a_policy_is_its_reference_to_the_last_bit(
    kind: str, metric: str, settings: dict[str, Any], tmp_path: Path, tiny: Tiny
) -> None:
    train_briefly(kind, tmp_path / "stage", tiny("llama"), **settings)
    first = json.loads((tmp_path / "stage" / "metrics.jsonl").read_text().splitlines()[0])
    assert first[metric] == 0


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_an_adapter_over_a_bfloat16_base_learns_as_over_a_float32_one(kind: str, tmp_path: Path, tiny: Tiny) -> None:
    losses = train_briefly(kind, tmp_path / "bfloat16", tiny("llama"), **ADAPTER)
    expected = train_briefly(kind, tmp_path / "float32", tiny("llama"), profile=CPU, **ADAPTER)
    assert expected[-1] != expected[0]
    assert losses == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_recomputed_activations_of_an_adapter_over_a_bfloat16_base_change_nothing(
    kind: str, tmp_path: Path, tiny: Tiny
) -> None:
    recomputing = BFLOAT16.model_copy(update={"gradient_checkpointing": True})
    kept = train_briefly(kind, tmp_path / "kept", tiny("llama"), **ADAPTER)
    recomputed = train_briefly(kind, tmp_path / "recomputed", tiny("llama"), profile=recomputing, **ADAPTER)
    assert kept[-1] != kept[0]
    assert recomputed == pytest.approx(kept, abs=0.03)
