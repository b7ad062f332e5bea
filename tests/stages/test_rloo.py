"""RLOO: what it learns from, what its reference is, that it learns what is rewarded, and that it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Tiny
from training_stages import CPU, Killed, Steps, outputs, prompt_row, reinforce, trained

from cai.contracts.model import Model
from cai.models.loading import load_causal_lm
from cai.stages import config_class
from cai.storage.rows import read_rows
from cai.text.errors import StageFailed
from cai.training.metrics import read_metrics
from cai.training.rl.policy_sampler import PolicySampler
from cai.training.rl.rloo_trainer import LeaveOneOutTrainer
from cai.training.train_fields import fields

FUNCTIONS = """
def short(prompts, responses):
    return [-len(text) / 10 for text in responses]
def flat(prompts, responses):
    return [1.0] * len(responses)
def picky(prompts, responses):
    return [None if number % 4 == 0 else float(number % 4) for number, _ in enumerate(responses)]
def secret(prompts, responses):
    assert not any('What is fish 10?' in prompt[0]['content'] for prompt in prompts)
    return [1.0 for _ in responses]
"""
SHORT = [{"function": "mine.py:short"}]


def rloo(folder: Path, model: Model, prompts: int | list[Any] = 4, rewards: Any = SHORT, **config: Any) -> Any:
    """The figures of the stage. `prompts` are Prompt rows or how many of them."""
    rows = [prompt_row(number) for number in range(prompts)] if isinstance(prompts, int) else prompts
    return reinforce("rloo", folder, rows, model, rewards, **config)


@pytest.fixture(autouse=True)
def functions(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)


def test_it_learns_what_the_reward_asks_for(tmp_path: Path, tiny: Tiny) -> None:
    settings = {"batch_size": 32, "n": 8, "max_new_tokens": 12}
    train = {"num_train_epochs": 6, "learning_rate": 1e-2, "beta": 0.0}
    figures = rloo(tmp_path / "stage", tiny("llama"), 16, train=train, **settings)
    logged = read_metrics(tmp_path / "stage")
    assert len(logged) == 24
    first, last = ([entry["reward"] for entry in part] for part in (logged[:4], logged[-4:]))
    assert sum(last) / 4 > sum(first) / 4 + 0.5
    assert figures["training"]["stage"]["reward/short"]["last"] == logged[-1]["reward/short"]
    assert logged[-1]["length"] < logged[0]["length"]
    assert (tmp_path / "stage" / "curves.svg").is_file()
    load_causal_lm(trained(tmp_path / "stage"))


@pytest.mark.parametrize(("family", "settings"), [("llama", {}), ("lora", {}), ("lora", {"lora": {"rank": 4}})])
def test_the_reference_is_the_initial_policy(family: str, settings: dict[str, Any], tmp_path: Path, tiny: Tiny) -> None:
    train = {"num_train_epochs": 3, "learning_rate": 3e-3, "beta": 0.1}
    rloo(tmp_path / "stage", tiny(family), 12, train=train, **settings)
    logged = read_metrics(tmp_path / "stage")
    assert abs(logged[0]["kl"]) < 1e-4
    assert max(abs(entry["kl"]) for entry in logged) > 1e-3
    assert logged[0]["clip_fraction"] == 0
    assert {"entropy", "unfinished", "length/max", "reward/short", "reward/std", "failed"} <= logged[0].keys()


def test_ids_are_learned_from_as_they_were_sampled(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the copy's log-probabilities equal the trainer's own, at every step and with an adapter."""
    sampled: list[dict[tuple[int, ...], float]] = []
    learned: list[dict[tuple[int, ...], float]] = []
    sample, generate = PolicySampler.generate, LeaveOneOutTrainer._generate_and_score_completions

    def spy_on_sampler(self: Any, requests: Any) -> Any:
        completions = list(sample(self, requests))
        sampled.append({(*c.prompt_ids, *c.token_ids): sum(c.log_probs) for c in completions})
        return completions

    def spy_on_trainer(self: Any, inputs: Any) -> Any:
        rollout = generate(self, inputs)
        ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
        mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1).bool()
        learned.append(
            {tuple(row[m].tolist()): float(p) for row, m, p in zip(ids, mask, rollout["old_logps"], strict=True)}
        )
        return rollout

    monkeypatch.setattr(PolicySampler, "generate", spy_on_sampler)
    monkeypatch.setattr(LeaveOneOutTrainer, "_generate_and_score_completions", spy_on_trainer)
    train = {"num_train_epochs": 1, "learning_rate": 1e-2}
    rloo(tmp_path / "stage", tiny("llama"), 8, train=train, lora={"rank": 4})
    assert len(sampled) == len(learned) == 4
    for log_probs, expected in zip(learned, sampled, strict=True):
        assert log_probs.keys() == expected.keys()
        assert [log_probs[ids] for ids in expected] == pytest.approx(list(expected.values()), abs=2e-3)


