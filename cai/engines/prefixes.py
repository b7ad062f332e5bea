"""Rows that begin alike: what they share is read once, and every row attends to it.

A prefix's keys and values are kept (`Prefixes`); rows that continue it hold their own ids alone. Attention to a prefix
is one matrix product for all rows that share it, attention to a row's own ids another, and one softmax goes over both,
so that the result is that of reading each row whole (the idea of *Hydragen*, Juravsky et al. 2024, arXiv:2402.05099).
Keys lie transposed, because a CPU multiplies by them faster so.

`attending` lends a model this attention through transformers' attention interface. `can_share` says whether a model
takes it. Left out: attention that reaches back a window, soft caps and sinks, position biases, states instead of keys.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(layer, query, key, value, scale) -> output. Query, key, value are (batch, heads, seq, width), the output too."""

_NAME = "cai_prefixes"
_ATTEND: ContextVar[Attend] = ContextVar("attend")
_UNKNOWN = ("softcap", "s_aux", "position_bias")
"""Options of attention functions that would change what is computed. `can_share` looks for windows itself."""
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
"""What configs call the tokens that attention reaches back."""
_SCORES = 1 << 26
"""Attention scores that are held at once, in elements."""


@dataclass(frozen=True)
class Prefixes:
    """The keys, (prefix, kv heads, width, seq), and values, (prefix, kv heads, seq, width), of every layer.

    Padding, where `mask`, (prefix, seq), is False, can stand anywhere; `lengths`, (prefix,), leaves it out.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    mask: torch.Tensor
    lengths: torch.Tensor

    def select(self, indices: Sequence[int]) -> Prefixes:
        """Those at `indices`, without the columns that are padding in all of them; one may come several times."""
        if list(indices) == list(range(len(self.lengths))):
            return self
        at = torch.tensor(indices, device=self.mask.device)
        mask = self.mask[at]
        used = int(mask.any(dim=0).nonzero().max()) + 1 if mask.numel() else 0
        return Prefixes(
            [each[..., :used].index_select(0, at) for each in self.keys],
            [each[:, :, :used].index_select(0, at) for each in self.values],
            mask[:, :used],
            self.lengths[at],
        )

    def followed_by(self, other: Prefixes) -> Prefixes:
        """Both, one below the other."""
        longest = max(self.mask.shape[1], other.mask.shape[1])

        def below(first: torch.Tensor, second: torch.Tensor, dim: int) -> torch.Tensor:
            widths = [[0, 0] * (-1 - dim) + [0, longest - each.shape[dim]] for each in (first, second)]
            return torch.cat([pad(each, width) for each, width in zip((first, second), widths, strict=True)])

        return Prefixes(
            [below(*each, dim=-1) for each in zip(self.keys, other.keys, strict=True)],
            [below(*each, dim=-2) for each in zip(self.values, other.values, strict=True)],
            below(self.mask, other.mask, dim=-1),
            torch.cat([self.lengths, other.lengths]),
        )


class Groups:
    """Rows laid out by the prefix that they share: `prefixes`, one a group, and `size` places in each.

    `places` are those of the rows: row n stands in group places[n] // size. Some may be empty.
    """

    def __init__(self, prefixes: Sequence[int], size: int, places: Sequence[int], device: torch.device) -> None:
        self.prefixes = prefixes
        self.size = size
        full = list(places) == list(range(len(prefixes) * size))
        self._at = None if full else torch.tensor(places, device=device)

    @classmethod
    def of(cls, owners: Sequence[int], device: torch.device) -> Self:
        """Groups by owner; one with many more rows than others has several groups, so that few places are empty."""
        counts = Counter(owners)
        size = max(counts.values())
        if size * len(counts) > 1.5 * len(owners):
            size = math.ceil(len(owners) / len(counts))
        prefixes: list[int] = []
        following: dict[int, int] = {}
        for owner in sorted(counts):
            following[owner] = len(prefixes) * size
            prefixes += [owner] * math.ceil(counts[owner] / size)
        places = []
        for owner in owners:
            places.append(following[owner])
            following[owner] += 1
        return cls(prefixes, size, places, device)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """(row, heads, ...) -> (group, heads, place, ...)."""
        places = len(self.prefixes) * self.size
        if self._at is not None:
            rows = rows.new_zeros((places, *rows.shape[1:])).index_copy_(0, self._at, rows)
        return rows.view(len(self.prefixes), self.size, *rows.shape[1:]).transpose(1, 2)

    def scatter(self, places: torch.Tensor) -> torch.Tensor:
        """(group, heads, place, ...) -> (row, heads, ...)."""
        rows = places.transpose(1, 2).flatten(0, 1)
        return rows if self._at is None else rows.index_select(0, self._at)


def joint_attention(
    query: torch.Tensor,
    prefixes: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    groups: Groups,
    own: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
) -> torch.Tensor:
    """Attention of rows to their prefix and to what is their own, (row, kv heads, queries, width) like `query`.

    `prefixes` are the groups' keys, (group, kv heads, width, seq), values, and what is added to the scores; `own` the
    rows' keys, (row, kv heads, width, seq), values and the same. `query` is scaled already.
    """
    (keys, values, bias), (own_keys, own_values, own_bias) = prefixes, own
    own_scores = query @ own_keys
    if own_bias is not None:
        own_scores = own_scores + own_bias
    queries, own_scores = groups.gather(query), groups.gather(own_scores)
    length, (n, kv_heads, size, count, _) = keys.shape[-1], queries.shape
    at_once = max(1, _SCORES // (kv_heads * size * count * (length + own_scores.shape[-1])))
    out = queries.new_empty((*queries.shape[:-1], values.shape[-1]))
    own_weights = torch.empty_like(own_scores)
    for first in range(0, n, at_once):
        part = slice(first, first + at_once)
        shared = queries[part].flatten(2, 3) @ keys[part]
        if bias is not None:
            shared += bias[part]
        both = [shared.view(-1, kv_heads, size, count, length), own_scores[part]]
        weights = torch.cat(both, dim=-1).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        out[part] = (weights[..., :length].flatten(2, 3) @ values[part]).view_as(out[part])
        own_weights[part] = weights[..., length:]
    return groups.scatter(out) + groups.scatter(own_weights) @ own_values


def bias_of(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to scores where `mask` is False, or None where that is nowhere."""
    if bool(mask.all()):
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def grouped_heads(query: torch.Tensor, kv_heads: int, scale: float) -> torch.Tensor:
    """(batch, heads, seq, width) -> (batch, kv heads, heads a kv head x seq, width), scaled."""
    batch, _, _, width = query.shape
    return (query * scale).reshape(batch, kv_heads, -1, width)


