"""The next token of each row, drawn from logits with randomness that is the row's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cai.contracts.engine import Sampling


def uniforms(seeds: Sequence[int], length: int) -> torch.Tensor:
    """(batch, length, 2) float64 in [0, 1): each row depends on its seed alone."""
    rows = [torch.rand(length, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling, banned: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row and its log-probability, both (batch,), from `logits`, (batch, vocabulary), float32.

    `uniform`, (batch, 2), decides what is drawn. The log-probability is the model's own, in nats: of the whole
    distribution, at temperature 1, before `sampling` and `banned` narrow it.
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
        uniform = uniform.to(logits.device)
        tokens = _drawn(weights, uniform[:, 0])
        if sampling.top_p < 1:
            outside = _outside(weights, tokens, sampling.top_p)
            tokens[outside] = _drawn(_nucleus(weights[outside], sampling.top_p), uniform[outside, 1])
    return tokens, logits.gather(-1, tokens[:, None])[:, 0] - normaliser


def _drawn(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(batch,): `uniform` put through the inverse of each row's cumulative distribution."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)


def _outside(weights: torch.Tensor, tokens: torch.Tensor, top_p: float) -> torch.Tensor:
    """The rows whose token is none of the likeliest that together reach `top_p`: likelier ones reach it without it.

    One draw in 1 / (1 - top_p) or fewer is such. To draw these again from the likeliest alone gives the same
    distribution as to look for the likeliest in every row, which needs most of a sort.
    """
    likelier = torch.where(weights > weights.gather(-1, tokens[:, None]), weights, 0).sum(dim=-1)
    return (likelier >= top_p * weights.sum(dim=-1)).nonzero()[:, 0]


def _nucleus(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """The weights, all but the largest ones that together reach `top_p` set to 0 (Holtzman et al. 2020)."""
    ordered = weights.sort(dim=-1, descending=True).values
    needed = ordered.cumsum(dim=-1) - ordered < top_p * weights.sum(dim=-1, keepdim=True)
    least = ordered.masked_fill(~needed, torch.inf).amin(dim=-1, keepdim=True)
    return weights.masked_fill(weights < least, 0)
