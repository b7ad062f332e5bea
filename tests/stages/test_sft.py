"""What SFT learns and what it must not, on tiny models of several families."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Tiny
from training_stages import Killed, Steps, ask, record_batches, run_stage, sample, stage_context, trained

from cai.contracts.references import failures_read
from cai.models.chat import Chat
from cai.models.loading import load_causal_lm
from cai.stages.sft import Config, run, select
from cai.storage.rows import row_lines
from cai.text.errors import BadInput, StageFailed
from cai.training import loop
from cai.training.loop import newest_resume_point
from cai.training.metrics import read_metrics
from cai.training.trainers import SupervisedTrainer


def revision(number: int, response: str, original: str = "Sure, here is how.", **fields: Any) -> dict[str, Any]:
    """A Revision row with one round."""
    outcome = "unchanged" if response == original else "revised"
    rounds = [{"principle": "kind", "critique": "It is unkind.", "revision": response, "outcome": outcome}]
    return sample(number, response, original=original, rounds=rounds, **fields)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "no_system", "pad_is_eos", "thinking"])
def test_only_the_response_is_learned(family: str, tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_batches(monkeypatch, SupervisedTrainer)
    rows = [sample(1, "The sea."), sample(2, "The lock is in the door, of course."), sample(3, "Yes!")]
    run_stage("sft", tmp_path / "stage", rows, tiny(family))
    chat = Chat.load(tiny(family))
    learned: Counter[str] = Counter()
    for _, batch in batches:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            chosen = labels != -100
            assert (ids[mask == 0] == chat.pad_id).all()
            assert not chosen[mask == 0].any()
            assert (labels[chosen] == ids[chosen]).all()
            assert chosen[int(mask.sum()) - 1]
            assert not chosen[0]
            assert int(labels[chosen][-1]) == chat.end_of_turn != chat.pad_id
            learned[chat.text(labels[chosen].tolist()).text] += 1
    assert learned == Counter(row["response"] for row in rows)
    assert any((batch["attention_mask"] == 0).any() for _, batch in batches)


def test_rows_that_are_unrevised_cut_off_held_out_or_empty_are_left_out_and_counted() -> None:
    original = "Sure, here is how."
    revisions = [revision(0, "I would rather not."), revision(1, original), revision(2, "No.", tags=["held_out"])]
    samples = [
        sample(0, original), sample(1, original), sample(3), sample(4, finish_reason="length"), sample(5, " \n"),
        sample(6, tags=["held_out"]), sample(7),
    ]  # fmt: skip
    failed = {"revisions": {samples[-1]["id"]}, "responses": set()}
    kept, left_out = select({"revisions": revisions, "responses": samples}, failed)
    assert kept == {"revisions": [revisions[0]], "responses": [samples[2]]}
    assert left_out == {
        "not_revised": 1, "held_out": 2, "superseded": 2, "cut_off": 1, "empty": 1, "revision_failed": 1,
    }  # fmt: skip


def test_the_first_stage_named_has_the_prompt_and_all_its_rows() -> None:
    first, second = [sample(0, "one"), sample(0, "two")], [sample(0, "three"), sample(1)]
    kept, left_out = select({"a": first, "b": second}, {"a": set(), "b": set()})
    assert kept == {"a": first, "b": [second[1]]}
    assert left_out == {"superseded": 1}


def test_a_revision_takes_precedence_wherever_its_stage_is_named() -> None:
    revised, failed, raw = revision(0, "I would rather not."), sample(1, "Sure."), sample(0, "Sure, here is how.")
    stages = {"responses": [raw, failed, sample(2)], "revisions": [revised]}
    kept, left_out = select(stages, {"responses": set(), "revisions": {failed["id"]}})
    assert kept == {"responses": [sample(2)], "revisions": [revised]}
    assert left_out == {"superseded": 1, "revision_failed": 1}


def test_held_out_prompts_never_reach_the_model(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_batches(monkeypatch, SupervisedTrainer)
    secret = [sample(number, "secret", tags=["held_out"]) for number in range(10, 14)]
    long = [sample(20, "sea " * 400)]
    refused = [sample(21, prompt=[{"role": "assistant", "content": "I begin."}])]
    open_rows = [sample(number) for number in range(6)]
    rows = secret + long + refused + open_rows
    figures = run_stage("sft", tmp_path / "stage", rows, tiny("no_system"), max_length=128)["training"]["stage"]
    chat = Chat.load(tiny("no_system"))
    assert figures["examples"] + sum(figures["left_out"].values()) == len(rows)
    assert figures["left_out"] == {"held_out": 4, "too_long": 1, "refused_by_template": 1}
    texts = [chat.tokenizer.decode(ids) for _, batch in batches for ids in batch["input_ids"]]
    assert len(texts) == 6
    assert not any("secret" in text for text in texts)


def test_a_stage_with_nothing_to_learn_says_what_was_left_out(tmp_path: Path, tiny: Tiny) -> None:
    rows = [sample(0, tags=["held_out"]), sample(1, finish_reason="length")]
    with pytest.raises(StageFailed, match="no response to learn from; left out: 1 cut off, 1 held out"):
        run_stage("sft", tmp_path / "stage", rows, tiny("llama"))


def test_four_examples_are_memorised_and_generated_again(tmp_path: Path, tiny: Tiny) -> None:
    rows = [sample(0, "The sea is wide."), sample(1, "Paris."), sample(2, "I will not help."), sample(3, "B")]
    train = {"num_train_epochs": 40, "learning_rate": 1e-2, "logging_steps": 10, "save_steps": 40}
    run_stage("sft", tmp_path / "stage", rows, tiny("llama"), batch_size=4, train=train)
    chat, model = Chat.load(trained(tmp_path / "stage")), load_causal_lm(trained(tmp_path / "stage"))
    for row in rows:
        prompt = torch.tensor([chat.prompt_ids(row["prompt"])])
        generated = model.generate(prompt, do_sample=False, max_new_tokens=24, eos_token_id=list(chat.end_ids))
        response_ids = generated[0, prompt.shape[1] :].tolist()
        assert chat.text(response_ids).text == row["response"]
        assert response_ids[-1] == chat.end_of_turn


def test_metrics_and_progress_tell_every_step(tmp_path: Path, tiny: Tiny) -> None:
    steps = Steps()
    figures = run_stage("sft", tmp_path / "stage", [sample(n) for n in range(16)], tiny("llama"), progress=steps)
    logged = read_metrics(tmp_path / "stage")
    assert [entry["step"] for entry in logged] == [1, 2]
    assert {"loss", "learning_rate", "grad_norm", "epoch", "mean_token_accuracy"} <= logged[0].keys()
    assert (steps.total, steps.n_finished) == (2, 2)
    assert steps.tokens == logged[-1]["num_input_tokens_seen"] > 0
    assert figures["training"]["stage"]["loss"] == {"first": logged[0]["loss"], "last": logged[1]["loss"]}
    written = json.loads((tmp_path / "stage" / "model" / "cai.json").read_text())
    assert written["kind"] == "sft"
    assert written["steps"] == 2
    assert written["examples"] == 16
    assert not (tmp_path / "stage" / "checkpoints").exists()


def test_the_last_step_is_logged_however_rarely_the_others_are(tmp_path: Path, tiny: Tiny) -> None:
    rows = [sample(n) for n in range(16)]
    figures = run_stage("sft", tmp_path / "stage", rows, tiny("llama"), train={"logging_steps": 50})
    logged = read_metrics(tmp_path / "stage")  # a step with a resume point among them
    assert logged[-1]["step"] == figures["training"]["stage"]["steps"]
    assert figures["training"]["stage"]["loss"] == {"first": logged[0]["loss"], "last": logged[-1]["loss"]}


def test_a_lora_over_an_adapter_loads_as_trained(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = torch.tensor([Chat.load(tiny("lora")).prompt_ids(ask("What is the sea?"))])
    before: list[Any] = []
    save_trained_model = loop.save_trained_model

    def spy(trainer: Any, *args: Any) -> None:
        trainer.model.eval()
        with torch.no_grad():
            before.append(trainer.model(probe).logits)
        save_trained_model(trainer, *args)

    monkeypatch.setattr(loop, "save_trained_model", spy)
    rows = [sample(number) for number in range(8)]
    run_stage("sft", tmp_path / "stage", rows, tiny("lora"), lora={"rank": 4}, train={"learning_rate": 1e-2})
    assert (tmp_path / "stage" / "model" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "stage" / "model" / "model.safetensors").exists()
    with torch.no_grad():
        start = load_causal_lm(tiny("lora"))(probe).logits
        after = load_causal_lm(trained(tmp_path / "stage"))(probe).logits
    torch.testing.assert_close(after, before[0], atol=1e-4, rtol=1e-4)
    assert (after - start).abs().max() > 0.01


def test_an_adapter_learns_ten_times_faster_unless_the_recipe_says(tiny: Tiny) -> None:
    settings = {"id": "stage", "from": "rows", "lora": {"rank": 4}}
    assert Config.model_validate(settings).train["learning_rate"] == pytest.approx(1e-4)
    assert Config.model_validate({**settings, "train": {"learning_rate": 5e-5}}).train["learning_rate"] == 5e-5
    assert Config.model_validate({"id": "stage", "from": "rows"}).train["learning_rate"] == 1e-5


def test_a_loss_that_is_no_number_ends_the_stage_in_one_sentence(tmp_path: Path, tiny: Tiny) -> None:
    train = {"learning_rate": 1e30, "max_grad_norm": 0.0, "num_train_epochs": 3}
    with pytest.raises(StageFailed, match=r"stage 'stage': `(loss|grad_norm)` is (nan|inf) at step \d; lower"):
        run_stage("sft", tmp_path / "stage", [sample(n) for n in range(16)], tiny("llama"), train=train)


def test_fields_that_the_trainer_refuses_are_one_sentence(tmp_path: Path, tiny: Tiny) -> None:
    message = "stage 'stage': `train:` is refused by SFTConfig: --save_steps must be an integer if bigger than 1: 1.5"
    with pytest.raises(BadInput, match=message):
        run_stage("sft", tmp_path / "stage", [sample(1)], tiny("llama"), train={"save_steps": 1.5})


def test_an_incomplete_resume_point_is_not_resumed_from(tmp_path: Path, tiny: Tiny) -> None:
    rows, train = [sample(number) for number in range(16)], {"num_train_epochs": 3, "save_steps": 2}
    with pytest.raises(Killed):
        run_stage("sft", tmp_path / "stage", rows, tiny("llama"), train=train, progress=Steps(die_at=5))
    newest = newest_resume_point(tmp_path / "stage")
    assert newest.name == "checkpoint-4"
    (newest / "COMPLETE").unlink()
    (newest / "model.safetensors").write_bytes(b"torn")
    steps = Steps()
    run_stage("sft", tmp_path / "stage", rows, tiny("llama"), train=train, progress=steps)
    assert steps.notes == ["resuming from checkpoint-2"]
    assert len(read_metrics(tmp_path / "stage")) == 6


def test_reports_go_to_tensorboard_where_asked(tmp_path: Path, tiny: Tiny) -> None:
    context = stage_context(tmp_path / "stage", {"rows": [sample(n) for n in range(8)]}, tiny("llama"))
    config = Config.model_validate({"id": "stage", "from": "rows"})
    run(config, replace(context, report_to=("tensorboard",), failures_read=failures_read(config)))
    assert list((tmp_path / "stage" / "tensorboard").glob("events.out.tfevents*"))


def test_failed_revisions_are_read_from_the_stage_that_failed(tmp_path: Path, tiny: Tiny) -> None:
    lost, rest = sample(1, "Sure, here is how."), [sample(number) for number in range(2, 6)]
    failures = tmp_path / "stage-revisions" / "failures.jsonl"
    failures.parent.mkdir()
    failures.write_text("".join(row_lines([{"id": lost["id"], "reason": "refused"}])))
    rows = {"revisions": [revision(0, "No.")], "responses": [lost, *rest]}
    figures = run_stage("sft", tmp_path / "stage", rows, tiny("llama"))["training"]["stage"]
    assert figures["left_out"] == {"revision_failed": 1}
    assert figures["examples"] == 5
