"""One row a question and one row a response: for models that cannot share what rows have in common.

Rows are padded on the left and have transformers' own cache. What is computed is what `cai.engines.local.scoring` and
`cai.engines.local.decoding` compute. Rotary positions that depend on the longest row of a pass do here too.

Left out: drawing from models that keep states of their own kind in place of keys.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from cai.attention.cpu_sizes import batches, in_one_pass
from cai.contracts.engine import Sampling
from cai.engines.local.decoding import Drawn, Row, Stopping, Wanted, take
from cai.engines.local.scoring import Asked, Scores, of_options
from cai.engines.local.token_sampling import uniforms
from cai.text.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def score(model: PreTrainedModel, asked: Sequence[Asked], budget: int) -> Iterator[tuple[int, Scores]]:
    """(index, the options' log-probabilities) of every question, each a row padded on the left."""
    order = sorted(range(len(asked)), key=lambda n: len(asked[n][0]))
    for first, last in batches([len(asked[n][0]) for n in order], in_one_pass(budget, model.device)):
        part = order[first:last]
        ids, mask = (each.to(model.device) for each in _padded_left([asked[n][0] for n in part]))
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        extra = _accepted(model, position_ids=positions, logits_to_keep=1)
        output = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra)
        found = of_options(output.logits[:, -1], [(row, asked[n][1]) for row, n in enumerate(part)])
        yield from zip(part, found, strict=True)


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    wanted: Sequence[Wanted],
    sampling: Sampling,
    stopping: Stopping,
    *,
    budget: int,
    banned: Sequence[int] = (),
) -> Iterator[tuple[int, Drawn]]:
    """(index, what was drawn) of each response, a batch at a time; rows that have ended leave when half of it has.

    Raises BadInput for a model without a cache of keys and values.
    """
    if not _accepted(model, past_key_values=None):
        raise BadInput(
            f"engine `local` cannot draw from {type(model).__name__}, which keeps states in place of keys and values; "
            f"engines `vllm` and `server` can"
        )
    room = sampling.max_new_tokens
    order = sorted(range(len(wanted)), key=lambda n: len(wanted[n].prompt))
    for first, last in batches([len(wanted[n].prompt) + room for n in order], budget):
        part = order[first:last]
        chances = uniforms([wanted[n].seed for n in part], room).tolist()
        rows = [Row(n, len(wanted[n].prompt), chance) for n, chance in zip(part, chances, strict=True)]
        _draw_all(model, rows, [wanted[n].prompt for n in part], sampling, stopping, banned)
        yield from ((row.number, row.drawn()) for row in rows)


def _draw_all(
    model: PreTrainedModel,
    rows: list[Row],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stopping: Stopping,
    banned: Sequence[int],
) -> None:
    """Draws the rows' responses to their ends."""
    ids, mask = (each.to(model.device) for each in _padded_left(prompts))
    cache = DynamicCache(config=model.config)
    start = 0
    for _ in range(sampling.max_new_tokens):
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, start:]
        extra = _accepted(model, position_ids=positions, logits_to_keep=1)
        output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
        take(rows, output.logits[:, -1], sampling, banned, stopping)
        running = [n for n, row in enumerate(rows) if not row.over]
        if not running:
            return
        if 2 * len(running) <= len(rows):
            kept = torch.tensor(running, device=model.device)
            cache.batch_select_indices(kept)
            rows, mask = [rows[n] for n in running], mask[kept]
        start = mask.shape[1]
        ids = torch.tensor([[row.token_ids[-1]] for row in rows], device=model.device)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)


def _padded_left(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (batch, seq); what is masked is id 0."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@functools.cache
def _knows(kind: type[PreTrainedModel]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def _accepted(model: PreTrainedModel, **arguments: object) -> dict[str, Any]:
    """Those of `arguments` that this model's forward knows: not all count positions or take `logits_to_keep`."""
    return {name: value for name, value in arguments.items() if name in _knows(type(model))}  # type: ignore[arg-type]
