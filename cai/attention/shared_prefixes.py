"""Attention of rows that share prefixes: a prefix's keys and values are computed once and kept once.

Rows that continue a prefix hold their own tokens alone. Attention to a prefix is one matrix product for all rows that
share it, attention to a row's own tokens another, and one softmax goes over both, so that the result is that of whole
rows (the idea of *Hydragen*, Juravsky et al. 2024, arXiv:2402.05099). Keys are stored transposed, because a CPU
multiplies by them faster so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from cai.attention.cpu_tuning import pad_to_multiple

_MAX_SCORES = 1 << 26
"""Attention scores that are held at once, in elements, unless a single group has more."""


@dataclass(frozen=True)
class Prefixes:
    """The keys, (prefix, kv heads, width, seq), and values, (prefix, kv heads, seq, width), of every layer.

    Padding, where `mask`, (prefix, seq), is False, can be anywhere; `lengths`, (prefix,), does not count it.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    lengths: Tensor

    def select(self, indices: Sequence[int]) -> Prefixes:
        """The prefixes at `indices`, which may repeat, without the last columns that are padding in all of them."""
        if list(indices) == list(range(len(self.lengths))):
            return self
        selected = torch.tensor(indices, device=self.mask.device)
        mask = self.mask[selected]
        n_columns = count_used_columns(mask)
        return Prefixes(
            [keys[..., :n_columns].index_select(0, selected) for keys in self.keys],
            [values[:, :, :n_columns].index_select(0, selected) for values in self.values],
            mask[:, :n_columns],
            self.lengths[selected],
        )

    @staticmethod
    def concatenate(parts: Sequence[Prefixes]) -> Prefixes:
        """The prefixes of all parts, in order, padded on the right to the longest."""
        if len(parts) == 1:
            return parts[0]
        return Prefixes(
            [_stack_padded(layer, dim=-1) for layer in zip(*(part.keys for part in parts), strict=True)],
            [_stack_padded(layer, dim=-2) for layer in zip(*(part.values for part in parts), strict=True)],
            _stack_padded([part.mask for part in parts], dim=-1),
            torch.cat([part.lengths for part in parts]),
        )


