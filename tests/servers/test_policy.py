"""A policy in training, sampled with vLLM: vLLM's log-probabilities are those of the current weights."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_contract import completions_by_id, conversation
from peft import LoraConfig, get_peft_model
from training_stages import BREVITY, Steps, numbered_prompts, reinforce, trained
from transformers import PreTrainedModel

from cai.contracts.engine import Completion, Request, Sampling
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.engines.vllm import VllmEngine
from cai.models.chat import Chat
from cai.models.loading import load_causal_lm
from cai.text.errors import StageFailed
from cai.training.rl.policy_sampler import PolicySampler, Sampler, VllmSampler
from cai.training.rl.ppo_trainer import PPOTrainer
from cai.training.rl.rollouts import Rollout

LONG = "The box is red and the ball is blue. " * 40
"""Longer than a block of vLLM's prefix cache, which on a CPU is 128 tokens."""


@pytest.fixture(scope="module")
def profile(python: Path) -> Profile:
    extra = {"enforce_eager": True, "max_num_seqs": 32}
    settings = {"python": python, "cpu_cache_gib": 1, "extra": extra}
    return Profile.model_validate({"device": "cpu", "dtype": "float32", "engine": "vllm", "vllm": settings})


def sample(sampler: Sampler, sampling: Sampling, texts: list[str]) -> dict[str, Completion]:
    requests = [Request(f"{n}", conversation(text), n, sampling) for n, text in enumerate(texts)]
    return completions_by_id(sampler.generate(requests), requests)


