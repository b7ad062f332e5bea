"""Inference with a reward model: conversations as token ids in, one score each out.

The score is that of the last token that is not padding, the end of the turn; pad is never eos here, so that is the
conversation's own last token. The stage `reward` trains reward models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Self

import torch

from cai.attention.cpu_tuning import tokens_per_pass
from cai.attention.token_batches import batch_by_tokens
from cai.attention.token_budget import TokenBudget
from cai.attention.token_trees import compute_shared_tokens_once
from cai.contracts.model import Model
from cai.models.chat import Chat
from cai.models.loading import load_sequence_classifier, pick_dtype, unpartitioned
from cai.models.model_files import check_role

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cai.contracts.profile import Profile


class RewardModel:
    """A frozen sequence classifier with one score, and the chat that makes its token ids."""

    def __init__(self, model: PreTrainedModel, chat: Chat, profile: Profile) -> None:
        self.model, self.chat, self.profile = model.requires_grad_(False).eval(), chat, profile
        self.model.config.get_text_config().use_cache = False  # no token is generated after those that are scored
        self._budget = TokenBudget(profile.token_budget, "the reward model")

    @classmethod
    def load(cls, model: Model, profile: Profile) -> Self:
        """The reward model, whole in this process, in the profile's precision.

        Raises BadInput for a language model, whose new head would be random, and for a classifier with several labels.
        """
        check_role(model, "score")
        with unpartitioned():
            return cls(load_sequence_classifier(model, profile.dtype, profile.device), Chat.load(model), profile)

    def scores(self, ids: Sequence[Sequence[int]], on_score: Callable[[], None] | None = None) -> list[float]:
        """The score of each token sequence, in the order given, computed within the profile's token budget.

        `on_score` is called as each score comes in.
        """
        scores = [0.0] * len(ids)
        device, dtype = self.model.device, pick_dtype(self.profile.dtype, self.model.device)
        with (
            compute_shared_tokens_once([self.model]),
            torch.inference_mode(),
            torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        ):
            for index, score in self._budget.run(ids, self._score_batches):
                scores[index] = score
                if on_score:
                    on_score()
        return scores

    def _score_batches(self, ids: Sequence[Sequence[int]], max_tokens: int) -> Iterator[tuple[int, float]]:
        """(index, score) of each token sequence, in batches of similar length."""
        device = self.model.device
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        sizes = [len(ids[index]) for index in order]
        for first, last in batch_by_tokens(sizes, tokens_per_pass(max_tokens, device)):
            batch = order[first:last]
            padded = torch.full((len(batch), sizes[last - 1]), self.chat.pad_id)
            mask = torch.zeros_like(padded)
            for row, index in enumerate(batch):
                padded[row, : len(ids[index])] = torch.tensor(ids[index])
                mask[row, : len(ids[index])] = 1
            logits = self.model(input_ids=padded.to(device), attention_mask=mask.to(device)).logits
            yield from zip(batch, logits.squeeze(-1).float().tolist(), strict=True)
