"""Prefill: keys, values and last logits of given rows, which may continue prefixes that are computed already.

Everything but attention computes the rows as one sequence without padding. `find_sharing_obstacle` tries whether a
model gives the same logits this way as row by row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cai.attention.patched_attention import (
    TRIAL_ERRORS,
    find_layout_obstacle,
    forward_with_attention,
    is_rounding,
    longest_tried_window,
)
from cai.attention.shared_prefixes import (
    OwnKeyValues,
    Prefixes,
    PrefixGroups,
    PrefixKeyValues,
    count_used_columns,
    fold_query_heads,
    joint_attention,
    mask_to_bias,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_TOKENS_PER_GROUP = 1024
"""Tokens of the rows in one group, unless a single row has more."""
_FUSED_FROM = 128
"""Tokens of a row above which a fused kernel over prefix and row together is faster than two products."""


@torch.inference_mode()
def prefill(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], prefixes: Prefixes | None = None,
    prefix_of_row: Sequence[int] = (),
) -> tuple[Tensor, Callable[[], Prefixes]]:  # fmt: skip
    """Computes rows of token ids; with `prefixes`, row n continues prefix `prefix_of_row[n]`.

    Returns the logits after each row's last token, (rows, vocabulary), and a function that returns the rows, together
    with the prefixes that they continue, as prefixes.
    """
    packed = _PackedRows(rows, model.device)
    attention, positions = _CausalAttention(packed), packed.columns
    if prefixes is not None:
        attention = _ContinuationAttention(packed, prefixes, prefix_of_row, model.dtype)
        prefix_lengths = prefixes.lengths[attention.prefix_of_row]
        positions = positions + prefix_lengths.repeat_interleave(packed.lengths.to(model.device))
    selected = torch.zeros_like(packed.last_tokens), packed.last_tokens
    logits = forward_with_attention(model, packed.ids, positions[None], attention, selected)
    return logits, attention.build_prefixes


class _PackedRows:
    """Rows of several lengths as one sequence without padding, `ids`, (1, tokens), and back."""

    def __init__(self, rows: Sequence[Sequence[int]], device: torch.device) -> None:
        self.lengths = torch.tensor([len(row) for row in rows])
        self.shape = len(rows), int(self.lengths.max())
        self.mask = (torch.arange(self.shape[1]) < self.lengths[:, None]).to(device)
        self.ids = torch.tensor([list(itertools.chain.from_iterable(rows))], device=device)
        self.columns = torch.arange(self.shape[1], device=device).expand(self.shape)[self.mask]
        self.last_tokens = (self.lengths.cumsum(0) - 1).to(device)
        self._flat_index = None if bool(self.mask.all()) else self.mask.flatten().nonzero()[:, 0]

    def unpack(self, states: Tensor) -> Tensor:
        """(1, heads, token, width) -> (row, heads, column, width), padded on the right with zeros."""
        tokens = states[0].transpose(0, 1)
        if self._flat_index is not None:
            padded = tokens.new_zeros((self.shape[0] * self.shape[1], *tokens.shape[1:]))
            tokens = padded.index_copy_(0, self._flat_index, tokens)
        return tokens.reshape(*self.shape, *tokens.shape[1:]).transpose(1, 2)

    def pack(self, states: Tensor) -> Tensor:
        """(row, heads, column, width) -> (1, heads, token, width)."""
        tokens = states.transpose(1, 2).flatten(0, 1)
        if self._flat_index is not None:
            tokens = tokens.index_select(0, self._flat_index)
        return tokens.transpose(0, 1)[None]


class _CausalAttention:
    """Attention of rows without a prefix. Keeps their keys and values."""

    def __init__(self, rows: _PackedRows) -> None:
        self.rows = rows
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query, key, value = (self.rows.unpack(states) for states in (query, key, value))
        self.keys.append(key.transpose(-1, -2).contiguous())
        self.values.append(value.contiguous())
        return self.rows.pack(self.attend(layer, query, key, value, scale))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Fused attention. It takes the key as it came: torch computes a transposed one in many steps."""
        is_grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped)

    def build_prefixes(self) -> Prefixes:
        """The rows as prefixes."""
        return Prefixes(self.keys, self.values, self.rows.mask, self.rows.lengths.to(self.rows.mask.device))


