"""DPO: what it learns from, what its reference is, and that a step is the same however it is split."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import Tiny
from training_stages import Steps, preference, record_batches, run_stage, trained

from cai.models.chat import Chat
from cai.models.loading import load_causal_lm
from cai.stages.dpo import drift_warnings
from cai.text.errors import StageFailed
from cai.training.metrics import read_metrics
from cai.training.trainers import SoftDPOTrainer


def mixed(count: int) -> list[dict[str, Any]]:
    return [preference(number, p=0.5 + 0.5 * (number % 5) / 4) for number in range(count)]


@pytest.mark.parametrize(("family", "settings"), [
    ("llama", {}), ("gpt_neox", {}), ("lora", {}), ("llama", {"train": {"precompute_ref_log_probs": True}}),
    ("llama", {"lora": {"rank": 4}}), ("lora", {"lora": {"rank": 4}}),
    ("base", {"lora": {"rank": 4}}),  # whose pad token is added
])  # fmt: skip
def test_the_reference_is_the_initial_policy(family: str, settings: dict[str, Any], tmp_path: Path, tiny: Tiny) -> None:
    settings = {**settings, "train": {"num_train_epochs": 2, "learning_rate": 1e-3, **settings.get("train", {})}}
    template = {"chat_template": tiny_models.PLAIN} if family == "base" else {}
    run_stage("dpo", tmp_path / "stage", mixed(16), tiny(family, **template), **settings)
    logged = read_metrics(tmp_path / "stage")
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(logged[0]["log_ratio/chosen"]) < 1e-4
    assert abs(logged[0]["log_ratio/rejected"]) < 1e-4
    assert logged[-1]["reward/margin"] > 0
    assert logged[-1]["loss"] < math.log(2)
    adapter = (tmp_path / "stage" / "model" / "adapter_model.safetensors").is_file()
    assert adapter == ("lora" in settings)
    load_causal_lm(trained(tmp_path / "stage"))


def test_a_stage_starts_where_the_last_one_ended(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"lora": {"rank": 4}, "train": {"num_train_epochs": 2, "learning_rate": 1e-2}}
    run_stage("dpo", tmp_path / "first", mixed(8), tiny("lora"), **settings)
    reference_calls: list[Any] = []
    reference = SoftDPOTrainer.compute_ref_log_probs

    def spy(self: Any, model: Any, inputs: dict[str, Any]) -> Any:
        reference_calls.append((inputs, reference(self, model, inputs)))
        return reference_calls[-1][1]

    monkeypatch.setattr(SoftDPOTrainer, "compute_ref_log_probs", spy)
    run_stage("dpo", tmp_path / "second", mixed(8), trained(tmp_path / "first"), **settings)
    model = load_causal_lm(trained(tmp_path / "first"))
    for inputs, (chosen, rejected) in reference_calls:
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        log_probs = logits[:, :-1].log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None]).squeeze(2)
        expected = (log_probs * inputs["completion_mask"][:, 1:]).sum(1)
        torch.testing.assert_close(torch.cat([chosen, rejected]), expected, atol=1e-3, rtol=1e-4)
    load_causal_lm(trained(tmp_path / "second"))


def test_precomputed_references_change_only_memory(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, losses = record_batches(monkeypatch, SoftDPOTrainer), []
    for precompute in (False, True):
        folder = tmp_path / str(precompute)
        train = {"learning_rate": 1e-3, "num_train_epochs": 2, "precompute_ref_log_probs": precompute}
        run_stage("dpo", folder, mixed(12), tiny("qwen2"), train=train)
        losses.append([entry["loss"] for entry in read_metrics(folder)])
        assert batches
        assert all((trainer.ref_model is None) is precompute for trainer, _ in batches)
        batches.clear()
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_drift_that_no_loss_shows_is_measured_told_and_drawn(tmp_path: Path, tiny: Tiny) -> None:
    """Longer responses are preferred in training, shorter ones on held-out prompts: the policy goes by length."""
    learned = [preference(number, "yes " * 12, "yes") for number in range(24)]
    held_out = [preference(number, "yes", "yes " * 12, tags=["held_out"]) for number in range(30, 38)]
    steps, train = Steps(), {"learning_rate": 3e-3, "num_train_epochs": 3}
    summary = run_stage("dpo", tmp_path / "stage", [*learned, *held_out], tiny("llama"), train=train, progress=steps)
    figures = summary["training"]["stage"]
    assert figures["held_out"]["longer/label"] == 0.0
    assert figures["drift"]["longer"] == figures["held_out"]["longer/reward"] > 0.9
    assert figures["drift"]["chosen_log_ratio"] == pytest.approx(
        figures["held_out"]["log_ratio/chosen"] / figures["held_out"]["length/chosen"]
    )
    assert any("prefers the longer response in 100% more of the pairs" in note for note in steps.notes)
    assert (tmp_path / "stage" / "curves.svg").is_file()
    alike = [preference(number, "yes yes no", "yes yes yes") for number in range(8)]
    figures = run_stage("dpo", tmp_path / "alike", alike, tiny("llama"))["training"]["stage"]
    assert figures["drift"]["longer"] is None


def test_a_warning_says_what_fell_and_what_grew() -> None:
    assert list(drift_warnings({"chosen_log_ratio": -0.05, "longer": 0.05})) == []
    fell, grew = drift_warnings({"chosen_log_ratio": -0.25, "longer": 0.2})
    assert "less likely, by 0.25 nats a token" in fell
    assert "in 20% more of the pairs" in grew


def test_even_labels_teach_nothing_and_sure_ones_do(tmp_path: Path, tiny: Tiny) -> None:
    moved = []
    for p in (0.5, 1.0):
        rows = [preference(number, p=p) for number in range(8)]
        train = {"learning_rate": 1e-4, "num_train_epochs": 4}
        run_stage("dpo", tmp_path / str(p), rows, tiny("llama"), train=train)
        moved.append(read_metrics(tmp_path / str(p))[-1]["reward/margin"])
    assert abs(moved[0]) < 0.05 < moved[1]


def test_lengths_log_probabilities_and_the_supervised_term_are_logged(tmp_path: Path, tiny: Tiny) -> None:
    for weight in (0.0, 0.5):
        folder = tmp_path / str(weight)
        run_stage("dpo", folder, [preference(1, "yes " * 5, "no", p=0.7)], tiny("llama"), sft_weight=weight)
        entry = read_metrics(folder)[0]
        assert entry["length/chosen"] > entry["length/rejected"] > 1
        assert entry["log_prob/chosen"] < 0
        assert entry["log_prob/rejected"] < 0
        assert {"reward/accuracy", "reward/margin", "log_ratio/chosen", "num_input_tokens_seen"} <= entry.keys()
    chosen, rejected = (entry[f"log_prob/{side}"] / entry[f"length/{side}"] for side in ("chosen", "rejected"))
    assert entry["loss/sft"] == pytest.approx(-(0.7 * chosen + 0.3 * rejected), rel=1e-4)
    assert entry["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert entry["loss"] == pytest.approx(entry["loss/dpo"] + 0.5 * entry["loss/sft"], rel=1e-4)


def test_the_supervised_term_makes_the_chosen_response_likelier(tmp_path: Path, tiny: Tiny) -> None:
    alike = [preference(number, "yes yes no", "yes yes yes", p=1.0) for number in range(16)]
    last_entries = {}
    for weight in (0.0, 1.0):
        train = {"learning_rate": 1e-3, "num_train_epochs": 4}
        run_stage("dpo", tmp_path / str(weight), alike, tiny("llama"), train=train, sft_weight=weight)
        last_entries[weight] = read_metrics(tmp_path / str(weight))[-1]
    assert last_entries[1.0]["log_ratio/chosen"] > max(0, last_entries[0.0]["log_ratio/chosen"])
    assert last_entries[1.0]["reward/margin"] > 0


def test_held_out_pairs_are_measured_not_learned(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_batches(monkeypatch, SoftDPOTrainer)
    tokenizer = Chat.load(tiny("llama")).tokenizer
    secret = [preference(number, "secret yes", "secret no", tags=["held_out"]) for number in range(20, 24)]
    odd = [preference(30, "same", "same"), preference(31, "sea " * 300)]
    rows = [*secret, *odd, *mixed(9)]
    figures = run_stage("dpo", tmp_path / "stage", rows, tiny("llama"), max_length=128)["training"]["stage"]
    learned, measured = (
        [tokenizer.decode(ids) for _, batch in batches for ids in batch["input_ids"] if batch["training"] == training]
        for training in (True, False)
    )
    assert len(learned) == 18
    assert not any("secret" in text for text in learned)
    assert len(measured) == 8
    assert all("secret" in text for text in measured)
    assert figures["left_out"] == {"held_out": 4, "identical": 1, "too_long": 1}
    assert figures["examples"] + sum(figures["left_out"].values()) == figures["pairs"] == len(rows)
    assert figures["held_out"]["pairs"] == 4
    assert figures["held_out"]["loss"] > 0


def test_a_stage_with_no_pair_left_says_why(tmp_path: Path, tiny: Tiny) -> None:
    rows = [preference(0, "same", "same"), preference(1, tags=["held_out"])]
    with pytest.raises(StageFailed, match="no pair to learn from; left out: 1 held out, 1 identical"):
        run_stage("dpo", tmp_path / "stage", rows, tiny("llama"))