def test_the_copy_holds_no_memory_while_it_learns(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    loss = LeaveOneOutTrainer.compute_loss

    def spy(self: Any, *args: Any, **options: Any) -> Any:
        held.append(sum(parameter.numel() for parameter in self.sampler.copy.parameters()))
        return loss(self, *args, **options)

    monkeypatch.setattr(LeaveOneOutTrainer, "compute_loss", spy)
    rloo(tmp_path / "stage", tiny("llama"))
    assert held == [0, 0, 0, 0]


def test_micro_batches_change_neither_the_steps_nor_their_losses(tmp_path: Path, tiny: Tiny) -> None:
    measured = []
    for micro_batch in (2, 8):
        folder = tmp_path / f"micro{micro_batch}"
        profile = CPU.model_copy(update={"micro_batch": micro_batch})
        train = {"learning_rate": 1e-3, "num_train_epochs": 1}
        rloo(folder, tiny("llama"), 8, profile=profile, train=train)
        measured.append([(entry["reward"], entry["grad_norm"]) for entry in read_metrics(folder)])
    assert len(measured[0]) == 4
    for first, second in zip(*measured, strict=True):
        assert first == pytest.approx(second, rel=1e-3)


def test_responses_that_are_worth_the_same_teach_nothing(tmp_path: Path, tiny: Tiny) -> None:
    train = {"learning_rate": 1e-2, "beta": 0.0}
    rloo(tmp_path / "stage", tiny("llama"), rewards=[{"function": "mine.py:flat"}], train=train)
    assert [entry["grad_norm"] for entry in read_metrics(tmp_path / "stage")] == [0.0, 0.0]
    assert read_metrics(tmp_path / "stage")[0]["reward/equal"] == 1.0


def test_a_response_without_reward_is_only_counted(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    advantages: list[Any] = []
    generate = LeaveOneOutTrainer._generate_and_score_completions

    def spy(self: Any, inputs: Any) -> Any:
        rollout = generate(self, inputs)
        advantages.append(rollout["advantages"].view(-1, 4))
        return rollout

    monkeypatch.setattr(LeaveOneOutTrainer, "_generate_and_score_completions", spy)
    rewards = [{"function": "mine.py:picky"}, {"function": "mine.py:flat"}]
    progress = Steps()
    settings = {"train": {"beta": 0.0}, "limits": {"failed": 0.25}, "progress": progress}
    figures = rloo(tmp_path / "stage", tiny("llama"), rewards=rewards, **settings)
    assert progress.notes == ["4 of 16 responses left out: 4 failed: picky: it returned NoneType, expected a number"]
    assert advantages[0].tolist() == [[0.0, -1.5, 0.0, 1.5]] * 2
    assert read_metrics(tmp_path / "stage")[0]["failed"] == 2
    assert read_metrics(tmp_path / "stage")[0]["reward/picky"] == 2.0
    assert figures["training"]["stage"]["failed_responses"] == 4


def test_held_out_prompts_and_those_that_leave_no_space_are_never_responded_to(tmp_path: Path, tiny: Tiny) -> None:
    long = prompt_row(5)
    long["messages"][0]["content"] *= 40
    prompts = [*map(prompt_row, range(4)), prompt_row(10, "held_out"), long]
    settings = {"rewards": [{"function": "mine.py:secret"}], "max_length": 128, "train": {"num_train_epochs": 2}}
    figures = rloo(tmp_path / "stage", tiny("llama"), prompts, **settings)["training"]["stage"]
    assert (figures["prompts"], figures["examples"]) == (6, 4)
    assert figures["left_out"] == {"held_out": 1, "too_long": 1}
    message = "found 1 prompts to respond to, expected the 2 of one step; left out: 1 held"
    with pytest.raises(StageFailed, match=message):
        rloo(tmp_path / "few", tiny("llama"), [prompt_row(0), prompt_row(10, "held_out")])


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 4}}])
def test_killed_and_continued_it_ends_with_the_same_bytes(changes: dict[str, Any], tmp_path: Path, tiny: Tiny) -> None:
    train = {"num_train_epochs": 2, "num_iterations": 2, "learning_rate": 3e-3, "save_steps": 3, "beta": 0.1}
    settings: dict[str, Any] = {"train": train, **changes}
    undisturbed = rloo(tmp_path / "undisturbed", tiny("llama"), 8, **settings)
    assert len(read_metrics(tmp_path / "undisturbed")) == 16
    for die_at, resumes in ((4, 3), (11, 9), (1, None)):  # in the middle of rollouts; in the second epoch; at once
        folder = tmp_path / f"killed{die_at}"
        with pytest.raises(Killed):
            rloo(folder, tiny("llama"), 8, progress=Steps(die_at), **settings)
        if resumes == 3:
            assert (folder / "checkpoints" / "checkpoint-3" / "rollouts-0.safetensors").is_file()
        steps = Steps()
        figures = rloo(folder, tiny("llama"), 8, progress=steps, **settings)
        assert steps.notes == ([] if resumes is None else [f"resuming from checkpoint-{resumes}"])
        assert outputs(folder) == outputs(tmp_path / "undisturbed")
        assert len(outputs(folder)) == 3
        assert figures == undisturbed


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_between_two_passes_it_continues_with_another_micro_batch(micro_batch: int, tmp_path: Path, tiny: Tiny) -> None:
    train = {"num_train_epochs": 1, "num_iterations": 2, "learning_rate": 3e-5, "save_steps": 3, "beta": 0.1}
    rloo(tmp_path / "undisturbed", tiny("llama"), 8, train=train)
    with pytest.raises(Killed):
        rloo(tmp_path / "killed", tiny("llama"), 8, progress=Steps(4), train=train)
    steps, profile = Steps(), CPU.model_copy(update={"micro_batch": micro_batch})
    rloo(tmp_path / "killed", tiny("llama"), 8, progress=steps, profile=profile, train=train)
    assert steps.notes == ["resuming from checkpoint-3"]
    undisturbed, continued = read_metrics(tmp_path / "undisturbed"), read_metrics(tmp_path / "killed")
    assert len(undisturbed) == len(continued) == 8
    assert undisturbed[3]["grad_norm"] > 1, "clipped, the resumed step says little"
    for entry, continued_entry in zip(undisturbed, continued, strict=True):
        measured = [name for name in ("reward", "kl", "grad_norm", "entropy", "loss") if name in entry]
        expected = {name: entry[name] for name in measured}
        assert {name: continued_entry[name] for name in measured} == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_limits_stop_it_before_it_learns_from_such_a_rollout(tmp_path: Path, tiny: Tiny) -> None:
    train = {"num_train_epochs": 4, "learning_rate": 3e-3, "save_steps": 1}
    message = r"stopped before rollout 2 .* nats a response, above .*checkpoint-1 is from be"
    with pytest.raises(StageFailed, match=message):
        rloo(tmp_path / "stage", tiny("llama"), train=train, limits={"kl": 1e-4})
    assert len(read_metrics(tmp_path / "stage")) == 1


