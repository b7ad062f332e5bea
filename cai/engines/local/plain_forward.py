"""One row for each question and each response: for models that cannot share what rows have in common.

Rows are padded on the left and use transformers' own cache, which holds the states of recurrent and linear-attention
layers as well as keys and values. The results are those of `cai.engines.local.scoring` and
`cai.engines.local.decoding`. `try_padding` tries whether padding changes a model's logits: such a model gets batches of
prompts of equal length, as do rows longer than a window that is too long to be tried. Where a running row changes its
rotary frequencies (`cai.attention.rotary_rows`), what is cached is dropped and the batch is computed again.

Left out: sampling from models whose forward pass takes no cache of transformers', as Mamba's.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from cai.attention.cpu_tuning import tokens_per_pass
from cai.attention.patched_attention import TRIAL_ERRORS, is_rounding, longest_tried_window, shortest_untried_window
from cai.attention.rotary_rows import frequencies_change, length_dependences
from cai.attention.token_batches import batch_by_tokens
from cai.engines.local.scoring import OptionLogProbs, PromptAndOptions, option_log_probs
from cai.engines.local.token_sampling import PromptAndSeed, Row, SampledTokens, TokenSampler, sample_uniforms
from cai.text.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Padding(NamedTuple):
    """How a model takes rows of different lengths: `obstacle`, a clause about "it", the model, is why it does not.

    Rows of more than `longest_row` tokens share batches with rows of equal length alone. The model gets the positions
    of tokens, padding not counted, with `gives_positions`; otherwise it counts by itself.
    """

    longest_row: float = math.inf
    gives_positions: bool = True
    obstacle: str | None = None


@torch.inference_mode()
def score(
    model: PreTrainedModel, questions: Sequence[PromptAndOptions], token_budget: int, padding: Padding
) -> Iterator[tuple[int, OptionLogProbs]]:
    """(index, the options' log-probabilities) of every question."""
    prompts = [question.prompt for question in questions]
    for batch in _batches(prompts, 0, tokens_per_pass(token_budget, model.device), padding):
        ids, mask = _pad_left([prompts[index] for index in batch], model.device)
        options = [(row, questions[index].options) for row, index in enumerate(batch)]
        logits = _next_logits(model, ids, mask, gives_positions=padding.gives_positions)
        yield from zip(batch, option_log_probs(logits, options), strict=True)


@torch.inference_mode()
def decode(
    model: PreTrainedModel, requests: Sequence[PromptAndSeed], sampler: TokenSampler, token_budget: int,
    padding: Padding,
) -> Iterator[tuple[int, SampledTokens]]:  # fmt: skip
    """(request index, response) of each request. Raises BadInput for a model that takes no cache of transformers'."""
    if obstacle := _find_cache_obstacle(model):
        raise BadInput(
            f"engine `local` cannot sample from {type(model).__name__}, {obstacle}; engines `vllm` and `server` can"
        )
    max_new_tokens = sampler.sampling.max_new_tokens
    prompts = [request.prompt for request in requests]
    for batch in _batches(prompts, max_new_tokens, token_budget, padding):
        rows = [Row(n, len(prompts[n]), sample_uniforms(requests[n].seed, max_new_tokens)) for n in batch]
        for row in _decode_batch(model, rows, [prompts[index] for index in batch], sampler, padding):
            yield row.request_index, row.sampled


def _decode_batch(
    model: PreTrainedModel, rows: list[Row], prompts: list[Sequence[int]], sampler: TokenSampler, padding: Padding
) -> Iterator[Row]:
    """Samples the rows' responses to their ends, and yields a row when it is finished.

    Finished rows are evicted, if at all, when they are half of the batch.

    A model that cannot be padded may keep states outside of the cache, as RecurrentGemma does (transformers 5.23), and
    a row of these cannot be evicted.
    """
    ids, mask = _pad_left(prompts, model.device)
    cache, dependences = DynamicCache(config=model.config), length_dependences(model.config)
    yielded: set[int] = set()
    for _ in range(sampler.sampling.max_new_tokens):
        sampler.extend(rows, _next_logits(model, ids, mask, cache, gives_positions=padding.gives_positions))
        yield from (row for row in rows if row.is_finished and row.request_index not in yielded)
        yielded |= {row.request_index for row in rows if row.is_finished}
        running = [index for index, row in enumerate(rows) if not row.is_finished]
        if not running:
            return
        if not padding.obstacle and 2 * len(running) <= len(rows):
            rows, prompts = [rows[index] for index in running], [prompts[index] for index in running]
            mask = _keep_rows(cache, mask, running)
        lengths = [row.prompt_length + len(row.token_ids) for row in rows if not row.is_finished]
        if any(frequencies_change(dependences, length) for length in lengths):
            cache = DynamicCache(config=model.config)
            texts = [[*prompt, *row.token_ids] for prompt, row in zip(prompts, rows, strict=True)]
            ids, mask = _pad_left(texts, model.device)
        else:
            ids = torch.tensor([[row.token_ids[-1]] for row in rows], device=model.device)
            mask = pad(mask, (0, 1), value=1)


def _batches(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, token_budget: int, padding: Padding
) -> Iterator[list[int]]:
    """The prompts' indices, the shortest first, in batches within the token budget."""

    def length(index: int) -> int:
        return len(prompts[index]) + max_new_tokens

    order = sorted(range(len(prompts)), key=length)
    for _, group in itertools.groupby(order, key=lambda n: length(n) if length(n) > padding.longest_row else 0):
        indices = list(group)
        for first, last in batch_by_tokens([length(index) for index in indices], token_budget):
            yield indices[first:last]


def _pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (batch, seq); padding has id 0."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _next_logits(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache | None = None, *, gives_positions: bool
) -> Tensor:
    """(batch, vocabulary) logits behind `ids`, (batch, new), which continue what `cache` holds and extend it.

    `mask`, (batch, cached + new), is 0 at padding. Logits of the last token alone are computed where the forward pass
    can, and it gets the tokens' positions where it takes them and `gives_positions` is set.
    """
    options: dict[str, object] = {"logits_to_keep": 1, "past_key_values": cache}
    if gives_positions:
        options["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, mask.shape[1] - ids.shape[1] :]
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


def try_padding(model: PreTrainedModel) -> Padding:
    """How this model takes rows of different lengths.

    In a trial, a short prompt is padded to the length of a long one; the logits of the padded row without its mask show
    how large a mistake would be. Positions that begin at 0 are compared with the model's own, which some begin later.
    """
    long = [1 + (7 * n) % 50 for n in range(11 + 2 * longest_tried_window(model))]
    short = long[9:]
    try:
        with torch.inference_mode():
            own = model(input_ids=torch.tensor([short], device=model.device)).logits[0, -1].float()
        expected = _trial_logits(model, [short])
        padded, wrong = (_trial_logits(model, [short, long], hides_padding=hides) for hides in (True, False))
    except TRIAL_ERRORS as error:
        return Padding(0, obstacle=f"it does not take padded rows: {str(error).splitlines()[0]}")
    difference, difference_if_wrong = (float((logits - expected).abs().max()) for logits in (padded, wrong))
    from_positions = float((own - expected[0]).abs().max())
    if not is_rounding(from_positions, difference_if_wrong, model.dtype):
        return Padding(0, gives_positions=False, obstacle="its positions do not begin at 0")
    if not is_rounding(difference, difference_if_wrong, model.dtype):
        return Padding(0, obstacle=f"padding changes its logits by {difference:.2g}")
    return Padding(shortest_untried_window(model))


def _find_cache_obstacle(model: PreTrainedModel) -> str | None:
    """Why no model of this kind can continue from a cache, a clause about "which"; None where it can."""
    if "past_key_values" not in _forward_parameters(model):
        return "whose forward pass takes no cache of keys and values"
    try:
        _trial_logits(model, [[9, 4]])
    except TRIAL_ERRORS as error:
        return f"which takes no cache of transformers' ({str(error).splitlines()[0].rstrip('.')})"
    return None


@torch.inference_mode()
def _trial_logits(model: PreTrainedModel, prompts: list[list[int]], *, hides_padding: bool = True) -> Tensor:
    """(steps, vocabulary) logits of the first prompt: at its end and, with a cache, at a further token of it alone."""
    ids, mask = _pad_left(prompts, model.device)
    if not hides_padding:
        mask = torch.ones_like(mask)
    if "past_key_values" not in _forward_parameters(model):
        return _next_logits(model, ids, mask, gives_positions=True)[:1].float()
    cache = DynamicCache(config=model.config)
    after_prompt = _next_logits(model, ids, mask, cache, gives_positions=True)[:1]
    mask = pad(_keep_rows(cache, mask, [0]), (0, 1), value=1)
    token = torch.tensor([[7]], device=model.device)
    after_token = _next_logits(model, token, mask, cache, gives_positions=True)
    return torch.cat([after_prompt, after_token]).float()


def _forward_parameters(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(model).forward).parameters