class _ContinuationAttention(_CausalAttention):
    """Attention of rows that continue prefixes."""

    def __init__(self, rows: _PackedRows, prefixes: Prefixes, prefix_of_row: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__(rows)
        device, length = rows.mask.device, rows.shape[1]
        self.prefixes, self.prefix_of_row = prefixes, torch.tensor(prefix_of_row, device=device)
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        self.uses_fused_kernel = length > _FUSED_FROM
        if self.uses_fused_kernel:
            prefix_mask = prefixes.mask[self.prefix_of_row][:, None, None].expand(-1, -1, length, -1)
            self.mask = torch.cat([prefix_mask, causal.expand(len(prefix_of_row), 1, -1, -1)], dim=-1)
        else:
            self.groups = PrefixGroups.build(prefix_of_row, max(1, _MAX_TOKENS_PER_GROUP // length), device)
            self.prefix_of_group = torch.tensor(self.groups.prefixes, device=device)
            group_mask = prefixes.mask[self.prefix_of_group]
            self.n_columns = count_used_columns(group_mask)
            self.bias = mask_to_bias(group_mask[:, None, None, : self.n_columns], dtype)
            self.causal_bias = mask_to_bias(causal, dtype)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        prefix_keys, prefix_values = self.prefixes.keys[layer], self.prefixes.values[layer]
        heads, kv_heads = query.shape[1], value.shape[1]
        if self.uses_fused_kernel:
            keys = torch.cat([prefix_keys[self.prefix_of_row].transpose(-1, -2), key], dim=-2)
            values = torch.cat([prefix_values[self.prefix_of_row], value], dim=-2)
            is_grouped = heads != kv_heads
            return scaled_dot_product_attention(query, keys, values, self.mask, scale=scale, enable_gqa=is_grouped)
        own_bias = None if self.causal_bias is None else self.causal_bias.repeat(heads // kv_heads, 1)
        # The groups' keys and values are selected in each layer, because those of all layers together may be large.
        group_keys = prefix_keys[..., : self.n_columns].index_select(0, self.prefix_of_group)
        group_values = prefix_values[:, :, : self.n_columns].index_select(0, self.prefix_of_group)
        out = joint_attention(
            fold_query_heads(query, kv_heads, scale),
            [PrefixKeyValues(group_keys, group_values, self.bias, self.groups)],
            OwnKeyValues(self.keys[-1], self.values[-1], own_bias),
        )
        return out.reshape(*query.shape[:-1], -1)

    def build_prefixes(self) -> Prefixes:
        """The rows, each with the prefix that it continues, as prefixes."""
        own, before, rows = super().build_prefixes(), self.prefixes, self.prefix_of_row
        return Prefixes(
            [torch.cat([keys[rows], own_keys], -1) for keys, own_keys in zip(before.keys, own.keys, strict=True)],
            [torch.cat([vals[rows], own_vals], -2) for vals, own_vals in zip(before.values, own.values, strict=True)],
            torch.cat([before.mask[rows], own.mask], dim=-1),
            before.lengths[rows] + own.lengths,
        )


def find_sharing_obstacle(model: PreTrainedModel) -> str | None:
    """Why this model has to compute each row whole, or None where `prefill` gives what a plain forward pass does.

    The reason is a clause about "it", the model. In a trial, rows continue a prefix; with the other prefix their logits
    show how large a mistake would be.
    """
    if obstacle := find_layout_obstacle(model):
        return obstacle
    long_prefix = [1 + (7 * n) % 50 for n in range(12 + longest_tried_window(model))]
    rows = [[9, 4, 7, 8], [2, 30, 11], [17, 6, 40, 21, 13]]
    prefixes = [long_prefix, long_prefix[::-1][:7]]
    prefix_of_row = [0, 0, 1]
    try:
        with torch.inference_mode():
            expected, wrong = (
                [
                    model(input_ids=torch.tensor([prefixes[prefix] + row], device=model.device)).logits[0, -1]
                    for prefix, row in zip(assignment, rows, strict=True)
                ]
                for assignment in (prefix_of_row, [1 - prefix for prefix in prefix_of_row])
            )
        computed_prefixes = prefill(model, prefixes)[1]()
        if not computed_prefixes.keys:
            return "its attention is none that can be replaced"
        shared, _ = prefill(model, rows, computed_prefixes, prefix_of_row)
    except TRIAL_ERRORS as error:
        return f"it does not take attention to shared prefixes: {str(error).splitlines()[0]}"
    difference, difference_if_wrong = (
        max(float((ours - theirs).float().abs().max()) for ours, theirs in zip(shared, plain, strict=True))
        for plain in (expected, wrong)
    )
    if not is_rounding(difference, difference_if_wrong, model.dtype):
        return f"attention to shared prefixes changes its logits by {difference:.2g}"
    return None
