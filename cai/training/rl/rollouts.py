"""Rollouts: responses drawn from the policy, with all that learning from them needs, in a buffer that survives a kill.

Token ids are those that the engine drew; nothing is decoded and encoded again. Every rank holds the whole buffer, which
is small beside a model, so that advantages are whitened over all of it, minibatches are the same on any number of ranks
and a checkpoint holds it once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cai.maths import losses

FILE = "rollout.safetensors"


@dataclass
class Episode:
    """One response. `log_probs`, `ref_log_probs` and `values` are (tokens,) each, of the policy at the rollout.

    `scores` has each source's reward by name and `score` their weighted sum; of an episode whose reward failed it is
    None, and nothing is learned from it.
    """

    prompt_id: str
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finished: bool
    sampled_log_probs: list[float]
    """By the engine's own account, in its precision."""
    scores: dict[str, float] = field(default_factory=dict)
    score: float | None = None
    log_probs: Tensor = field(default_factory=lambda: torch.zeros(0))
    ref_log_probs: Tensor = field(default_factory=lambda: torch.zeros(0))
    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    returns: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def n_learned(self) -> int:
        """Tokens that are learned from."""
        return 0 if self.score is None else len(self.token_ids)


@dataclass(frozen=True)
class Sequences:
    """Conversations as a model takes them, padded on the right: (batch, seq) each, labels -100 where none is drawn."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def mask(self) -> Tensor:
        """(batch, seq − 1): where `Scored` is about a drawn token."""
        return self.labels[:, 1:] != -100

    def spread(self, values: Sequence[Tensor]) -> Tensor:
        """One value a drawn token, (tokens,) of each row, to where the model's are: (batch, seq − 1), else zero."""
        mask = self.mask
        flat = torch.cat(list(values)).to(mask.device)
        return flat.new_zeros(mask.shape).masked_scatter(mask, flat)

    def rows(self, values: Tensor) -> list[Tensor]:
        """(batch, seq − 1) to the values at each row's drawn tokens, on the CPU in float32."""
        counts = self.mask.sum(dim=1).tolist()
        return list(torch.split(values[self.mask].float().cpu(), counts))


def sequences(episodes: Sequence[Episode], pad_id: int, device: torch.device) -> Sequences:
    """Episodes as one padded batch on `device`."""
    longest = max(each.length for each in episodes)
    ids = torch.full((len(episodes), longest), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, each in enumerate(episodes):
        start = len(each.prompt_ids)
        ids[row, : each.length] = torch.tensor(each.prompt_ids + each.token_ids)
        mask[row, : each.length] = 1
        labels[row, start : each.length] = ids[row, start : each.length]
    return Sequences(ids.to(device), mask.to(device), labels.to(device))


@dataclass
class Rollout:
    """The episodes of one rollout over all ranks, in an order that does not depend on how many there are."""

    number: int
    episodes: list[Episode]

    @property
    def learned(self) -> list[Episode]:
        """Those whose reward did not fail."""
        return [each for each in self.episodes if each.score is not None]

    def kl(self, estimator: losses.KLEstimator) -> Tensor:
        """Mean over learned episodes of the KL to the reference, summed over a response's tokens, in nats."""
        sums = [losses.kl_estimate(each.log_probs, each.ref_log_probs, estimator).sum() for each in self.learned]
        return torch.stack(sums).mean()

    def estimate_advantages(
        self, *, kl_coefficient: float, estimator: losses.KLEstimator, gamma: float, lam: float, missing_end: float
    ) -> None:
        """Fills in advantages, whitened over the whole rollout, and returns.

        A response that was cut off loses `missing_end` of its score.
        """
        learned = self.learned
        mask = pad_sequence([torch.ones(len(each.token_ids), dtype=torch.bool) for each in learned], batch_first=True)
        log_probs, ref_log_probs, values = (
            pad_sequence([getattr(each, name) for each in learned], batch_first=True)
            for name in ("log_probs", "ref_log_probs", "values")
        )
        scores = torch.tensor([(each.score or 0.0) - missing_end * (not each.finished) for each in learned])
        kl = losses.kl_estimate(log_probs, ref_log_probs, estimator)
        rewards = losses.rewards_at_tokens(scores, kl, mask, kl_coefficient)
        advantages, returns = losses.generalised_advantages(rewards, values, mask, gamma, lam)
        advantages = losses.whitened(advantages, mask)
        for each, row, wanted in zip(learned, advantages, returns, strict=True):
            each.advantages, each.returns = row[: len(each.token_ids)], wanted[: len(each.token_ids)]
        for each in self.episodes:
            if each.score is None:
                each.advantages = each.returns = torch.zeros(len(each.token_ids))

    def explained_variance(self) -> float | None:
        """Share of the returns' variance that the values at the rollout explain, None where they are equal."""
        returns = torch.cat([each.returns for each in self.learned])
        errors = returns - torch.cat([each.values for each in self.learned])
        variance = float(returns.var(correction=0))
        return 1 - float(errors.var(correction=0)) / variance if variance > 1e-12 else None

    def save(self, folder: Path, more: Mapping[str, float]) -> None:
        """Writes the buffer, and numbers to go on with, into a checkpoint's folder."""
        tensors = {name: torch.cat([getattr(each, name) for each in self.episodes]) for name in _FLOATS}
        facts = json.dumps([{name: getattr(each, name) for name in _FACTS} for each in self.episodes])
        tensors["episodes"] = torch.frombuffer(bytearray(facts.encode()), dtype=torch.uint8)  # a header ends at 100 MB
        metadata = {"number": str(self.number), "more": json.dumps(dict(more))}
        save_file(tensors, folder / FILE, metadata=metadata)

    @classmethod
    def load(cls, folder: Path) -> tuple[Rollout, dict[str, float]]:
        """What `save` wrote, the same to the last bit."""
        with safe_open(folder / FILE, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in _FLOATS}
            facts = json.loads(file.get_tensor("episodes").numpy().tobytes())
        episodes = [Episode(**each) for each in facts]
        counts = [len(each.token_ids) for each in episodes]
        for name, tensor in tensors.items():
            for each, values in zip(episodes, torch.split(tensor, counts), strict=True):
                setattr(each, name, values.clone())
        return cls(int(metadata["number"]), episodes), json.loads(metadata["more"])


_FLOATS = ("log_probs", "ref_log_probs", "values", "advantages", "returns")
_FACTS = ("prompt_id", "prompt_ids", "token_ids", "text", "finished", "sampled_log_probs", "scores", "score")
