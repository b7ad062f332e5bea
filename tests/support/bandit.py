"""One prompt, one token, one arm in three pays: a bandit whose optimum is known, for all that learn from rewards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cai.contracts.model import Model
from cai.models.chat import Chat
from cai.models.loading import load_causal_lm
from cai.training.rl.rewards import Response

PROMPT: Any = {"id": "p0", "messages": [{"role": "user", "content": "What is 0?"}], "tags": [], "source": "test"}
BETA = 0.5
"""Weight of the KL to the model that is started from."""


class Bandit:
    """The arms are the tokens that `model` draws first in a response to `PROMPT`."""

    def __init__(self, model: Model) -> None:
        chat = Chat.load(model)
        self.ids = chat.prompt_ids(PROMPT["messages"])
        self.before = self._arms(load_causal_lm(model))
        self.pays = torch.arange(len(self.before)) % 3 == 0
        self.drawn = torch.arange(len(self.before)) != chat.pad_id
        assert self.before[self.pays].sum() < 0.45

    def score(self, response: Response) -> float:
        return float(self.pays[response.token_ids[0]])

    def assert_solved(self, policy: Any) -> None:
        """The optimum of E[r] - β KL is π ∝ π_ref exp(r/β): its share of arms that pay, and nine tenths of its gain."""
        after = self._arms(policy)
        wanted = self.before * torch.exp(self.pays.float() / BETA)
        wanted /= wanted.sum()
        assert float(after[self.pays].sum()) == pytest.approx(float(wanted[self.pays].sum()), abs=0.03)
        gain, most = (self._objective(each) - self._objective(self.before) for each in (after, wanted))
        assert gain > 0.9 * most

    def _objective(self, arms: Tensor) -> float:
        return float(arms[self.pays].sum() - BETA * (arms * (arms / self.before).log())[self.drawn].sum())

    @torch.no_grad()
    def _arms(self, model: Any) -> Tensor:
        """(vocabulary,): the distribution of a response's first token."""
        arms: Tensor = model(input_ids=torch.tensor([self.ids])).logits[0, -1].float().softmax(dim=0)
        return arms