def perturb(lm: PreTrainedModel, adapter: bool, seed: int) -> PreTrainedModel:
    """The policy with noise on all its weights, or on its adapter's, in place of an optimizer step."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            if not adapter:
                weight.add_(0.03 * weight.std() * torch.randn_like(weight))
            elif "lora_B" in name:
                weight.normal_(std=0.03)
    return lm


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_vllm_says_what_the_updated_policy_says(adapter: bool, model: Model, profile: Profile, tmp_path: Path) -> None:
    greedy = Sampling(24, 0)
    texts = [f"What are {n} apples?" for n in range(8)] + [f"{LONG} What are {n} apples?" for n in range(4)]
    assert min(len(Chat.load(model).prompt_ids(conversation(text))) for text in texts[8:]) > 150
    policy: Any = load_causal_lm(model)
    if adapter:
        policy = get_peft_model(policy, LoraConfig(r=4, target_modules="all-linear"))
    local = PolicySampler(model, profile)
    ids_before: dict[str, list[int]] = {}
    with VllmSampler(model, profile, tmp_path, 512) as sampler:
        for update in range(3):
            policy = policy if update == 0 else perturb(policy, adapter, update)
            for updated in (local, sampler):
                updated.update(policy, contextlib.nullcontext)
            expected, by_vllm = sample(local, greedy, texts), sample(sampler, greedy, texts)
            ids = {id: completion.token_ids for id, completion in by_vllm.items()}
            assert ids == {id: completion.token_ids for id, completion in expected.items()}
            for id, completion in by_vllm.items():
                assert completion.log_probs == pytest.approx(expected[id].log_probs, abs=1e-3)
            assert ids != ids_before
            ids_before = ids


@pytest.fixture
def rollouts(monkeypatch: pytest.MonkeyPatch) -> list[Rollout]:
    """All that a ppo stage learns from."""
    rollouts: list[Rollout] = []
    estimate = PPOTrainer._estimate_advantages
    spy = lambda self, rollout: (rollouts.append(rollout), estimate(self, rollout))[1]  # noqa: E731
    monkeypatch.setattr(PPOTrainer, "_estimate_advantages", spy)
    return rollouts


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[VllmEngine]:
    """The engine of each update."""
    engines: list[VllmEngine] = []
    reload = VllmEngine.reload
    monkeypatch.setattr(VllmEngine, "reload", lambda self: (engines.append(self), reload(self))[1])
    return engines


def prompts(n: int) -> list[Any]:
    texts = [f"What are {k} apples?" for k in range(n)]
    return [{**row, "messages": conversation(text)} for row, text in zip(numbered_prompts(n), texts, strict=True)]


def train(kind: str, folder: Path, model: Model, profile: Profile, **config: Any) -> dict[str, Any]:
    (folder.parent / "rewards.py").write_text(BREVITY)
    rewards = [{"function": "rewards.py:brevity"}]
    figures = reinforce(kind, folder, prompts(12), model, rewards, profile=profile, max_new_tokens=16, **config)
    training: dict[str, Any] = figures["training"]["stage"]
    return training


@pytest.mark.parametrize("config", [{}, {"lora": {"rank": 4}}], ids=["full", "lora"])
def test_ppo_learns_from_what_vllm_samples_and_both_agree_on_its_log_probabilities(
    config: dict[str, Any], model: Model, profile: Profile, tmp_path: Path, rollouts: list[Rollout]
) -> None:
    settings = {"learning_rate": 3e-3, "warmup_steps": 0}
    figures = train("ppo", tmp_path / "stage", model, profile, rollouts=2, rollout_size=16, train=settings, **config)
    assert figures["rollouts"] == len(rollouts) == 2
    load_causal_lm(trained(tmp_path / "stage"))
    log_ratios = [episode.log_probs - episode.ref_log_probs for episode in rollouts[1].episodes]
    assert torch.cat(log_ratios).abs().max() > 0.01  # the second rollout's policy is not the first's
    for rollout in rollouts:
        for episode in rollout.episodes:
            ratio = (episode.log_probs - torch.tensor(episode.sampled_log_probs)).exp()
            assert float((ratio - 1).abs().max()) < 5e-3


def test_two_ranks_that_share_the_parameters_have_a_vllm_each(model: Model, profile: Profile, tmp_path: Path) -> None:
    accelerate = Path(__file__).parents[2] / "configs" / "accelerate" / "cpu-2-ranks-zero3.yaml"
    two_ranks = {"device": "cpu", "dtype": "float32", "processes": 2, "accelerate": str(accelerate)}
    two_ranks |= profile.model_dump(mode="json", include={"engine", "vllm"})
    (tmp_path / "two.yaml").write_text(json.dumps(two_ranks))
    (tmp_path / "rewards.py").write_text(BREVITY)
    stage = {"id": "policy", "kind": "ppo", "prompts": "asked", "rewards": [{"function": "rewards.py:brevity"}],
             "rollouts": 2, "rollout_size": 16, "batch_size": 8, "max_new_tokens": 16,
             "train": {"learning_rate": 1e-3, "warmup_steps": 0}}  # fmt: skip
    recipe = {"name": "two", "model": model.path, "stages": [stage],
              "prompts": {"asked": {"source": "micro", "split": "train", "limit": 16}}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "cai.cli", "run", "recipe.yaml", "--on", "two.yaml"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (metrics,) = tmp_path.glob("runs/two/policy-*/metrics.jsonl")
    rollouts = [row for row in map(json.loads, metrics.read_text().splitlines()) if "sampler_gap" in row]
    assert [row["sampler_gap"] < 1e-3 for row in rollouts] == [True, True]
    assert rollouts[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert rollouts[1]["kl"] > 0.01


def test_rloo_samples_with_vllm(model: Model, profile: Profile, tmp_path: Path, engines: list[VllmEngine]) -> None:
    figures = train("rloo", tmp_path / "stage", model, profile, n=4, train={"num_train_epochs": 1})
    assert figures["steps"] == len(engines) == 6
    assert len(set(map(id, engines))) == 1
    load_causal_lm(trained(tmp_path / "stage"))


def test_a_dead_vllm_ends_the_stage(model: Model, profile: Profile, tmp_path: Path, engines: list[VllmEngine]) -> None:
    class Kills(Steps):
        def advance(self, items: float = 1, tokens: int = 0) -> None:
            super().advance(items, tokens)
            if self.n_finished == 3:
                os.kill(engines[-1]._workers[0]._process.pid, signal.SIGKILL)

    settings = {"rollouts": 2, "rollout_size": 16, "train": {"save_steps": 3, "num_ppo_epochs": 2}}
    message = r"vLLM ended with signal 9 in the middle of its work.*; see .*\.log"
    with pytest.raises(StageFailed, match=message) as error:
        train("ppo", tmp_path / "stage", model, profile, progress=Kills(), **settings)
    Path(str(error.value).rpartition("see ")[2]).unlink()
    steps = Steps()
    figures = train("ppo", tmp_path / "stage", model, profile, progress=steps, **settings)
    assert steps.notes == ["resuming from checkpoint-3"]
    assert figures["steps"] == 8
    assert len(set(map(id, engines))) == 2
