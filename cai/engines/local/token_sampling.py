"""Rows that are being decoded, and the sampling of their next tokens, with randomness that is each row's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cai.contracts.engine import Sampling

_ROWS_PER_CALL = 256
"""Rows sampled at once: sampling needs several times the memory of the rows' logits."""


class PromptAndSeed(NamedTuple):
    """A response to sample: the prompt's ids, and the seed that alone decides the response's randomness."""

    prompt: Sequence[int]
    seed: int


class SampledTokens(NamedTuple):
    """A sampled response: ids, their natural log-probabilities, and whether it stopped by itself."""

    token_ids: list[int]
    log_probs: list[float]
    is_stopped: bool


@dataclass
class Row:
    """A response that is being decoded: sample `sample_index` of prompt `prompt_index` of length bucket `bucket`.

    `request_index` is that of its request; `uniforms`, (max_new_tokens, 2), decide its tokens.
    """

    request_index: int
    prompt_length: int
    uniforms: list[list[float]]
    bucket: int = 0
    prompt_index: int = 0
    sample_index: int = 0
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    is_stopped: bool = False

    @property
    def is_finished(self) -> bool:
        """Whether it has stopped or has all the tokens that it may have."""
        return self.is_stopped or len(self.token_ids) == len(self.uniforms)

    @property
    def next_uniforms(self) -> list[float]:
        """The two uniforms of the next token; of a finished row, whose next token is dropped, any two."""
        return self.uniforms[min(len(self.token_ids), len(self.uniforms) - 1)]

    @property
    def sampled(self) -> SampledTokens:
        """Its tokens so far."""
        return SampledTokens(self.token_ids, self.log_probs, self.is_stopped)


@dataclass(frozen=True)
class TokenSampler:
    """How tokens are sampled, `banned_ids` never, and when a row stops: at `end_ids`, or where `ends_response` says."""

    sampling: Sampling
    end_ids: frozenset[int]
    ends_response: Callable[[list[int]], bool] | None = None
    banned_ids: Sequence[int] = ()
    on_tokens: Callable[[int], None] | None = None
    """Called with the number of tokens sampled at each step."""

    def extend(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Samples a token for each row from its (row, vocabulary) logits; finished rows stay as they are."""
        uniforms = torch.tensor([row.next_uniforms for row in rows], dtype=torch.float64)
        sampled: list[tuple[int, float]] = []
        for first in range(0, len(rows), _ROWS_PER_CALL):
            part = slice(first, first + _ROWS_PER_CALL)
            tokens, log_probs = sample_tokens(logits[part].float(), uniforms[part], self.sampling, self.banned_ids)
            sampled += zip(tokens.tolist(), log_probs.tolist(), strict=True)
        if self.on_tokens:
            self.on_tokens(sum(not row.is_finished for row in rows))
        for row, (token_id, log_prob) in zip(rows, sampled, strict=True):
            if not row.is_finished:
                row.token_ids.append(token_id)
                row.log_probs.append(log_prob)
                row.is_stopped = token_id in self.end_ids or (
                    self.ends_response is not None and self.ends_response(row.token_ids)
                )


def sample_uniforms(seed: int, n_tokens: int) -> list[list[float]]:
    """(n_tokens, 2) uniform random numbers in [0, 1), float64, that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_tokens, 2, generator=generator, dtype=torch.float64).tolist()


def sample_tokens(
    logits: Tensor, uniforms: Tensor, sampling: Sampling, banned_ids: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-probability, both (batch,), from `logits`, (batch, vocabulary), float32.

    `uniforms`, (batch, 2), decide which token is sampled. The log-probability is the model's own, in nats: under the
    whole distribution, at temperature 1, before `sampling` and `banned_ids` narrow it.
    """
    highest = logits.amax(dim=-1, keepdim=True)
    weights = (logits - highest).exp_()
    normaliser = weights.sum(dim=-1).log_() + highest[:, 0]
    scores = logits
    if banned_ids:
        scores = logits.index_fill(-1, torch.tensor(list(banned_ids), device=logits.device), -torch.inf)
    if sampling.temperature == 0:
        tokens = scores.argmax(dim=-1)
    else:
        if banned_ids or sampling.temperature != 1 or sampling.top_k:
            scores = scores / sampling.temperature
            if 0 < sampling.top_k < scores.shape[-1]:
                lowest_kept = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
                scores = scores.masked_fill(scores < lowest_kept, -torch.inf)
            weights = scores.softmax(dim=-1)
        uniforms = uniforms.to(logits.device)
        tokens = _invert_cumulative(weights, uniforms[:, 0])
        if sampling.top_p < 1:
            outside = _rows_outside_nucleus(weights, tokens, sampling.top_p)
            tokens[outside] = _invert_cumulative(_nucleus(weights[outside], sampling.top_p), uniforms[outside, 1])
    return tokens, logits.gather(-1, tokens[:, None])[:, 0] - normaliser


def _invert_cumulative(weights: Tensor, uniforms: Tensor) -> Tensor:
    """(batch,) tokens: the inverse of each row's cumulative distribution at `uniforms`, (batch,)."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    target = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)


def _rows_outside_nucleus(weights: Tensor, tokens: Tensor, top_p: float) -> Tensor:
    """The rows, at most 1 - `top_p` of them, whose token is not in the nucleus: likelier tokens reach `top_p` alone."""
    # Sampling these again gives the same distribution as finding the nucleus of every row, which needs most of a sort.
    likelier = torch.where(weights > weights.gather(-1, tokens[:, None]), weights, 0).sum(dim=-1)
    return (likelier >= top_p * weights.sum(dim=-1)).nonzero()[:, 0]


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """The weights, 0 outside of the nucleus: the fewest largest ones that reach `top_p` (Holtzman et al. 2020)."""
    ordered = weights.sort(dim=-1, descending=True).values
    is_needed = ordered.cumsum(dim=-1) - ordered < top_p * weights.sum(dim=-1, keepdim=True)
    lowest_kept = ordered.masked_fill(~is_needed, torch.inf).amin(dim=-1, keepdim=True)
    return weights.masked_fill(weights < lowest_kept, 0)
