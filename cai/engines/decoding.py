"""The decoding loop: prompts in; drawn ids and their log-probabilities out. Tensors, no texts.

Rows are padded on the left and share one key/value cache, whose room is allocated once. A row's randomness is a row of
uniforms from its own seed, put through the inverse of the cumulative distribution: what else is in the batch does not
touch it. Rows that have ended leave the batch when half of it has.

Left out: beams, penalties, speculative decoding, sharing one prefill between samples of one prompt.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cai.engines import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one prompt: ids, natural log-probabilities, and whether it ended by itself."""

    token_ids: list[int]
    log_probs: list[float]
    ended: bool


class Room(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, (batch, heads, seq, width), growing in place into room made beforehand."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.filled = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.all_keys = _room_like(key_states, self.length)
            self.all_values = _room_like(value_states, self.length)
            self.is_initialized: bool = True
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        self.all_keys[:, :, start : self.filled] = key_states
        self.all_values[:, :, start : self.filled] = value_states
        self.keys = self.all_keys[:, :, : self.filled]
        self.values = self.all_values[:, :, : self.filled]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for name in ("all_keys", "all_values"):
            old = getattr(self, name)
            new = old.new_empty((len(indices), *old.shape[1:]))
            new[:, :, : self.filled] = old[:, :, : self.filled].index_select(0, indices)
            setattr(self, name, new)
        self.keys = self.all_keys[:, :, : self.filled]
        self.values = self.all_values[:, :, : self.filled]


def _room_like(states: torch.Tensor, length: int) -> torch.Tensor:
    batch, heads, _, width = states.shape
    return states.new_empty((batch, heads, length, width))


def new_cache(model: PreTrainedModel, length: int) -> DynamicCache:
    """An empty cache for sequences of up to `length` tokens."""
    cache = DynamicCache(config=model.config)
    if cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [Room(length) for _ in cache.layers]
    return cache  # layers of other kinds (sliding windows, states) keep their own way of growing


@functools.cache
def _knows(kind: type[PreTrainedModel]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def accepted(model: PreTrainedModel, **arguments: object) -> dict[str, Any]:
    """Those of `arguments` that this model's forward knows: not all count positions or take `logits_to_keep`."""
    return {name: value for name, value in arguments.items() if name in _knows(type(model))}  # type: ignore[arg-type]


def padded_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (batch, seq)."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def uniforms(seeds: Sequence[int], length: int) -> torch.Tensor:
    """(batch, length) float64 in [0, 1): each row depends on its seed alone."""
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling, banned: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row and its log-probability, both (batch,), from `logits`, (batch, vocabulary), float32.

    The log-probability is the model's own, in nats: of the whole distribution, at temperature 1, before `sampling` and
    `banned` narrow it.
    """
    normaliser = logits.logsumexp(dim=-1)
    scores = logits
    if banned:
        scores = logits.clone()
        scores[:, list(banned)] = -torch.inf
    if sampling.temperature == 0:
        tokens = scores.argmax(dim=-1)
    else:
        scores = scores / sampling.temperature
        if 0 < sampling.top_k < scores.shape[-1]:
            least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        probabilities = scores.softmax(dim=-1)
        if sampling.top_p < 1:
            ordered = probabilities.sort(dim=-1, descending=True).values
            kept = ordered.cumsum(dim=-1) - ordered < sampling.top_p
            least = ordered.masked_fill(~kept, torch.inf).min(dim=-1, keepdim=True).values
            probabilities = probabilities.masked_fill(probabilities < least, 0)
        cumulative = probabilities.to(torch.float64).cumsum(dim=-1)
        target = uniform.to(cumulative.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logits.gather(-1, tokens[:, None])[:, 0] - normaliser


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    banned: Sequence[int] = (),
    stopped: Callable[[list[int]], bool] | None = None,
) -> list[Drawn]:
    """Draws a response to each prompt, all in one batch. `stopped` looks at the ids drawn for one row so far."""
    device = model.device
    ids, mask = (each.to(device) for each in padded_left(prompts, pad_id))
    length = ids.shape[1]
    mask = torch.nn.functional.pad(mask, (0, sampling.max_new_tokens), value=1)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    cache = new_cache(model, length + sampling.max_new_tokens)
    chance = uniforms(seeds, sampling.max_new_tokens) if sampling.temperature else torch.empty(len(prompts), 0)
    ends = torch.tensor(sorted(end_ids), device=device)
    drawn = torch.full((len(prompts), sampling.max_new_tokens), pad_id, device=device)
    log_probs = torch.zeros(drawn.shape, device=device)
    lengths = torch.full((len(prompts),), sampling.max_new_tokens, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    rows = torch.arange(len(prompts), device=device)  # which prompts are still in the batch
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    start = 0
    for step in range(sampling.max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask[:, : length + step],
            past_key_values=cache,
            use_cache=True,
            **accepted(model, position_ids=positions[:, start : length + step], logits_to_keep=1),
        )
        uniform = chance[rows.cpu(), step] if sampling.temperature else chance
        tokens, chosen = draw(output.logits[:, -1].float(), uniform, sampling, banned)
        drawn[rows[running], step] = tokens[running]
        log_probs[rows[running], step] = chosen[running]
        over = torch.isin(tokens, ends)
        if stopped is not None:
            so_far = drawn[rows, : step + 1].tolist()
            over |= torch.tensor([stopped(row) for row in so_far], device=device)
        lengths[rows[running & over]] = step + 1
        ended[rows[running & over]] = True
        running &= ~over
        left = int(running.sum())
        if left == 0:
            break
        if left <= len(rows) // 2:
            keep = running.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, mask, positions, tokens = rows[keep], mask[keep], positions[keep], tokens[keep]
            running = running[keep]
        ids, start = tokens[:, None], length + step
    return [
        Drawn(row[:count], values[:count], over)
        for row, values, count, over in zip(
            drawn.tolist(), log_probs.tolist(), lengths.tolist(), ended.tolist(), strict=True
        )
    ]
