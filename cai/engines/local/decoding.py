"""Continuous batching: prompts as token ids in; sampled ids and their log-probabilities out.

`decode` repeats four steps until every response is finished:

1. Admit: while the token budget allows, waiting prompts are prefilled, the longest first. A prompt is computed once for
   a group of its samples, each of which becomes a running row; only very large groups are split.
2. Decode: one forward pass gives the next logits of every row. A row attends to its prompt, whose keys and values lie
   in a length bucket among prompts of about the same length, and to its own tokens in the generated-token KV cache.
3. Sample: each row's logits and its own uniforms give its next token. The uniforms come from the request's seed, so
   that the order of admission changes no response, up to the rounding of logits in another batch.
4. Evict: once enough rows are finished they are returned, and their part of the budget goes to waiting prompts.

Left out: beam search, penalties, speculative decoding, chunked prefill, pages of the KV cache (every row reserves
`max_new_tokens`).
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from cai.attention.cpu_tuning import KV_CACHE_STEP, length_bucket, tokens_per_pass
from cai.attention.patched_attention import forward_with_attention
from cai.attention.prefill import prefill
from cai.attention.shared_prefixes import (
    OwnKeyValues,
    Prefixes,
    PrefixGroups,
    PrefixKeyValues,
    concatenate,
    fold_query_heads,
    joint_attention,
    mask_to_bias,
)
from cai.attention.token_batches import batch_by_tokens
from cai.engines.local.token_sampling import PromptAndSeed, Row, SampledTokens, TokenSampler, sample_uniforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FINISHED_SHARE_TO_EVICT = 1 / 32
"""Finished rows are evicted once they are this share of the batch. Until then they are computed in vain; evicting them
one at a time would copy rows of the KV cache after nearly every step."""
_FREE_SHARE_TO_ADMIT = 1 / 8
"""Prompts are admitted once this share of the token budget is free, because prefilling few prompts at once is slow."""


class _PromptGroup(NamedTuple):
    """Requests with the same prompt, by their indices."""

    prompt: Sequence[int]
    request_indices: list[int]


@torch.inference_mode()
def decode(
    model: PreTrainedModel, requests: Sequence[PromptAndSeed], sampler: TokenSampler, token_budget: int
) -> Iterator[tuple[int, SampledTokens]]:
    """(request index, response) in the order in which responses finish.

    Padded prompts, and `max_new_tokens` for every running row, stay within `token_budget`; where no row is running, one
    group is admitted even if it is larger.
    """
    max_new_tokens = sampler.sampling.max_new_tokens
    waiting = deque(_group_by_prompt(requests, token_budget, max_new_tokens))
    max_samples = max((len(group.request_indices) for group in waiting), default=0)
    batch = _RunningBatch(model, max_samples, max_new_tokens)
    while waiting or batch.rows:
        if groups := _pop_groups_that_fit(waiting, batch, token_budget):
            new_rows, logits = batch.admit(groups, requests)
            sampler.extend(new_rows, logits)
        while sum(row.is_finished for row in batch.rows) < _FINISHED_SHARE_TO_EVICT * len(batch.rows):
            sampler.extend(batch.rows, batch.decode_step())
        yield from ((row.request_index, row.sampled) for row in batch.evict_finished())


def _group_by_prompt(requests: Sequence[PromptAndSeed], token_budget: int, max_new_tokens: int) -> list[_PromptGroup]:
    """Requests with the same prompt together, the longest prompts first, each group small enough for the budget."""
    order = sorted(range(len(requests)), key=lambda index: (-len(requests[index].prompt), requests[index].prompt))
    by_prompt = [list(indices) for _, indices in itertools.groupby(order, key=lambda index: requests[index].prompt)]
    groups: list[_PromptGroup] = []
    for indices in by_prompt:
        prompt = requests[indices[0]].prompt
        # A group's rows may have as many tokens as its prompt even beyond the budget: with fewer rows in each group,
        # the groups' copies of the prompt would take most of the memory.
        max_rows = max(token_budget - len(prompt), len(prompt)) // max_new_tokens
        # Attention pads every prompt's queries to the largest group, so no group has more than twice the average size.
        group_size = max(1, min(max_rows, math.ceil(2 * len(requests) / len(by_prompt))))
        groups += [_PromptGroup(prompt, indices[n : n + group_size]) for n in range(0, len(indices), group_size)]
    return groups


def _pop_groups_that_fit(waiting: deque[_PromptGroup], batch: _RunningBatch, token_budget: int) -> list[_PromptGroup]:
    """Removes from `waiting` the groups that the budget has room for; at least one where no row is running."""
    if not waiting:
        return []
    prompt_lengths = batch.prompt_lengths
    longest = max([len(waiting[0].prompt), *prompt_lengths])

    # A row counts as `max_new_tokens`, a prompt as the length to which its bucket pads it, at most the longest prompt.
    def padded(prompt_length: int) -> int:
        return min(longest, length_bucket(prompt_length, batch.model.device))

    free = token_budget - len(batch.rows) * batch.max_new_tokens - sum(map(padded, prompt_lengths))
    admitted: list[_PromptGroup] = []
    if batch.rows and free < int(_FREE_SHARE_TO_ADMIT * token_budget):
        return admitted
    while waiting:
        n_tokens = padded(len(waiting[0].prompt)) + len(waiting[0].request_indices) * batch.max_new_tokens
        if n_tokens > free and (batch.rows or admitted):
            break
        free -= n_tokens
        admitted.append(waiting.popleft())
    return admitted


class _LengthBucket:
    """The keys and values of prompts padded to one length. `bias` masks the padding; None if nothing is padded."""

    def __init__(self, prefixes: Prefixes) -> None:
        self.prefixes = prefixes
        self.bias = mask_to_bias(prefixes.mask[:, None, None], prefixes.keys[0].dtype)


class _RunningBatch:
    """The running rows, with the keys and values of their prompts, by length bucket, and of their generated tokens.

    Row n of `rows` is row n of the generated-token KV cache. For attention to prompts, queries are laid out as
    `max_samples` slots for each prompt of a bucket.
    """

    def __init__(self, model: PreTrainedModel, max_samples: int, max_new_tokens: int) -> None:
        self.model, self.max_samples, self.max_new_tokens = model, max_samples, max_new_tokens
        self.rows: list[Row] = []
        self.buckets: dict[int, _LengthBucket] = {}
        self.generated = GeneratedKVCache(max_new_tokens)

    @property
    def prompt_lengths(self) -> list[int]:
        """Tokens of each prompt that has rows."""
        return list({(row.bucket, row.prompt_index): row.prompt_length for row in self.rows}.values())

    def admit(self, groups: Sequence[_PromptGroup], requests: Sequence[PromptAndSeed]) -> tuple[list[Row], Tensor]:
        """Prefills the groups' prompts: the new rows, and the logits of their first tokens, (row, vocabulary)."""
        for bucket in list(self.buckets):
            self._drop_unused_prompts(bucket)
        self.generated.shrink(len(self.rows) + sum(len(group.request_indices) for group in groups))
        new_rows: list[Row] = []
        logits: list[Tensor] = []
        by_length = sorted(groups, key=lambda group: len(group.prompt))
        for bucket, bucket_groups in itertools.groupby(
            by_length, key=lambda group: length_bucket(len(group.prompt), self.model.device)
        ):
            admitted = list(bucket_groups)
            first_index = len(self.buckets[bucket].prefixes.lengths) if bucket in self.buckets else 0
            prompt_logits = self._prefill(bucket, [group.prompt for group in admitted])
            for prompt_index, group in enumerate(admitted, first_index):
                for sample_index, request_index in enumerate(group.request_indices):
                    uniforms = sample_uniforms(requests[request_index].seed, self.max_new_tokens)
                    length = len(group.prompt)
                    new_rows.append(Row(request_index, length, uniforms, bucket, prompt_index, sample_index))
            logits.append(prompt_logits[[n for n, group in enumerate(admitted) for _ in group.request_indices]])
        self.rows += new_rows
        return new_rows, concatenate(logits)

    def _prefill(self, bucket: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Adds prompts, the shortest first, to a bucket: the logits after each, (prompt, vocabulary)."""
        lengths = [len(prompt) for prompt in prompts]
        parts = [self.buckets[bucket].prefixes] if bucket in self.buckets else []
        logits: list[Tensor] = []
        for first, last in batch_by_tokens(lengths, tokens_per_pass(len(lengths) * lengths[-1], self.model.device)):
            part_logits, build_prefixes = prefill(self.model, prompts[first:last])
            logits.append(part_logits)
            parts.append(build_prefixes())
        self.buckets[bucket] = _LengthBucket(Prefixes.concatenate(parts))
        return concatenate(logits)

    def decode_step(self) -> Tensor:
        """One forward pass on the last token of every row: the logits of its next token, (row, vocabulary)."""
        device, rows = self.model.device, self.rows
        n_generated = [len(row.token_ids) for row in rows]
        self.generated.reserve(len(rows), max(n_generated))
        columns = torch.tensor(n_generated, device=device) - 1
        is_generated = torch.arange(self.generated.n_tokens, device=device) <= columns[:, None]
        generated_bias = mask_to_bias(is_generated[:, None, None], self.model.dtype)
        groups = self._group_rows()

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            keys, values = self.generated.store(layer, key, value, columns)
            prompts = [
                PrefixKeyValues(bucket.prefixes.keys[layer], bucket.prefixes.values[layer], bucket.bias, bucket_groups)
                for bucket, bucket_groups in groups
            ]
            grouped_query = fold_query_heads(query, key.shape[1], scale)
            out = joint_attention(grouped_query, prompts, OwnKeyValues(keys, values, generated_bias))
            return out.reshape(*query.shape[:-1], -1)

        ids = torch.tensor([[row.token_ids[-1]] for row in rows], device=device)
        positions = torch.tensor([[row.prompt_length + len(row.token_ids) - 1] for row in rows], device=device)
        logit_positions = torch.arange(len(rows), device=device), torch.zeros_like(columns)
        return forward_with_attention(self.model, ids, positions, attend, logit_positions)

    def _group_rows(self) -> list[tuple[_LengthBucket, PrefixGroups]]:
        groups = []
        for key, bucket in self.buckets.items():
            rows = [index for index, row in enumerate(self.rows) if row.bucket == key]
            if rows:
                prompts = range(len(bucket.prefixes.lengths))
                slots = [(self.rows[index].prompt_index, self.rows[index].sample_index) for index in rows]
                subset = None if len(rows) == len(self.rows) else rows
                groups.append((bucket, PrefixGroups(prompts, self.max_samples, slots, self.model.device, subset)))
        return groups

    def evict_finished(self) -> list[Row]:
        """Removes the finished rows and returns them; the last running rows move into their places."""
        finished = [row for row in self.rows if row.is_finished]
        n_left = len(self.rows) - len(finished)
        gaps = [index for index in range(n_left) if self.rows[index].is_finished]
        moved = [index for index in range(n_left, len(self.rows)) if not self.rows[index].is_finished]
        self.generated.reserve(len(self.rows), 0)  # rows that finish with their first token are not in the cache yet
        for gap, index in zip(gaps, moved, strict=True):
            self.rows[gap] = self.rows[index]
        del self.rows[n_left:]
        if gaps:
            self.generated.move_rows(moved, gaps)
        for key, bucket in list(self.buckets.items()):
            if 2 * len(self._used_prompts(key)) < len(bucket.prefixes.lengths):
                self._drop_unused_prompts(key)
        return finished

    def _used_prompts(self, bucket: int) -> list[int]:
        """The indices of the bucket's prompts that have rows."""
        return sorted({row.prompt_index for row in self.rows if row.bucket == bucket})

    def _drop_unused_prompts(self, bucket: int) -> None:
        """Removes the bucket's prompts without rows, and the bucket where none is left."""
        used = self._used_prompts(bucket)
        new_index = {old: new for new, old in enumerate(used)}
        for row in self.rows:
            if row.bucket == bucket:
                row.prompt_index = new_index[row.prompt_index]
        prefixes = self.buckets.pop(bucket).prefixes
        if used:
            self.buckets[bucket] = _LengthBucket(prefixes.select(used))


class GeneratedKVCache:
    """The keys, (row, kv heads, width, token), and values, (row, kv heads, token, width), of sampled tokens, by layer.

    It is allocated for `n_rows` rows of `n_tokens` tokens, at most `max_tokens`. Columns beyond a row's own tokens hold
    zeros or an evicted row's tokens, which attention masks: multiplying by all columns is faster than by some.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.n_rows = self.n_tokens = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def reserve(self, n_rows: int, n_tokens: int) -> None:
        """Allocates what is missing for that many rows and tokens."""
        n_tokens = min(KV_CACHE_STEP * math.ceil(n_tokens / KV_CACHE_STEP), self.max_tokens)
        new_rows, new_tokens = max(0, n_rows - self.n_rows), max(0, n_tokens - self.n_tokens)
        if not new_rows and not new_tokens:
            return
        self.n_rows += new_rows
        self.n_tokens += new_tokens
        self.keys = [pad(keys, (0, new_tokens, 0, 0, 0, 0, 0, new_rows)) for keys in self.keys]
        self.values = [pad(values, (0, 0, 0, new_tokens, 0, 0, 0, new_rows)) for values in self.values]

    def shrink(self, n_rows: int) -> None:
        """Frees the memory of rows beyond the first `n_rows`."""
        if n_rows < self.n_rows:
            self.n_rows = n_rows
            self.keys = [keys[:n_rows].clone() for keys in self.keys]
            self.values = [values[:n_rows].clone() for values in self.values]

    def move_rows(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies the rows at `sources` over those at `targets`."""
        for tensor in (*self.keys, *self.values):
            tensor[list(targets)] = tensor[list(sources)]

    def store(self, layer: int, key: Tensor, value: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Writes each row's key and value, (row, kv heads, 1, width), to its column. Returns those of all columns."""
        n_rows, heads, _, width = key.shape
        if layer == len(self.keys):
            self.keys.append(key.new_zeros((self.n_rows, heads, width, self.n_tokens)))
            self.values.append(value.new_zeros((self.n_rows, heads, self.n_tokens, value.shape[-1])))
        keys, values = self.keys[layer][:n_rows], self.values[layer][:n_rows]
        rows = torch.arange(n_rows, device=columns.device)
        keys[rows, :, :, columns] = key[:, :, 0]
        values[rows, :, columns] = value[:, :, 0]
        return keys, values