def _stack_padded(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """The tensors one after the other in their first dimension, padded with zeros to one size in dimension `dim`."""
    shape = list(tensors[0].shape)
    shape[0], shape[dim] = sum(map(len, tensors)), max(tensor.shape[dim] for tensor in tensors)
    out, first = tensors[0].new_zeros(shape), 0
    for tensor in tensors:
        out[first : first + len(tensor)].narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        first += len(tensor)
    return out


class PrefixGroups:
    """Rows laid out by the prefix that they share: one prefix a group, and `size` slots in each, some of them empty.

    `prefixes` are the indices of the groups' prefixes. `slots` are (group, slot in the group) of each row. With `rows`
    the groups hold these rows of a batch alone.
    """

    def __init__(
        self, prefixes: Sequence[int], size: int, slots: Sequence[tuple[int, int]], device: torch.device,
        rows: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.prefixes, self.size = prefixes, size
        flat_slots = [group * size + slot for group, slot in slots]
        is_identity = flat_slots == list(range(len(prefixes) * size))
        self._flat_slots = None if is_identity else torch.tensor(flat_slots, device=device)
        self.rows = None if rows is None else torch.tensor(rows, device=device)

    @classmethod
    def build(cls, prefix_of_row: Sequence[int], max_size: int, device: torch.device) -> Self:
        """Groups of at most `max_size` slots; a prefix with many rows has several, so that few slots are empty."""
        counts = Counter(prefix_of_row)
        size = min(max(counts.values()), max_size)
        if size * len(counts) > 1.5 * len(prefix_of_row):
            size = min(math.ceil(len(prefix_of_row) / len(counts)), max_size)
        prefixes: list[int] = []
        first_group: dict[int, int] = {}
        for prefix in sorted(counts):
            first_group[prefix] = len(prefixes)
            prefixes += [prefix] * math.ceil(counts[prefix] / size)
        slots: list[tuple[int, int]] = []
        n_placed: Counter[int] = Counter()
        for prefix in prefix_of_row:
            slots.append((first_group[prefix] + n_placed[prefix] // size, n_placed[prefix] % size))
            n_placed[prefix] += 1
        return cls(prefixes, size, slots, device)

    def gather(self, rows: Tensor) -> Tensor:
        """(row, heads, ...) -> (group, heads, slot, ...)."""
        if self.rows is not None:
            rows = rows.index_select(0, self.rows)
        if self._flat_slots is not None:
            n_slots = len(self.prefixes) * self.size
            rows = rows.new_zeros((n_slots, *rows.shape[1:])).index_copy_(0, self._flat_slots, rows)
        return rows.view(len(self.prefixes), self.size, *rows.shape[1:]).transpose(1, 2)

    def scatter(self, slots: Tensor) -> Tensor:
        """(group, heads, slot, ...) -> (row, heads, ...), of the rows in these groups."""
        rows = slots.transpose(1, 2).flatten(0, 1)
        return rows if self._flat_slots is None else rows.index_select(0, self._flat_slots)


class PrefixKeyValues(NamedTuple):
    """Keys, (group, kv heads, width, seq), and values, (group, kv heads, seq, width), of prefixes in one layer."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None  # added to the scores
    groups: PrefixGroups


class OwnKeyValues(NamedTuple):
    """Keys, (row, kv heads, width, seq), and values, (row, kv heads, seq, width), of rows' own tokens in one layer."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None  # added to the scores


def joint_attention(query: Tensor, prefixes: Sequence[PrefixKeyValues], own: OwnKeyValues) -> Tensor:
    """Attention of rows to their prefix and their own tokens, (row, kv heads, queries, width) like `query`.

    `query` is scaled already. Prefixes of much different lengths come in several parts; each row is in one of them.
    """
    own_scores = query @ own.keys
    if own.bias is not None:
        own_scores = own_scores + own.bias
    if len(prefixes) == 1:
        out, own_weights = _attend_to_prefixes(query, own_scores, prefixes[0])
    else:
        out = query.new_empty((*query.shape[:-1], own.values.shape[-1]))
        own_weights = query.new_empty(own_scores.shape)
        for part in prefixes:
            assert part.groups.rows is not None
            part_out, part_weights = _attend_to_prefixes(query, own_scores, part)
            out.index_copy_(0, part.groups.rows, part_out)
            own_weights.index_copy_(0, part.groups.rows, part_weights)
    return out + own_weights @ own.values


def _attend_to_prefixes(query: Tensor, own_scores: Tensor, prefixes: PrefixKeyValues) -> tuple[Tensor, Tensor]:
    """(prefixes' part of the output, weights of the rows' own tokens), under one softmax over both."""
    keys, values, bias, groups = prefixes
    queries, own_scores = groups.gather(query), groups.gather(own_scores)
    length, own_length, (n_groups, kv_heads, size, n_queries, _) = keys.shape[-1], own_scores.shape[-1], queries.shape
    n_columns = pad_to_multiple(length + own_length, query.dtype, query.device)
    groups_at_once = max(1, _MAX_SCORES // (kv_heads * size * n_queries * n_columns))
    out, own_weights = [], []
    for first in range(0, n_groups, groups_at_once):
        part = slice(first, first + groups_at_once)
        prefix_scores = queries[part].flatten(2, 3) @ keys[part]
        scores = prefix_scores.new_empty((*prefix_scores.shape[:-1], n_columns))
        scores[..., :length] = prefix_scores
        scores[..., length : length + own_length] = own_scores[part].flatten(2, 3)
        scores[..., length + own_length :] = -math.inf
        if bias is not None:  # to all columns: to a part of a row a CPU adds element by element in bfloat16
            scores += pad(bias[part], (0, n_columns - length))
        weights = scores.softmax(dim=-1)  # computed in float32, whatever the scores are in
        out.append(weights[..., :length] @ values[part])
        own_weights.append(weights[..., length : length + own_length])
    shape = (n_groups, kv_heads, size, n_queries, -1)
    return groups.scatter(concatenate(out).reshape(shape)), groups.scatter(concatenate(own_weights).reshape(shape))


def concatenate(tensors: list[Tensor]) -> Tensor:
    """`torch.cat` without a copy of a single tensor, which may be large."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def mask_to_bias(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What is added to scores so that no row attends where `mask` is False; None where it is True everywhere."""
    if bool(mask.all()):
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def count_used_columns(mask: Tensor) -> int:
    """Columns of a mask, (row, column), up to the last one that a row uses."""
    return int(mask.any(dim=0).nonzero().max()) + 1 if mask.numel() else 0


def fold_query_heads(query: Tensor, kv_heads: int, scale: float) -> Tensor:
    """(batch, heads, seq, width) -> (batch, kv heads, heads per kv head * seq, width), scaled."""
    batch, _, _, width = query.shape
    return (query * scale).reshape(batch, kv_heads, -1, width)
