"""Inference with a reward model: conversations as token ids in, one score each out.

The score is that of the last token that is not padding, the end of the turn; pad is never eos here, so that is the
conversation's own last token. The stage `reward` trains reward models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch

from cai.attention.cpu_tuning import tokens_per_pass
from cai.attention.token_batches import batch_by_tokens
from cai.attention.token_trees import compute_shared_tokens_once
from cai.contracts.model import Model
from cai.models.chat import Chat
from cai.models.loading import load_sequence_classifier, pick_dtype, unpartitioned
from cai.models.reference import base_of, fetch, head, read_model_json
from cai.text.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cai.contracts.profile import Profile


class RewardModel:
    """A frozen sequence classifier with one score, and the chat that makes its token ids."""

    def __init__(self, model: PreTrainedModel, chat: Chat, profile: Profile) -> None:
        self.model, self.chat, self.profile = model.requires_grad_(False), chat, profile

    @classmethod
    def load(cls, model: Model, profile: Profile) -> Self:
        """The reward model, whole in this process, in the profile's precision.

        Raises BadInput for a language model, whose new head would be random, and for a classifier with several labels.
        """
        model = dataclasses.replace(model, path=str(fetch(model)))
        if head(model) == "language":
            raise BadInput(f"model {model.name!r} is a language model, expected a reward model: one with a score")
        # A config without `id2label` has transformers' default of two labels.
        n_labels = len(read_model_json(model, "config.json").get("id2label") or (0, 1))
        if base_of(model) is None and n_labels != 1:
            raise BadInput(f"model {model.name!r} tells {n_labels} labels apart, expected a reward model: one score")
        with unpartitioned():
            return cls(load_sequence_classifier(model, profile.dtype, profile.device), Chat.load(model), profile)

    def scores(self, ids: Sequence[Sequence[int]]) -> list[float]:
        """The score of each conversation, in the order given."""
        return score_sequences(self.model, ids, self.chat.pad_id, self.profile)


def score_sequences(model: PreTrainedModel, ids: Sequence[Sequence[int]], pad_id: int, profile: Profile) -> list[float]:
    """The score of each token sequence, computed in batches of similar length within the profile's token budget."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    sizes = [len(ids[index]) for index in order]
    scores = torch.zeros(len(ids))
    dtype = pick_dtype(profile.dtype, model.device)
    model.eval()
    with (
        compute_shared_tokens_once([model]),
        torch.inference_mode(),
        torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32),
    ):
        for first, last in batch_by_tokens(sizes, tokens_per_pass(profile.token_budget, model.device)):
            batch = order[first:last]
            padded = torch.full((len(batch), sizes[last - 1]), pad_id)
            mask = torch.zeros_like(padded)
            for row, index in enumerate(batch):
                padded[row, : len(ids[index])] = torch.tensor(ids[index])
                mask[row, : len(ids[index])] = 1
            logits = model(input_ids=padded.to(model.device), attention_mask=mask.to(model.device)).logits
            scores[batch] = logits.squeeze(-1).float().cpu()
    return scores.tolist()
