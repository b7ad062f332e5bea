"""Rollouts: responses sampled from the policy with everything that learning needs, in a buffer that can be resumed.

Token ids are those that the engine sampled; nothing is decoded and encoded again. Every rank holds the whole buffer,
which is small beside a model: advantages are whitened over all of it, minibatches are the same on any number of ranks,
and a resume point holds it once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cai.contracts.engine import Completion
from cai.maths import losses
from cai.storage.rows import Failure

FILE = "rollout.safetensors"


@dataclass
class Episode:
    """One response. The tensors are (tokens,) each; log-probabilities and values are of the models at the rollout.

    `scores` has each source's reward by name and `score` their weighted sum. Where a reward failed, `score` is None,
    `failure` says why, and nothing is learned from the episode.
    """

    prompt_id: str
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finished: bool
    sampled_log_probs: list[float]
    """As the engine reports them, in its precision."""
    scores: dict[str, float] = field(default_factory=dict)
    score: float | None = None
    failure: Failure | None = None
    log_probs: Tensor = field(default_factory=lambda: torch.zeros(0))
    ref_log_probs: Tensor = field(default_factory=lambda: torch.zeros(0))
    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    returns: Tensor = field(default_factory=lambda: torch.zeros(0))

    @classmethod
    def of(cls, prompt_id: str, completion: Completion) -> Episode:
        """The episode of a completion, without rewards and log-probabilities of the models."""
        is_finished, ids = completion.finish_reason == "stop", completion.token_ids
        return cls(prompt_id, completion.prompt_ids, ids, completion.text, is_finished, completion.log_probs)

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def n_learned_tokens(self) -> int:
        """Tokens that are learned from."""
        return 0 if self.score is None else len(self.token_ids)


@dataclass(frozen=True)
class EpisodeBatch:
    """Conversations padded on the right: (batch, seq) each; labels are -100 where no token was sampled."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def response_mask(self) -> Tensor:
        """(batch, seq − 1): where the columns of `ActorCriticOutput` are about a sampled token."""
        return self.labels[:, 1:] != -100

    def scatter(self, values: Sequence[Tensor]) -> Tensor:
        """(tokens,) of each episode to (batch, seq − 1), zero where no token was sampled."""
        mask = self.response_mask
        flat = torch.cat(list(values)).to(mask.device)
        return flat.new_zeros(mask.shape).masked_scatter(mask, flat)

    def split(self, values: Tensor) -> list[Tensor]:
        """(batch, seq − 1) to (tokens,) of each episode, on the CPU in float32: the inverse of `scatter`."""
        counts = self.response_mask.sum(dim=1).tolist()
        return list(torch.split(values[self.response_mask].float().cpu(), counts))


