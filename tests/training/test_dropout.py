"""Dropout is off in all models that are compared with each other, however a model reads its probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_tokenizer, random_model
from torch import nn
from training_stages import numbered_prompts, preference, reinforce, run_stage
from transformers import AutoConfig

from cai.contracts.model import Model
from cai.models.loading import load_causal_lm, load_sequence_classifier
from cai.models.reference import resolve
from cai.training import loop
from cai.training.rl.actor_critic import ActorCritic

DROPOUT: dict[str, dict[str, float]] = {
    "opt": {"dropout": 0.3, "attention_dropout": 0.2, "layerdrop": 0.4},
    "biogpt": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2, "layerdrop": 0.4},
    "xglm": {"dropout": 0.3, "attention_dropout": 0.2, "layerdrop": 0.4},
    "falcon": {"hidden_dropout": 0.3, "attention_dropout": 0.2},  # read from the config at each forward pass
}
"""Fields of the config by architecture."""
SHAPES = {
    "opt": {"ffn_dim": 48},
    "xglm": {"ffn_dim": 48, "d_model": 32, "num_layers": 2, "attention_heads": 4},
}
KINDS = ("dpo", "reward", "ppo", "rloo")
PAIRS = [preference(number, tags=["held_out"] if number % 4 == 0 else []) for number in range(8)]
REWARDS = "def flat(prompts, responses):\n    return [1.0] * len(responses)\n"
IDS = torch.arange(10, 34).view(2, 12)


def built(architecture: str, folder: Path) -> Model:
    """A tiny chat model of that architecture with dropout."""
    tokenizer = build_tokenizer("llama")
    settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, **SHAPES.get(architecture, {})}
    random_model(architecture, **settings, **DROPOUT[architecture]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return resolve(str(folder), folder=folder.parent)


def run(kind: str, folder: Path, model: Model, **config: Any) -> None:
    """Runs the stage of that kind in `folder`, whose parent gets a file with rewards."""
    if kind in {"dpo", "reward"}:
        run_stage(kind, folder, PAIRS, model, **config)
    else:
        (folder.parent / "rewards.py").write_text(REWARDS)
        sizes = {"rollouts": 1, "rollout_size": 8} if kind == "ppo" else {}
        rewards = [{"function": "rewards.py:flat"}]
        reinforce(kind, folder, numbered_prompts(4), model, rewards, **sizes, **config)


def trainer_of(kind: str, folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch, **config: Any) -> Any:
    """The trainer that the stage makes, before its first step."""
    trainers: list[Any] = []

    def keep(trainer: Any, context: Any) -> None:
        trainers.append(trainer)
        raise InterruptedError

    monkeypatch.setattr(loop, "train_or_resume", keep)
    with pytest.raises(InterruptedError):
        run(kind, folder, model, **config)
    return trainers[0]


def computed(model: nn.Module) -> torch.Tensor:
    """Log-probabilities of a batch, or scores where the model is a classifier; a critic's values besides."""
    if isinstance(model, ActorCritic):
        output = model(IDS, torch.ones_like(IDS), IDS)
        return torch.cat([output.log_probs, output.values])
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits if logits.dim() == 2 else logits.log_softmax(-1)


@pytest.mark.parametrize("architecture", DROPOUT)
@pytest.mark.parametrize("kind", KINDS)
def test_two_passes_in_training_mode_give_equal_numbers(
    kind: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (kind, architecture) == ("reward", "xglm"):
        pytest.skip("transformers has no sequence classifier of XGLM")
    model = built(architecture, tmp_path / "model")
    has_critic = kind == "ppo" and architecture != "xglm"
    settings: dict[str, Any] = {"critic": "critic", "named": {"critic": model}} if has_critic else {}
    plain = (load_sequence_classifier if kind == "reward" else load_causal_lm)(model).train()
    assert not torch.equal(computed(plain), computed(plain)), "the model has no dropout, and the test would say little"
    trainer = trainer_of(kind, tmp_path / "stage", model, monkeypatch, **settings)
    references = [getattr(trainer, name, None) for name in ("ref_model", "reference")]
    compared = [trainer.model, *(reference for reference in references if reference is not None)]
    assert len(compared) == (1 if kind == "reward" else 2)
    for compared_model in compared:
        compared_model.train()
        assert torch.equal(computed(compared_model), computed(compared_model))


@pytest.mark.parametrize("kind", KINDS)
def test_with_an_adapter_nothing_drops_out_either(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = {"rank": 4, "dropout": 0.3, "target_modules": "all-linear"}
    model = built("falcon", tmp_path / "model")
    trainer = trainer_of(kind, tmp_path / "stage", model, monkeypatch, lora=lora)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    trainer.model.train()
    assert torch.equal(computed(trainer.model), computed(trainer.model))


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_config_keeps_its_dropout(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("falcon", tmp_path / "model")
    trainer = trainer_of(kind, tmp_path / "interrupted", model, monkeypatch)
    trainer.save_model(str(tmp_path / "resume-point"))
    assert torch.equal(computed(trainer.model.train()), computed(trainer.model)), "saving switched dropout on again"
    monkeypatch.undo()
    run(kind, tmp_path / "stage", model)
    for folder in (tmp_path / "resume-point", tmp_path / "stage" / "model"):
        saved = AutoConfig.from_pretrained(folder)
        assert {name: getattr(saved, name) for name in DROPOUT["falcon"]} == DROPOUT["falcon"]
