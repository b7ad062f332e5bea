"""The ppo stage: what it samples from, what it leaves behind, and that a kill loses nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import training_stages
from tiny_models import Tiny
from training_stages import BREVITY, CPU, Killed, Steps, numbered_prompts, outputs, stage_context, trained
from transformers import AutoModelForCausalLM

from cai.contracts.context import Context
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.models.loading import load_causal_lm, load_tokenizer
from cai.run.status import figure_lines
from cai.stages import config_class, run_function
from cai.storage.rows import read_rows
from cai.text.errors import BadInput, StageFailed
from cai.training.metrics import read_metrics

SILENCE = """
calls = 0
def tiring(prompts, responses):
    global calls
    calls += 1
    return [None if calls > 1 and number % 2 else -len(text) for number, text in enumerate(responses)]
def silence(prompts, responses):
    return [None for _ in responses]
"""


def context_of(folder: Path, model: Model, *, profile: Profile = CPU, progress: Any = None, **fields: Any) -> Context:
    context = stage_context(folder, {}, model, profile=profile, progress=progress)
    (folder.parent / "rewards.py").write_text(BREVITY + SILENCE)
    return dataclasses.replace(context, home=folder.parent, prompt_sets={"all": numbered_prompts(12)}, **fields)


def ppo(folder: Path, model: Model, *, train: dict[str, Any] | None = None, context: Any = None, **config: Any) -> Any:
    """The figures of the stage."""
    settings = {
        "id": "stage", "kind": "ppo", "prompts": ["all"], "rewards": [{"function": "rewards.py:brevity"}],
        "rollouts": 3, "rollout_size": 16, "batch_size": 8, "max_new_tokens": 8,
        "train": {"learning_rate": 1e-3, "save_steps": 3, **(train or {})}, **config,
    }  # fmt: skip
    return run_function("ppo")(config_class("ppo").model_validate(settings), context or context_of(folder, model))


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": {"rank": 4}}, {"critic": ""}, {"train": {"kl_target": 0.01}}, {"train": {"logging_steps": 5}}],
)
def test_killed_anywhere_it_ends_with_the_same_bytes(settings: dict[str, Any], tmp_path: Path, tiny: Tiny) -> None:
    model = tiny("llama")
    settings = {**settings, "critic": None if "critic" not in settings else ""}
    undisturbed = ppo(tmp_path / "undisturbed", model, **settings)
    # Twelve steps, four a rollout, a resume point every three: before any, in the middle of a rollout, at its first.
    places = ((1, None), (5, 3), (8, 6), (10, 9), (11, 9))
    for die_at, from_step in places if settings["critic"] is None and len(settings) == 1 else places[1:3]:
        folder = tmp_path / f"killed{die_at}"
        with pytest.raises(Killed):
            ppo(folder, model, context=context_of(folder, model, progress=Steps(die_at)), **settings)
        steps = Steps()
        if die_at == 11:
            with (folder / "samples.jsonl").open("a") as file:
                file.write('{"finished":false,"kl":0.1')  # as a kill in the middle of a line leaves it
        figures = ppo(folder, model, context=context_of(folder, model, progress=steps), **settings)
        assert steps.notes == ([] if from_step is None else [f"resuming from checkpoint-{from_step}"])
        assert outputs(folder) == outputs(tmp_path / "undisturbed")
        assert len(outputs(folder)) == 3
        assert figures == undisturbed


def test_it_learns_what_is_rewarded_and_leaves_a_model(tmp_path: Path, tiny: Tiny) -> None:
    settings = {"rollouts": 12, "rollout_size": 64, "batch_size": 32, "train": {"learning_rate": 1e-2, "kl_coef": 0.0}}
    summary = ppo(tmp_path / "stage", tiny("llama"), **settings)
    figures = summary["training"]["stage"]
    assert figure_lines(summary) == [f"stage KL  {figures['kl']['last']:.2f} nats a response from where it started"]
    assert figures["steps"] == 48
    assert figures["reward"]["last"] > figures["reward"]["first"] + 0.15
    assert figures["kl"]["first"] == pytest.approx(0, abs=1e-5)
    assert figures["kl"]["last"] > 0.01
    load_causal_lm(trained(tmp_path / "stage"))
    logged = read_metrics(tmp_path / "stage")
    assert len(logged) == 48
    assert {"reward", "reward/brevity", "kl", "length", "value/explained_variance"} <= set(logged[4])
    assert "reward" not in logged[5]
    samples = read_rows(tmp_path / "stage" / "samples.jsonl")
    assert [row["rollout"] for row in samples] == [number for number in range(12) for _ in range(8)]
    assert {"prompt_id", "response", "scores", "kl"} <= set(samples[0])


def test_the_reference_of_an_adapter_is_the_policy_without_it(tmp_path: Path, tiny: Tiny) -> None:
    # The starting model of the second stage is itself an adapter: it is merged, and its policy is the reference.
    ppo(tmp_path / "first", tiny("lora"), lora={"rank": 4}, train={"learning_rate": 3e-3})
    start = trained(tmp_path / "first")
    ppo(tmp_path / "second", start, lora={"rank": 4}, context=context_of(tmp_path / "second", start))
    assert read_metrics(tmp_path / "second")[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert (tmp_path / "second" / "model" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("settings", [{}, {"lora": {"rank": 4}}], ids=["full", "lora"])
def test_recomputed_activations_change_nothing(settings: dict[str, Any], tmp_path: Path, tiny: Tiny) -> None:
    profile = CPU.model_copy(update={"gradient_checkpointing": True})
    ppo(tmp_path / "kept", tiny("llama"), rollouts=1, **settings)
    context = context_of(tmp_path / "again", tiny("llama"), profile=profile)
    ppo(tmp_path / "again", tiny("llama"), context=context, rollouts=1, **settings)
    kept, computed = ([entry["loss"] for entry in read_metrics(tmp_path / name)] for name in ("kept", "again"))
    assert computed == pytest.approx(kept, abs=1e-5)


def test_a_reward_model_scores_sampled_token_ids(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("pad_is_eos")
    pairs = [training_stages.preference(n) for n in range(16)]
    training_stages.run_stage("reward", tmp_path / "rm", pairs, model, hold_out=0.2)
    scored_ids = training_stages.record_scored_ids(monkeypatch)
    context = context_of(tmp_path / "stage", model, models={"": model, "rm": trained(tmp_path / "rm")})
    ppo(tmp_path / "stage", model, context=context, rewards=[{"model": "rm"}], rollouts=1, max_new_tokens=40)
    end = load_tokenizer(model).eos_token_id
    assert len(scored_ids) == 16
    ended = [ids for ids in scored_ids if ids[-1] == end]
    assert all(ids.count(load_tokenizer(model).pad_token_id) == 0 for ids in scored_ids)
    assert all(len(ids) > 40 for ids in scored_ids if ids not in ended)  # cut off: scored without an end token


def test_prompts_that_are_held_out_or_do_not_fit_are_left_out_and_counted(tmp_path: Path, tiny: Tiny) -> None:
    context = context_of(tmp_path / "stage", tiny("llama"))
    prompt_rows = numbered_prompts(8)
    prompt_rows[0]["messages"][0]["content"] = "long " * 400
    for row in prompt_rows[6:]:
        row["tags"] = ["held_out"]
    context = dataclasses.replace(context, prompt_sets={"all": prompt_rows})
    figures = ppo(tmp_path / "stage", tiny("llama"), context=context, rollouts=1, max_length=200)["training"]["stage"]
    assert figures["prompts"] == 5
    assert figures["left_out"] == {"held_out": 2, "too_long": 1}
    context = dataclasses.replace(context, folder=tmp_path / "none", prompt_sets={"all": prompt_rows[6:]})
    with pytest.raises(StageFailed, match="no prompt to respond to; left out: 2 held out"):
        ppo(tmp_path / "none", tiny("llama"), context=context)


def test_limits_stop_the_stage_with_its_last_good_resume_point_on_disk(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(StageFailed, match=r"the KL to the reference is .* nats a response, above"):
        ppo(tmp_path / "stage", tiny("llama"), limits={"kl": 1e-4}, train={"learning_rate": 3e-3})
    kept = sorted((tmp_path / "stage" / "checkpoints").glob("checkpoint-*/COMPLETE"))
    assert [path.parent.name for path in kept] == ["checkpoint-3"]
    AutoModelForCausalLM.from_pretrained(kept[0].parent)


def test_a_rollout_in_which_too_many_rewards_failed_is_not_learned_from(tmp_path: Path, tiny: Tiny) -> None:
    message = (
        r"before rollout 2 was learned from: 8 of 16 responses have no reward, above `limits: {failed: 0.2}`: "
        r"8 failed: tiring: it returned NoneType, expected a number; .*checkpoint-4 is from before"
    )
    rewards = [{"function": "rewards.py:tiring"}]
    with pytest.raises(StageFailed, match=message):
        ppo(tmp_path / "stage", tiny("llama"), rewards=rewards, train={"save_steps": 1})
    context = context_of(tmp_path / "lenient", tiny("llama"), progress=Steps())
    ppo(tmp_path / "lenient", tiny("llama"), context=context, rewards=rewards, limits={"failed": 0.5})
    assert (
        context.left_out
        == context.progress.notes
        == ["16 of 48 responses left out: 16 failed: tiring: it returned NoneType, expected a number"]
    )


def test_a_critic_that_reads_other_ids_is_refused(tmp_path: Path, tiny: Tiny) -> None:
    context = context_of(tmp_path / "stage", tiny("llama"), models={"": tiny("llama"), "other": tiny("qwen2")})
    with pytest.raises(BadInput, match="the critic 'other' reads other token ids than the policy"):
        ppo(tmp_path / "stage", tiny("llama"), context=context, critic="other")


@pytest.mark.parametrize("modules", [["q_proj", "lm_head"], r".*(lm_head|v_proj)"])
def test_an_adapter_on_the_language_model_head_is_refused(modules: Any, tmp_path: Path, tiny: Tiny) -> None:
    message = "names 'lm_head', the language-model head or tied to it, which takes no adapter"
    with pytest.raises(BadInput, match=message):
        ppo(tmp_path / "stage", tiny("llama"), lora={"rank": 4, "target_modules": modules})


def test_a_horizon_shorter_than_a_rollout_is_refused() -> None:
    with pytest.raises(ValueError, match="found `kl_horizon: 8` under `train`, expected rollout_size 16 or more"):
        ppo(Path(), None, train={"kl_target": 1.0, "kl_horizon": 8})  # type: ignore[arg-type]


def test_rewards_that_all_fail_stop_the_stage(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(StageFailed, match="16 of 16 responses have no reward, above"):
        ppo(tmp_path / "stage", tiny("llama"), rewards=[{"function": "rewards.py:silence"}])


def test_progress_moves_within_a_rollout(tmp_path: Path, tiny: Tiny) -> None:
    steps = Steps()
    ppo(tmp_path / "stage", tiny("llama"), context=context_of(tmp_path / "stage", tiny("llama"), progress=steps))
    for unit in ("responses", "rewards", "log-probabilities"):
        finished = [part[0] for part in steps.parts if part[1:] == (16, f"{unit} of rollout 2")]
        assert finished == sorted(finished)
        assert finished[-1] == 16
    assert [part[0] for part in steps.parts if part[2] == "responses of rollout 1"] == list(range(1, 17))