def pad_episodes(episodes: Sequence[Episode], pad_id: int, device: torch.device) -> EpisodeBatch:
    """Episodes as one padded batch on `device`."""
    longest = max(episode.length for episode in episodes)
    ids = torch.full((len(episodes), longest), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, episode in enumerate(episodes):
        start = len(episode.prompt_ids)
        ids[row, : episode.length] = torch.tensor(episode.prompt_ids + episode.token_ids)
        mask[row, : episode.length] = 1
        labels[row, start : episode.length] = ids[row, start : episode.length]
    return EpisodeBatch(ids.to(device), mask.to(device), labels.to(device))


@dataclass
class Rollout:
    """The episodes of one rollout over all ranks, in an order that does not depend on the number of ranks."""

    number: int
    episodes: list[Episode]

    @property
    def learned(self) -> list[Episode]:
        """Episodes whose reward did not fail."""
        return [episode for episode in self.episodes if episode.score is not None]

    def kl(self, estimator: losses.KLEstimator) -> Tensor:
        """Mean over learned episodes of the KL to the reference, summed over a response's tokens, in nats."""
        kl = [losses.kl_estimate(episode.log_probs, episode.ref_log_probs, estimator) for episode in self.learned]
        return torch.stack([per_token.sum() for per_token in kl]).mean()

    def estimate_advantages(self, *, kl_coefficient: float, gamma: float, lam: float, missing_end: float) -> None:
        """Fills in returns and whitened advantages; a response that was cut off loses `missing_end` of its score.

        The KL in a token's reward is `k1`, the only estimator whose score-function gradient is that of the KL
        (`cai.maths.losses.KLEstimator`).
        """
        learned = self.learned
        masks = [torch.ones(len(episode.token_ids), dtype=torch.bool) for episode in learned]
        mask = pad_sequence(masks, batch_first=True)
        log_probs, ref_log_probs, values = (
            pad_sequence([getattr(episode, name) for episode in learned], batch_first=True)
            for name in ("log_probs", "ref_log_probs", "values")
        )
        scores = torch.tensor([(episode.score or 0.0) - missing_end * (not episode.finished) for episode in learned])
        kl = losses.kl_estimate(log_probs, ref_log_probs, "k1")
        rewards = losses.rewards_at_tokens(scores, kl, mask, kl_coefficient)
        advantages, returns = losses.generalised_advantages(rewards, values, mask, gamma, lam)
        advantages = losses.whitened(advantages, mask)
        for episode, advantage_row, return_row in zip(learned, advantages, returns, strict=True):
            n_tokens = len(episode.token_ids)
            episode.advantages, episode.returns = advantage_row[:n_tokens], return_row[:n_tokens]
        for episode in self.episodes:
            if episode.score is None:
                episode.advantages = episode.returns = torch.zeros(len(episode.token_ids))

    def explained_variance(self) -> float | None:
        """Share of the returns' variance that the values at the rollout explain; None where all returns are equal."""
        returns = torch.cat([episode.returns for episode in self.learned])
        errors = returns - torch.cat([episode.values for episode in self.learned])
        variance = float(returns.var(correction=0))
        return 1 - float(errors.var(correction=0)) / variance if variance > 1e-12 else None

    def save(self, folder: Path, numbers: Mapping[str, float]) -> None:
        """Writes the buffer, and `numbers` that training continues with, into a resume point's folder."""
        tensors = {name: torch.cat([getattr(episode, name) for episode in self.episodes]) for name in _TENSOR_FIELDS}
        rows = [{name: getattr(episode, name) for name in _JSON_FIELDS} for episode in self.episodes]
        fields = json.dumps(rows, default=asdict)  # a failure
        # A tensor, since safetensors limits its header, where metadata lies, to 100 MB.
        tensors["episodes"] = torch.frombuffer(bytearray(fields.encode()), dtype=torch.uint8)
        metadata = {"number": str(self.number), "more": json.dumps(dict(numbers))}
        save_file(tensors, folder / FILE, metadata=metadata)

    @classmethod
    def load(cls, folder: Path) -> tuple[Rollout, dict[str, float]]:
        """(rollout, numbers) that `save` wrote, equal to the last bit."""
        with safe_open(folder / FILE, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in _TENSOR_FIELDS}
            fields = json.loads(file.get_tensor("episodes").numpy().tobytes())
        episodes = [Episode(**episode_fields) for episode_fields in fields]
        for episode, episode_fields in zip(episodes, fields, strict=True):
            episode.failure = episode_fields["failure"] and Failure.from_json(episode_fields["failure"])
        counts = [len(episode.token_ids) for episode in episodes]
        for name, tensor in tensors.items():
            for episode, values in zip(episodes, torch.split(tensor, counts), strict=True):
                setattr(episode, name, values.clone())
        return cls(int(metadata["number"]), episodes), json.loads(metadata["more"])


_TENSOR_FIELDS = ("log_probs", "ref_log_probs", "values", "advantages", "returns")
_JSON_FIELDS = ("prompt_id", "prompt_ids", "token_ids", "text", "finished", "sampled_log_probs", "scores", "score",
                "failure")  # fmt: skip
