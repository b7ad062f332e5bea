"""The next token of each row, drawn from logits with randomness that is the row's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cai.engines import Sampling


def uniforms(seeds: Sequence[int], length: int) -> torch.Tensor:
    """(batch, length) float64 in [0, 1): each row depends on its seed alone."""
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling, banned: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row and its log-probability, both (batch,), from `logits`, (batch, vocabulary), float32.

    `uniform`, (batch,), goes through the inverse of the cumulative distribution. The log-probability is the model's
    own, in nats: of the whole distribution, at temperature 1, before `sampling` and `banned` narrow it.
    """
    top = logits.amax(dim=-1, keepdim=True)
    weights = (logits - top).exp_()
    normaliser = weights.sum(dim=-1).log_() + top[:, 0]
    scores = logits
    if banned:
        scores = logits.index_fill(-1, torch.tensor(list(banned), device=logits.device), -torch.inf)
    if sampling.temperature == 0:
        tokens = scores.argmax(dim=-1)
    else:
        if banned or sampling.temperature != 1 or sampling.top_k:
            scores = scores / sampling.temperature
            if 0 < sampling.top_k < scores.shape[-1]:
                least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
                scores = scores.masked_fill(scores < least, -torch.inf)
            weights = scores.softmax(dim=-1)
        if sampling.top_p < 1:
            weights = weights.masked_fill(weights < _least_kept(weights, sampling.top_p), 0)
        cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
        target = uniform.to(cumulative.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logits.gather(-1, tokens[:, None])[:, 0] - normaliser


def _least_kept(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """(batch, 1): the smallest weight among the largest ones that together reach `top_p` of all.

    Looks at the few largest first, as they nearly always do, and sorts all only where they do not.
    """
    wanted = top_p * weights.sum(dim=-1, keepdim=True)
    size = weights.shape[-1]
    for few in (64, 1024, size):
        largest = weights.topk(min(few, size), dim=-1).values
        before = largest.cumsum(dim=-1) - largest
        if few >= size or bool((before[:, -1:] + largest[:, -1:] >= wanted).all()):
            break
    return largest.masked_fill(before >= wanted, torch.inf).amin(dim=-1, keepdim=True)
