"""A reward model reads the end of the turn, whatever pads it, and is whole wherever it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from training_stages import CPU, preference

from cai.contracts.model import Model
from cai.models.chat import Chat
from cai.models.loading import load_sequence_classifier, load_tokenizer, unpartitioned
from cai.models.reference import resolve
from cai.models.reward_model import RewardModel
from cai.text.errors import BadInput
from cai.training.tokenised_rows import tokenised_pairs

torch = pytest.importorskip("torch")

FAMILIES = ["llama", "qwen2", "gpt_neox", "no_system", "pad_is_eos", "mistral", "thinking"]


def conversations(chat: Chat) -> list[list[int]]:
    """Of different lengths, each with the end of its turn."""
    pairs, _ = tokenised_pairs([preference(number) for number in range(5)], chat, 256)
    return [pair.prompt_ids + ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]


def saved_classifier(model: Model, folder: Path, **options: int) -> Model:
    """The model under a new head, on the disk."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    loaded = AutoModelForSequenceClassification.from_pretrained(model.path, **options)
    loaded.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return resolve(str(folder), folder=folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_is_read_at_the_end_of_the_turn_whatever_pads_it(family: str, tiny: Callable[..., Model]) -> None:
    torch.manual_seed(0)
    chat = Chat.load(tiny(family))
    judge = RewardModel(load_sequence_classifier(tiny(family)), chat, CPU)
    ids = conversations(chat)
    assert len({len(each) for each in ids}) > 2, "some must be padded"
    for each, found in zip(ids, judge.scores(ids), strict=True):
        assert each[-1] == chat.end_of_turn != chat.pad_id
        with torch.no_grad():
            hidden = judge.model.base_model(torch.tensor([each])).last_hidden_state[0, -1]
            expected = float(judge.model.score.weight @ hidden)
        assert found == pytest.approx(expected, abs=1e-4)


def test_batches_within_a_token_budget_change_no_score(tiny: Callable[..., Model]) -> None:
    torch.manual_seed(0)
    chat = Chat.load(tiny("llama"))
    model, ids = load_sequence_classifier(tiny("llama")), conversations(chat)
    seen: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True)
    alone = RewardModel(model, chat, CPU.model_copy(update={"token_budget": 256})).scores(ids)
    hook.remove()
    assert len(seen) > 1
    assert all(rows * columns <= 256 for rows, columns in seen)
    assert RewardModel(model, chat, CPU).scores(ids) == pytest.approx(alone, abs=1e-5)


def test_it_is_loaded_whole_and_frozen_while_deepspeed_parts_new_models(
    tmp_path: Path, tiny: Callable[..., Model]
) -> None:
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, is_deepspeed_zero3_enabled

    model = saved_classifier(tiny("llama"), tmp_path / "model", num_labels=1)
    plain = RewardModel.load(model, CPU)
    config = HfTrainerDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled()
    with unpartitioned():
        assert not is_deepspeed_zero3_enabled()
    again = RewardModel.load(model, CPU)
    assert is_deepspeed_zero3_enabled()
    del config
    assert not any(hasattr(weight, "ds_id") or weight.requires_grad for weight in again.model.parameters())
    ids = conversations(plain.chat)
    assert again.scores(ids) == plain.scores(ids)


def test_what_gives_no_single_score_is_refused(tmp_path: Path, tiny: Callable[..., Model]) -> None:
    for model, words in (
        (tiny("llama"), "is a language model"),
        (tiny("lora"), "is a language model"),
        (saved_classifier(tiny("llama"), tmp_path / "two", num_labels=2), "tells 2 labels apart"),
    ):
        with pytest.raises(BadInput, match=words):
            RewardModel.load(model, CPU)
