"""A bandit with a known optimum for trainers that learn from rewards: one prompt, one token, one arm in three pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cai.contracts.model import Model
from cai.models.chat import Chat
from cai.models.loading import load_causal_lm
from cai.storage.rows import Failure
from cai.training.rl.rewards import Response

PROMPT: Any = {"id": "p0", "messages": [{"role": "user", "content": "What is 0?"}], "tags": [], "source": "test"}
BETA = 0.5
"""Weight of the KL to the starting model."""


class Rewards:
    """Scores by a function of the response; None is a failure."""

    names = ("f",)

    def __init__(self, score: Callable[[Response], float | None]) -> None:
        self.score = score

    def scores(self, responses: Sequence[Response]) -> list[dict[str, float] | Failure]:
        scored = [(response, self.score(response)) for response in responses]
        return [Failure(response.prompt["id"], "none") if score is None else {"f": score} for response, score in scored]

    def total(self, scores: Mapping[str, float]) -> float:
        return scores["f"]


class Bandit:
    """The arms are the first tokens of a response to `PROMPT`."""

    def __init__(self, model: Model) -> None:
        chat = Chat.load(model)
        self.ids = chat.prompt_ids(PROMPT["messages"])
        self.before = self._arms(load_causal_lm(model))
        self.pays = torch.arange(len(self.before)) % 3 == 0
        self.can_be_sampled = torch.arange(len(self.before)) != chat.pad_id
        assert self.before[self.pays].sum() < 0.45

    def score(self, response: Response) -> float:
        return float(self.pays[response.token_ids[0]])

    def assert_solved(self, policy: Any) -> None:
        """Compares with the optimum of E[r] - β KL, π ∝ π_ref exp(r/β).

        The policy must have the optimum's share of paying arms, and nine tenths of its gain.
        """
        after = self._arms(policy)
        optimum = self.before * torch.exp(self.pays.float() / BETA)
        optimum /= optimum.sum()
        assert float(after[self.pays].sum()) == pytest.approx(float(optimum[self.pays].sum()), abs=0.03)
        gain, most = (self._objective(arms) - self._objective(self.before) for arms in (after, optimum))
        assert gain > 0.9 * most

    def _objective(self, arms: Tensor) -> float:
        return float(arms[self.pays].sum() - BETA * (arms * (arms / self.before).log())[self.can_be_sampled].sum())

    @torch.no_grad()
    def _arms(self, model: Any) -> Tensor:
        """(vocabulary,): the distribution of a response's first token."""
        arms: Tensor = model(input_ids=torch.tensor([self.ids])).logits[0, -1].float().softmax(dim=0)
        return arms
