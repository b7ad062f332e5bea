"""Log-probabilities of options as the next token: plainly, or for many questions that begin alike at once.

`plain` is one row a question. `branched` computes what questions share once, with a mask over positions
(`cai.engines.branches`). `can_branch` tries both on a few ids: a model that takes no such mask, or takes it for
something else, goes the plain way.

Left out: options of several tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cai.engines.branches import Row, rows_of
from cai.engines.decoding import accepted, padded_left

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Asked = tuple[list[int], list[int]]
"""(prompt ids, the id of each option)."""
Scores = list[float]
"""Natural log-probability of each option."""
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
"""What configs call the tokens that attention reaches back."""


@torch.inference_mode()
def plain(model: PreTrainedModel, asked: Sequence[Asked], pad_id: int) -> list[Scores]:
    """The options' log-probabilities, one batch, padded on the left."""
    ids, mask = (each.to(model.device) for each in padded_left([prompt for prompt, _ in asked], pad_id))
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    extra = accepted(model, position_ids=positions, logits_to_keep=1)
    output = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra)
    return _of_options(output.logits[:, -1], [options for _, options in asked])


@torch.inference_mode()
def branched(model: PreTrainedModel, rows: Sequence[Row], asked: Sequence[Asked], pad_id: int) -> dict[int, Scores]:
    """The options' log-probabilities of every question that ends in `rows`, one batch, padded on the right."""
    longest = max(len(row.ids) for row in rows)
    spare = [longest - len(row.ids) for row in rows]
    ids = torch.tensor([row.ids + [pad_id] * more for row, more in zip(rows, spare, strict=True)])
    positions = torch.tensor([row.positions + [0] * more for row, more in zip(rows, spare, strict=True)])
    ends = [(at, index, question) for at, row in enumerate(rows) for question, index in row.ends]
    at, index = (torch.tensor(each, device=model.device) for each in zip(*[end[:2] for end in ends], strict=True))

    def only_ends(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (args[0][at, index][None],)

    mask: torch.Tensor | None = None
    if any(row.branches for row in rows):
        own = [row.until + list(range(len(row.ids) + 1, longest + 1)) for row in rows]
        mask = _mask(torch.tensor(own, device=model.device), model)
    head = model.get_output_embeddings()
    assert head is not None
    # The head sees the last tokens alone: all logits of a long row would be larger than everything else.
    hook = head.register_forward_pre_hook(only_ends)
    try:
        output = model(
            input_ids=ids.to(model.device),
            attention_mask=mask,
            position_ids=positions.to(model.device),
            use_cache=False,
        )
    finally:
        hook.remove()
    scores = _of_options(output.logits[0], [asked[question][1] for _, _, question in ends])
    return {question: one for (_, _, question), one in zip(ends, scores, strict=True)}


def can_branch(model: PreTrainedModel) -> str | None:
    """Why this model's questions have to be asked one by one, or None: then `branched` gives what `plain` does."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention"}:
        return f"it has layers of the kind {', '.join(sorted(kinds - {'full_attention'}))}"
    if not kinds and (window := _window(config)):
        return f"its attention reaches back {window} tokens, which a mask over positions would replace"
    if len(accepted(model, attention_mask=0, position_ids=0)) < 2:
        return "its forward pass takes no mask or no positions"
    trial = [1 + (7 * n) % 50 for n in range(12)]
    asked = [(trial + branch, [3, 5]) for branch in ([9, 4, 7, 8], [2, 30, 11], [17, 6, 40, 21, 13])]
    rows = rows_of([prompt for prompt, _ in asked], width=1 << 20, budget=1 << 20)
    wrong = [Row(row.ids, row.positions, [len(row.ids)] * len(row.ids), row.ends) for row in rows]
    expected = [score for scores in plain(model, asked, 0) for score in scores]
    try:
        error, other = (
            max(abs(a - b) for a, b in zip(expected, _in_order(branched(model, each, asked, 0)), strict=True))
            for each in (rows, wrong)
        )
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as failure:
        return f"it does not take a mask over positions: {str(failure).splitlines()[0]}"
    # In float32 the two agree to rounding; in bfloat16 to far less than what a wrong mask would change.
    if error > max(1e-3, 0.2 * other):
        return f"a mask over positions changes its answers by {error:.2g} nats"
    return None


def _window(config: PreTrainedConfig) -> int | None:
    """Tokens that attention reaches back, where the model takes longer texts; a mask of ours would reach further."""
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    windows = [each for name in _WINDOWS if isinstance(each := getattr(config, name, None), int) and 0 < each < longest]
    return min(windows, default=None)


def _in_order(scores: dict[int, Scores]) -> Scores:
    return [score for question in sorted(scores) for score in scores[question]]


def _mask(until: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """(batch, 1, seq, seq): whether, or with what added, each token attends to each, from `Row.until` (batch, seq)."""
    index = torch.arange(until.shape[1], device=until.device)
    allowed = (index[None, :, None] >= index[None, None, :]) & (index[None, :, None] < until[:, None, :])
    if model.config._attn_implementation == "sdpa":
        return allowed[:, None]
    added = torch.zeros(allowed.shape, dtype=model.dtype, device=until.device)
    return added.masked_fill(~allowed, torch.finfo(model.dtype).min)[:, None]


def _of_options(logits: torch.Tensor, options: Sequence[Sequence[int]]) -> list[Scores]:
    """Log-probabilities of each row's options, from (rows, vocabulary) logits; a part at a time, as these are large."""
    scores: list[Scores] = []
    for first in range(0, len(options), 256):
        part: Any = logits[first : first + 256].float()
        part = part.log_softmax(dim=-1).double().cpu()
        scores += [part[n, list(own)].tolist() for n, own in enumerate(options[first : first + 256])]
    return scores
