"""The reward model: where its score is computed, what it learns from, and how it is measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Tiny
from training_stages import CPU, Steps, outputs, preference, record_batches, run_stage, trained

from cai.contracts.model import Model
from cai.models.chat import Chat
from cai.models.loading import load_causal_lm, load_sequence_classifier
from cai.models.reward_model import RewardModel
from cai.stages.reward import held_out_prompts, measure
from cai.storage.rows import read_rows
from cai.text.errors import StageFailed
from cai.training.tokenised_rows import tokenise_pairs
from cai.training.trainers import SoftRewardTrainer


def graded(margin: float, gold: float | None, p: float = 0.8, topic: str = "t") -> dict[str, Any]:
    """One row of an evaluation."""
    return {"margin": margin, "gold_margin": gold, "p_chosen": p, "topic": topic, "chosen_score": margin,
            "rejected_score": 0.0}  # fmt: skip


def scores_of(model: Model, rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(chosen, rejected) score of each pair by the reward model that a stage left behind."""
    judge = RewardModel.load(model, CPU)
    pairs, _ = tokenise_pairs(rows, judge.chat, 256)
    scores = judge.scores([pair.prompt_ids + ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)])
    return list(zip(scores[::2], scores[1::2], strict=True))


def test_a_word_that_decides_is_learned_and_held_out_pairs_are_put_in_order(tmp_path: Path, tiny: Tiny) -> None:
    rows = [preference(number, p=0.95, tags=["held_out"] if number % 4 == 0 else []) for number in range(160)]
    train = {"num_train_epochs": 10, "learning_rate": 3e-3}
    figures = run_stage("reward", tmp_path / "stage", rows, tiny("llama"), train=train)["reward"]
    assert figures["accuracy"]["value"] > 0.9
    assert figures["accuracy"] == figures["label_accuracy"]
    assert figures["accuracy"]["n"] == figures["accuracy"]["topics"] == figures["held_out"] == 40
    low, high = figures["accuracy"]["interval"]
    assert 0 <= low < figures["accuracy"]["value"] <= high <= 1
    assert figures["against"] == "labels"
    assert figures["chosen_score"] > figures["rejected_score"]
    assert figures["label_entropy"] < figures["log_loss"] < math.log(2)
    lines = read_rows(tmp_path / "stage" / "evaluation.jsonl")
    assert len(lines) == 40
    scores = scores_of(trained(tmp_path / "stage"), [row for row in rows if row["tags"]])
    for line, (chosen, rejected) in zip(lines, scores, strict=True):
        assert (line["chosen_score"], line["rejected_score"]) == pytest.approx((chosen, rejected), abs=1e-5)


def test_it_starts_from_the_named_language_model_and_its_head_from_the_seed(tmp_path: Path, tiny: Tiny) -> None:
    rows, train = [preference(number) for number in range(12)], {"learning_rate": 1e-12}
    for name in ("one", "two"):
        run_stage("reward", tmp_path / name, rows, tiny("lora"), train=train)
    first, second = (load_sequence_classifier(trained(tmp_path / name)) for name in ("one", "two"))
    torch.testing.assert_close(first.score.weight, second.score.weight, rtol=0, atol=0)
    body, start = first.base_model.state_dict(), load_causal_lm(tiny("lora")).base_model.state_dict()
    for name, weight in start.items():
        torch.testing.assert_close(body[name], weight, atol=1e-6, rtol=1e-5)


def test_a_lora_keeps_its_head(tmp_path: Path, tiny: Tiny) -> None:
    rows = [preference(number) for number in range(60)]
    train = {"num_train_epochs": 5, "learning_rate": 1e-2}
    figures = run_stage("reward", tmp_path / "stage", rows, tiny("qwen2"), train=train, lora={"rank": 8})["reward"]
    lines = read_rows(tmp_path / "stage" / "evaluation.jsonl")
    by_id = {row["id"]: row for row in rows}
    scores = scores_of(trained(tmp_path / "stage"), [by_id[line["id"]] for line in lines])
    assert [line["chosen_score"] for line in lines] == pytest.approx([chosen for chosen, _ in scores], abs=1e-3)
    assert figures["held_out"] == len(lines) == 6