def test_a_step_in_which_too_many_rewards_failed_is_not_learned_from(tmp_path: Path, tiny: Tiny) -> None:
    message = r"before rollout 1 .*: 2 of 8 responses have no reward, above `limits: {failed: 0.2}`: 2 failed: picky: "
    with pytest.raises(StageFailed, match=message):
        rloo(tmp_path / "stage", tiny("llama"), rewards=[{"function": "mine.py:picky"}])


def test_some_responses_of_each_step_are_written_to_a_file(tmp_path: Path, tiny: Tiny) -> None:
    rloo(tmp_path / "stage", tiny("llama"), batch_size=16)
    samples = read_rows(tmp_path / "stage" / "samples.jsonl")
    assert [row["rollout"] for row in samples] == [0] * 8
    assert all(row["score"] == row["scores"]["short"] == -len(row["response"]) / 10 for row in samples)
    assert "repetition" in read_metrics(tmp_path / "stage")[0]


def test_settings_that_the_stage_decides_or_that_do_not_fit_are_refused() -> None:
    config = config_class("rloo")
    assert set(config.owned) <= fields(config.train_class or "").keys()
    settings = {"id": "stage", "kind": "rloo", "prompts": "asked", "rewards": SHORT}
    with pytest.raises(ValueError, match="found batch_size 10 with n 4, expected a multiple of n"):
        config.model_validate({**settings, "batch_size": 10})
    with pytest.raises(ValueError, match="greater than 0"):
        config.model_validate({**settings, "temperature": 0})


def test_progress_moves_within_a_rollout(tmp_path: Path, tiny: Tiny) -> None:
    steps = Steps()
    rloo(tmp_path / "stage", tiny("llama"), progress=steps)
    for unit in ("responses", "rewards"):
        assert [part for part in steps.parts if part[2] == f"{unit} of rollout 1"][-1][:2] == (8, 8)
