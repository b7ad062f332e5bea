"""One row for each question and each response: for models that cannot share what rows have in common.

Rows are padded on the left and use transformers' own cache, which holds the states of recurrent and linear-attention
layers as well as keys and values. The results are those of `cai.engines.local.scoring` and
`cai.engines.local.decoding`. `find_padding_obstacle` tries whether padding changes a model's logits: such a model gets
batches of prompts of equal length. Rotary positions that depend on the longest row of a pass do so here too.

Left out: sampling from models whose forward pass takes no `past_key_values`, as Mamba's.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from cai.attention.cpu_tuning import tokens_per_pass
from cai.attention.patched_attention import TRIAL_ERRORS, is_rounding
from cai.attention.token_batches import batch_by_tokens
from cai.engines.local.scoring import OptionLogProbs, PromptAndOptions, option_log_probs
from cai.engines.local.token_sampling import PromptAndSeed, Row, SampledTokens, TokenSampler, sample_uniforms
from cai.text.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def score(
    model: PreTrainedModel, questions: Sequence[PromptAndOptions], token_budget: int, *, mixes_lengths: bool = True
) -> Iterator[tuple[int, OptionLogProbs]]:
    """(index, the options' log-probabilities) of every question. Without `mixes_lengths` no prompt is padded."""
    prompts = [question.prompt for question in questions]
    for batch in _batches(prompts, 0, tokens_per_pass(token_budget, model.device), mixes_lengths):
        ids, mask = _pad_left([prompts[index] for index in batch], model.device)
        options = [(row, questions[index].options) for row, index in enumerate(batch)]
        yield from zip(batch, option_log_probs(_next_logits(model, ids, mask), options), strict=True)


@torch.inference_mode()
def decode(
    model: PreTrainedModel, requests: Sequence[PromptAndSeed], sampler: TokenSampler, token_budget: int, *,
    mixes_lengths: bool = True,
) -> Iterator[tuple[int, SampledTokens]]:  # fmt: skip
    """(request index, response) of each request. Without `mixes_lengths` no prompt is padded and no row is evicted.

    Raises BadInput for a model whose forward pass takes no cache.
    """
    if "past_key_values" not in _forward_parameters(model):
        raise BadInput(
            f"engine `local` cannot sample from {type(model).__name__}, which has states in place of keys and values; "
            f"engines `vllm` and `server` can"
        )
    max_new_tokens = sampler.sampling.max_new_tokens
    prompts = [request.prompt for request in requests]
    for batch in _batches(prompts, max_new_tokens, token_budget, mixes_lengths):
        rows = [Row(n, len(prompts[n]), sample_uniforms(requests[n].seed, max_new_tokens)) for n in batch]
        _decode_batch(model, rows, [prompts[index] for index in batch], sampler, evicts=mixes_lengths)
        yield from ((row.request_index, row.sampled) for row in rows)


def _decode_batch(
    model: PreTrainedModel, rows: list[Row], prompts: list[Sequence[int]], sampler: TokenSampler, *, evicts: bool
) -> None:
    """Samples the rows' responses to their ends. Finished rows are evicted, if at all, when they are half of the batch.

    A model that cannot be padded may keep states outside of the cache, as RecurrentGemma does (transformers 5.23), and
    a row of these cannot be evicted.
    """
    ids, mask = _pad_left(prompts, model.device)
    cache = DynamicCache(config=model.config)
    for _ in range(sampler.sampling.max_new_tokens):
        sampler.extend(rows, _next_logits(model, ids, mask, cache))
        running = [index for index, row in enumerate(rows) if not row.is_finished]
        if not running:
            return
        if evicts and 2 * len(running) <= len(rows):
            rows, mask = [rows[index] for index in running], _keep_rows(cache, mask, running)
        ids = torch.tensor([[row.token_ids[-1]] for row in rows], device=model.device)
        mask = pad(mask, (0, 1), value=1)


def _batches(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, token_budget: int, mixes_lengths: bool
) -> Iterator[list[int]]:
    """The prompts' indices, the shortest first, in batches within the token budget."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    by_length = [list(group) for _, group in itertools.groupby(order, key=lambda index: len(prompts[index]))]
    for group in [order] if mixes_lengths else by_length:
        for first, last in batch_by_tokens([len(prompts[index]) + max_new_tokens for index in group], token_budget):
            yield group[first:last]


def _pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (batch, seq); padding has id 0."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _next_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """(batch, vocabulary) logits behind `ids`, (batch, new), which continue what `cache` holds and extend it.

    `mask`, (batch, cached + new), is 0 at padding. Positions, and logits of the last token alone, go to models whose
    forward pass takes them.
    """
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, mask.shape[1] - ids.shape[1] :]
    options = {"position_ids": positions, "logits_to_keep": 1, "past_key_values": cache}
    accepted = {name: value for name, value in options.items() if name in _forward_parameters(model)}
    output = model(input_ids=ids, attention_mask=mask, use_cache=cache is not None, **accepted)
    logits: Tensor = output.logits[:, -1]
    return logits


def _keep_rows(cache: DynamicCache, mask: Tensor, kept: Sequence[int]) -> Tensor:
    """Evicts all rows but `kept` from the cache. Returns the mask of the kept rows."""
    rows = torch.tensor(kept, device=mask.device)
    # Linear-attention layers have no `batch_select_indices` (transformers 5.23); all layers can be reordered.
    cache.reorder_cache(rows)
    return mask[rows]


def find_padding_obstacle(model: PreTrainedModel) -> str | None:
    """Why prompts of different lengths cannot share a batch, or None where they can.

    The reason is a clause about "it", the model. In a trial, a short prompt is padded to the length of a long one; the
    logits of the padded row without its mask show how large a mistake would be.
    """
    short, long = [9, 4], [2, 30, 11, 17, 6, 40, 21, 13, 5, 28, 36]
    try:
        expected, wrong = _trial_logits(model, [short]), _trial_logits(model, [short, long], hides_padding=False)
        padded = _trial_logits(model, [short, long])
    except TRIAL_ERRORS as error:
        return f"it does not take padded rows: {str(error).splitlines()[0]}"
    difference, difference_if_wrong = (float((logits - expected).abs().max()) for logits in (padded, wrong))
    # In float32 rounding is so small that layers which see only some of the padding, as RecurrentGemma's, show as well.
    is_exact = model.dtype != torch.float32 or difference <= max(1e-3, 0.01 * difference_if_wrong)
    if not is_exact or not is_rounding(difference, difference_if_wrong):
        return f"padding changes its logits by {difference:.2g}"
    return None


@torch.inference_mode()
def _trial_logits(model: PreTrainedModel, prompts: list[list[int]], *, hides_padding: bool = True) -> Tensor:
    """(steps, vocabulary) logits of the first prompt: at its end and, with a cache, at a further token of it alone."""
    ids, mask = _pad_left(prompts, model.device)
    if not hides_padding:
        mask = torch.ones_like(mask)
    if "past_key_values" not in _forward_parameters(model):
        return _next_logits(model, ids, mask)[:1].float()
    cache = DynamicCache(config=model.config)
    after_prompt = _next_logits(model, ids, mask, cache)[:1]
    mask = pad(_keep_rows(cache, mask, [0]), (0, 1), value=1)
    after_token = _next_logits(model, torch.tensor([[7]], device=model.device), mask, cache)
    return torch.cat([after_prompt, after_token]).float()


def _forward_parameters(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(model).forward).parameters
