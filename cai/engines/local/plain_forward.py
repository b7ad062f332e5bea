"""One row for each question and each response: for models that cannot share what rows have in common.

Rows are padded on the left and use transformers' own KV cache. The results are those of `cai.engines.local.scoring` and
`cai.engines.local.decoding`. Rotary positions that depend on the longest row of a pass do so here too.

Left out: sampling from models that keep states of their own kind in place of keys and values.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from cai.attention.cpu_tuning import tokens_per_pass
from cai.attention.token_batches import batch_by_tokens
from cai.engines.local.scoring import OptionLogProbs, PromptAndOptions, option_log_probs
from cai.engines.local.token_sampling import PromptAndSeed, Row, SampledTokens, TokenSampler, sample_uniforms
from cai.text.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def score(
    model: PreTrainedModel, questions: Sequence[PromptAndOptions], token_budget: int
) -> Iterator[tuple[int, OptionLogProbs]]:
    """(index, the options' log-probabilities) of every question."""
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].prompt))
    lengths = [len(questions[index].prompt) for index in order]
    for first, last in batch_by_tokens(lengths, tokens_per_pass(token_budget, model.device)):
        batch = order[first:last]
        ids, mask = _pad_left([questions[index].prompt for index in batch], model.device)
        output = model(input_ids=ids, attention_mask=mask, use_cache=False, **_accepted_options(model, mask))
        options = [(row, questions[index].options) for row, index in enumerate(batch)]
        yield from zip(batch, option_log_probs(output.logits[:, -1], options), strict=True)


@torch.inference_mode()
def decode(
    model: PreTrainedModel, requests: Sequence[PromptAndSeed], sampler: TokenSampler, token_budget: int
) -> Iterator[tuple[int, SampledTokens]]:
    """(request index, response) of each request. Raises BadInput for a model without a cache of keys and values."""
    if "past_key_values" not in _forward_parameters(model):
        raise BadInput(
            f"engine `local` cannot sample from {type(model).__name__}, which has states in place of keys and values; "
            f"engines `vllm` and `server` can"
        )
    max_new_tokens = sampler.sampling.max_new_tokens
    order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt))
    for first, last in batch_by_tokens([len(requests[index].prompt) + max_new_tokens for index in order], token_budget):
        batch = [(index, *requests[index]) for index in order[first:last]]
        rows = [Row(index, len(prompt), sample_uniforms(seed, max_new_tokens)) for index, prompt, seed in batch]
        _decode_batch(model, rows, [prompt for _, prompt, _ in batch], sampler)
        yield from ((row.request_index, row.sampled) for row in rows)


def _decode_batch(model: PreTrainedModel, rows: list[Row], prompts: list[Sequence[int]], sampler: TokenSampler) -> None:
    """Samples the rows' responses to their ends. Finished rows are evicted when they are half of the batch."""
    ids, mask = _pad_left(prompts, model.device)
    cache = DynamicCache(config=model.config)
    n_cached = 0
    for _ in range(sampler.sampling.max_new_tokens):
        options = _accepted_options(model, mask, n_cached)
        output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        sampler.extend(rows, output.logits[:, -1])
        running = [index for index, row in enumerate(rows) if not row.is_finished]
        if not running:
            return
        if 2 * len(running) <= len(rows):
            running_rows = torch.tensor(running, device=model.device)
            cache.batch_select_indices(running_rows)
            rows, mask = [rows[index] for index in running], mask[running_rows]
        n_cached = mask.shape[1]
        ids = torch.tensor([[row.token_ids[-1]] for row in rows], device=model.device)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)


def _pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (batch, seq); padding has id 0."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _accepted_options(model: PreTrainedModel, mask: Tensor, n_cached: int = 0) -> dict[str, Any]:
    """Positions of the tokens behind `n_cached`, and logits of the last one alone, where the forward takes them."""
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, n_cached:]
    options = {"position_ids": positions, "logits_to_keep": 1}
    return {name: value for name, value in options.items() if name in _forward_parameters(model)}


def _forward_parameters(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(model).forward).parameters
