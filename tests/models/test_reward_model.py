"""A reward model scores the end of the turn, whatever pads it, and is loaded unpartitioned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Tiny
from training_stages import CPU, preference, saved_classifier
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, is_deepspeed_zero3_enabled

from cai.models.chat import Chat
from cai.models.loading import load_sequence_classifier, unpartitioned
from cai.models.reward_model import RewardModel
from cai.text.errors import BadInput
from cai.training.tokenised_rows import tokenise_pairs

FAMILIES = ["llama", "qwen2", "gpt_neox", "no_system", "pad_is_eos", "mistral", "thinking"]


def conversations(chat: Chat) -> list[list[int]]:
    """Conversations of different lengths, each with its end of turn."""
    pairs, _ = tokenise_pairs([preference(number) for number in range(5)], chat, 256)
    return [pair.prompt_ids + ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_is_that_of_the_end_of_the_turn_whatever_pads_it(family: str, tiny: Tiny) -> None:
    torch.manual_seed(0)
    chat = Chat.load(tiny(family))
    judge = RewardModel(load_sequence_classifier(tiny(family)), chat, CPU)
    ids = conversations(chat)
    assert len({len(conversation) for conversation in ids}) > 2, "some must be padded"
    for conversation, score in zip(ids, judge.scores(ids), strict=True):
        assert conversation[-1] == chat.end_of_turn != chat.pad_id
        with torch.no_grad():
            hidden = judge.model.base_model(torch.tensor([conversation])).last_hidden_state[0, -1]
            expected = float(judge.model.score.weight @ hidden)
        assert score == pytest.approx(expected, abs=1e-4)


def test_batches_within_a_token_budget_change_no_score(tiny: Tiny) -> None:
    torch.manual_seed(0)
    chat = Chat.load(tiny("llama"))
    model, ids = load_sequence_classifier(tiny("llama")), conversations(chat)
    batch_shapes: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: batch_shapes.append(inputs["input_ids"].shape), with_kwargs=True
    )
    alone = RewardModel(model, chat, CPU.model_copy(update={"token_budget": 256})).scores(ids)
    hook.remove()
    assert len(batch_shapes) > 1
    assert all(rows * columns <= 256 for rows, columns in batch_shapes)
    assert RewardModel(model, chat, CPU).scores(ids) == pytest.approx(alone, abs=1e-5)


def test_where_memory_runs_out_it_goes_on_with_half_the_tokens(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    chat = Chat.load(tiny("llama"))
    reward_model, ids = RewardModel(load_sequence_classifier(tiny("llama")), chat, CPU), conversations(chat) * 4
    expected = reward_model.scores(ids)
    forward, n_rows = type(reward_model.model).forward, []

    def fail_above_1000_tokens(self: Any, input_ids: torch.Tensor, **rest: Any) -> Any:
        if input_ids.numel() > 1000:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        n_rows.append(len(input_ids))
        return forward(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(type(reward_model.model), "forward", fail_above_1000_tokens)
    with pytest.warns(UserWarning, match="the reward model: memory ran out; going on with"):
        assert reward_model.scores(ids) == pytest.approx(expected, abs=1e-5)
    assert sum(n_rows) == len(ids), "what is scored stays"
    n_rows.clear()
    reward_model.scores(ids)
    assert sum(n_rows) == len(ids), "what was learned of memory stays"


def test_it_is_unpartitioned_and_frozen_while_deepspeed_partitions_new_models(tmp_path: Path, tiny: Tiny) -> None:
    model = saved_classifier(tiny("llama"), tmp_path / "model", num_labels=1)
    plain = RewardModel.load(model, CPU)
    config = HfTrainerDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled()
    with unpartitioned():
        assert not is_deepspeed_zero3_enabled()
    partitioned_load = RewardModel.load(model, CPU)
    assert is_deepspeed_zero3_enabled()
    del config
    assert not any(hasattr(weight, "ds_id") or weight.requires_grad for weight in partitioned_load.model.parameters())
    ids = conversations(plain.chat)
    assert partitioned_load.scores(ids) == plain.scores(ids)


def test_what_gives_no_single_score_is_refused(tmp_path: Path, tiny: Tiny) -> None:
    for model, message in (
        (tiny("llama"), "is a language model"),
        (tiny("lora"), "is a language model"),
        (saved_classifier(tiny("llama"), tmp_path / "two", num_labels=2), "tells 2 labels apart"),
    ):
        with pytest.raises(BadInput, match=message):
            RewardModel.load(model, CPU)