@pytest.mark.parametrize("settings", [{}, {"lora": {"rank": 4}}], ids=["full", "lora"])
def test_a_run_that_ends_while_it_scores_has_lost_no_training(
    settings: dict[str, Any], tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, profile = [preference(number) for number in range(24)], CPU.model_copy(update={"dtype": "bfloat16"})
    undisturbed = run_stage("reward", tmp_path / "undisturbed", rows, tiny("llama"), profile=profile, **settings)

    def run_out_of_memory(self: RewardModel, ids: Any, *_: Any) -> list[float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "scores", run_out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            run_stage("reward", tmp_path / "stage", rows, tiny("llama"), profile=profile, **settings)
    assert not (tmp_path / "stage" / "checkpoints").exists()
    steps = Steps()
    again = run_stage("reward", tmp_path / "stage", rows, tiny("llama"), profile=profile, progress=steps, **settings)
    n_scored = 2 * again["reward"]["held_out"]
    assert steps.parts[-1] == (n_scored, n_scored, "held-out responses scored")
    assert steps.n_finished == 0, "it only scores"
    assert again == undisturbed
    assert outputs(tmp_path / "stage") == outputs(tmp_path / "undisturbed")


def test_held_out_pairs_are_never_learned_from(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_batches(monkeypatch, SoftRewardTrainer)
    tokenizer = Chat.load(tiny("llama")).tokenizer
    secret = [preference(number, "secret yes", "secret no", tags=["held_out"]) for number in range(20, 24)]
    rows = [*secret, *(preference(number, p=0.5 + number / 20) for number in range(9)), preference(9, "a", "a")]
    figures = run_stage("reward", tmp_path / "stage", rows, tiny("llama"))["reward"]
    learned = [tokenizer.decode(ids) for _, batch in batches for ids in batch["input_ids"]]
    labels = [label for _, batch in batches for label in batch["p_chosen"].tolist()]
    assert len(learned) == 18
    assert not any("secret" in text for text in learned)
    assert sorted(labels) == pytest.approx([0.5 + number / 20 for number in range(9)])
    assert figures["examples"] + figures["held_out"] + sum(figures["left_out"].values()) == len(rows)


def test_where_no_row_is_tagged_a_share_of_prompts_is_held_out_with_all_pairs() -> None:
    rows = [preference(number // 2) for number in range(60)]
    held_out = held_out_prompts(rows, 0.1)
    assert len(held_out) == 3
    assert held_out == held_out_prompts(list(reversed(rows)), 0.1)
    assert len(held_out_prompts(rows, 0.001)) == 1
    tagged = [*rows, preference(99, tags=["held_out"])]
    assert held_out_prompts(tagged, 0.1) == {tagged[-1]["prompt_id"]}


def test_accuracy_is_against_the_oracle_where_it_knows_the_prompt() -> None:
    scored = [graded(1.0, 2.0), graded(1.0, -1.0, topic="u"), graded(-2.0, -1.0), graded(3.0, 0.0), graded(1.0, None)]
    figures = measure(scored)
    assert figures["against"] == "gold"
    assert figures["accuracy"]["value"] == pytest.approx(2 / 3)
    assert (figures["accuracy"]["n"], figures["accuracy"]["topics"]) == (3, 2)
    assert (figures["ties"], figures["ungraded"]) == (1, 1)
    assert figures["label_accuracy"]["value"] == pytest.approx(4 / 5)


def test_the_oracle_grades_every_held_out_pair(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    scored_responses: list[str] = []

    def oracle(messages: list[dict[str, str]], response: str) -> float | None:
        scored_responses.append(response)
        return None if "beta" in messages[-1]["content"] else float("no" in response)

    monkeypatch.setattr("cai.micro.oracle.gold_score", oracle)
    rows = [preference(number, tags=["held_out", "topic:all"] if number < 13 else []) for number in range(30)]
    train = {"num_train_epochs": 4, "learning_rate": 3e-3}
    figures = run_stage("reward", tmp_path / "stage", rows, tiny("llama"), train=train)["reward"]
    assert len(scored_responses) == 26
    assert (figures["against"], figures["ungraded"], figures["accuracy"]["n"]) == ("gold", 1, 12)
    assert figures["accuracy"]["topics"] == figures["label_accuracy"]["topics"] == 1
    lines = read_rows(tmp_path / "stage" / "evaluation.jsonl")
    assert [line["gold_margin"] for line in lines].count(-1.0) == 12
    assert figures["accuracy"]["value"] == sum(line["margin"] < 0 for line in lines if line["gold_margin"]) / 12


def test_without_an_oracle_even_labels_are_ties() -> None:
    figures = measure([graded(1.0, None), graded(-1.0, None), graded(-1.0, None, p=0.5)])
    assert (figures["accuracy"]["value"], figures["against"], figures["ties"]) == (0.5, "labels", 1)
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert figures["label_entropy"] == pytest.approx((2 * entropy + math.log(2)) / 3)
    sure = measure([graded(900.0, None, p=1.0), graded(900.0, None, p=1.0)])
    assert sure["log_loss"] == sure["label_entropy"] == sure["calibration_error"] == 0.0
    wrong = measure([graded(-900.0, None, p=1.0)])
    assert (wrong["log_loss"], wrong["calibration_error"]) == (900.0, 1.0)


def test_a_stage_without_pairs_on_both_sides_says_so(tmp_path: Path, tiny: Tiny) -> None:
    rows = [preference(number, tags=["held_out"]) for number in range(2)]
    with pytest.raises(StageFailed, match="of 2 pairs 0 can be learned from and 2 are held out"):
        run_stage("reward", tmp_path / "stage", rows, tiny("llama"))