class _Reading:
    """Rows that begin a text, padded on the right: plain causal attention. Keeps keys and values."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        self.keys.append(key.transpose(-1, -2).contiguous())
        self.values.append(value.contiguous())
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)


class _Continuing(_Reading):
    """Rows behind prefixes, each row padded on the right."""

    def __init__(self, prefixes: Prefixes, groups: Groups, length: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.behind = prefixes.select(groups.prefixes)
        self.groups = groups
        self.bias = bias_of(self.behind.mask[:, None, None], dtype)
        causal = torch.ones(length, length, dtype=torch.bool, device=prefixes.mask.device).tril()
        self.own_bias = bias_of(causal, dtype)

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        key = key.transpose(-1, -2)
        self.keys.append(key)
        self.values.append(value)
        own_bias = self.own_bias
        if own_bias is not None:
            own_bias = own_bias.repeat(query.shape[1] // key.shape[1], 1)
        out = joint_attention(
            grouped_heads(query, key.shape[1], scale),
            (self.behind.keys[layer], self.behind.values[layer], self.bias),
            self.groups,
            (key, value, own_bias),
        )
        return out.reshape(*query.shape[:-1], -1)


@torch.inference_mode()
def read(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    behind: Prefixes | None = None,
    owners: Sequence[int] = (),
) -> tuple[torch.Tensor, Callable[[], Prefixes]]:
    """Reads rows, each behind the prefix that `owners` names where there are any.

    Returns the logits after each row's last id, (rows, vocabulary), and what gives the rows, with all before them, as
    prefixes.
    """
    device = model.device
    sizes = torch.tensor([len(row) for row in rows])
    longest = int(sizes.max())
    ids = torch.tensor([list(row) + [pad_id] * (longest - len(row)) for row in rows], device=device)
    mask = (torch.arange(longest) < sizes[:, None]).to(device)
    lengths = sizes.to(device)
    positions = torch.arange(longest, device=device).expand(len(rows), -1)
    reading = _Reading()
    if behind is not None:
        reading = _Continuing(behind, Groups.of(owners, device), longest, model.dtype)
        own = torch.tensor(owners, device=device)
        positions = positions + behind.lengths[own, None]
    logits = forward(model, ids, positions, reading, (torch.arange(len(rows), device=device), lengths - 1))

    def kept() -> Prefixes:
        if behind is None:
            return Prefixes(reading.keys, reading.values, mask, lengths)
        return Prefixes(
            [torch.cat([old[own], new], dim=-1) for old, new in zip(behind.keys, reading.keys, strict=True)],
            [torch.cat([old[own], new], dim=-2) for old, new in zip(behind.values, reading.values, strict=True)],
            torch.cat([behind.mask[own], mask], dim=-1),
            behind.lengths[own] + lengths,
        )

    return logits, kept


def forward(
    model: PreTrainedModel,
    ids: torch.Tensor,
    positions: torch.Tensor,
    attend: Attend,
    wanted: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """One forward pass of `ids`, (batch, seq), with that attention: the logits at `wanted`, (row, column) each (n,).

    The head sees the wanted states alone: all logits of long rows would be larger than everything else.
    """

    def only_wanted(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (args[0][wanted][None],)

    head = model.get_output_embeddings()
    assert head is not None
    hook = head.register_forward_pre_hook(only_wanted)
    try:
        with _attending(model, attend):
            logits: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits


@contextlib.contextmanager
def _attending(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Within, `attend` is the model's attention."""
    before, token = model.config._attn_implementation, _ATTEND.set(attend)
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        _ATTEND.reset(token)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer. No mask is built for an attention that has no mask function."""
    if known := [name for name in _UNKNOWN if options.get(name) is not None]:
        raise NotImplementedError(f"its attention has {known[0]!r}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    return _ATTEND.get()(layer, query, key, value, scale).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attention)


def can_share(model: PreTrainedModel) -> str | None:
    """Why this model has to read each row whole, or None: then `read` gives what a plain forward pass does."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention"}:
        return f"it has layers of the kind {', '.join(sorted(kinds - {'full_attention'}))}"
    if not kinds and (window := _window(config)):
        return f"its attention reaches back {window} tokens, which what is shared would outgrow"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward pass takes no positions"
    shared, branches = [1 + (7 * n) % 50 for n in range(12)], [[9, 4, 7, 8], [2, 30, 11], [17, 6, 40, 21, 13]]
    trunks = [shared, shared[::-1][:7]]
    owners = [0, 0, 1]
    try:
        with torch.inference_mode():
            expected, swapped = (
                [
                    model(input_ids=torch.tensor([trunks[own] + row], device=model.device)).logits[0, -1]
                    for own, row in zip(each, branches, strict=True)
                ]
                for each in (owners, [1 - own for own in owners])
            )
        found, _ = read(model, branches, 0, read(model, trunks, 0)[1](), owners)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError, NotImplementedError) as error:
        return f"it does not take attention to shared prefixes: {str(error).splitlines()[0]}"
    differ, other = (
        max(float((one - two).float().abs().max()) for one, two in zip(found, each, strict=True))
        for each in (expected, swapped)
    )
    # In float32 the two agree to rounding; in bfloat16 to far less than what a wrong prefix would change.
    if not differ <= max(1e-3, 0.2 * other):
        return f"attention to shared prefixes changes its logits by {differ:.2g}"
    return None


def _window(config: PreTrainedConfig) -> int | None:
    """Tokens that attention reaches back, where the model takes longer texts."""
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    windows = [each for name in _WINDOWS if isinstance(each := getattr(config, name, None), int) and 0 < each < longest]
    return min(windows, default=None)
