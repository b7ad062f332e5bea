"""Rows that begin alike: what they share is read once, and every row attends to it.

A prefix's keys and values are kept (`Prefixes`); rows that continue it hold their own ids alone. Attention to a prefix
is one matrix product for all rows that share it, attention to a row's own ids another, and one softmax goes over both,
so that the result is that of reading each row whole (the idea of *Hydragen*, Juravsky et al. 2024, arXiv:2402.05099).
Keys lie transposed, because a CPU multiplies by them faster so.

`forward` lends a model this attention through transformers' attention interface, and `can_share` says whether a model
takes it. Left out: attention that reaches back a window, soft caps and sinks, position biases, states instead of keys.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from cai.attention.cpu_sizes import pad_to_multiple

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
REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)
"""What models raise in a trial of an attention that they do not take."""
_SCORES = 1 << 26
"""Attention scores that are held at once, in elements, where these are more than those of one group."""
_QUERIES = 1024
"""Tokens of one group at most, as far as one row does not have more."""
_LONG = 128
"""Tokens of a row from which on a fused kernel over prefix and row together is faster than two products."""


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
        """Those at `indices`, without the last columns that are padding in all of them; one may come several times."""
        if list(indices) == list(range(len(self.lengths))):
            return self
        at = torch.tensor(indices, device=self.mask.device)
        mask = self.mask[at]
        used = _used(mask)
        return Prefixes(
            [each[..., :used].index_select(0, at) for each in self.keys],
            [each[:, :, :used].index_select(0, at) for each in self.values],
            mask[:, :used],
            self.lengths[at],
        )

    def followed_by(self, *others: Prefixes) -> Prefixes:
        """All of them, one below the other."""
        if not others:
            return self
        parts = (self, *others)

        def below(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
            shape = list(tensors[0].shape)
            shape[0], shape[dim] = sum(len(each) for each in tensors), max(each.shape[dim] for each in tensors)
            out, first = tensors[0].new_zeros(shape), 0
            for each in tensors:
                out[first : first + len(each)].narrow(dim, 0, each.shape[dim]).copy_(each)
                first += len(each)
            return out

        return Prefixes(
            [below(layer, dim=-1) for layer in zip(*(part.keys for part in parts), strict=True)],
            [below(layer, dim=-2) for layer in zip(*(part.values for part in parts), strict=True)],
            below([part.mask for part in parts], dim=-1),
            torch.cat([part.lengths for part in parts]),
        )


class Groups:
    """Rows laid out by the prefix that they share: `prefixes`, one a group, and `size` places in each.

    `places` are those of the rows: row n stands in group places[n] // size. Some may be empty. With `rows`, only these
    of a batch's rows are meant.
    """

    def __init__(
        self,
        prefixes: Sequence[int],
        size: int,
        places: Sequence[int],
        device: torch.device,
        rows: Sequence[int] | None = None,
    ) -> None:
        self.prefixes = prefixes
        self.size = size
        full = list(places) == list(range(len(prefixes) * size))
        self._at = None if full else torch.tensor(places, device=device)
        self.rows = None if rows is None else torch.tensor(rows, device=device)

    @classmethod
    def of(cls, owners: Sequence[int], most: int, device: torch.device) -> Self:
        """Groups by owner, of at most so many places.

        One with many more rows than others has several groups, so that few places are empty.
        """
        counts = Counter(owners)
        size = min(max(counts.values()), most)
        if size * len(counts) > 1.5 * len(owners):
            size = min(math.ceil(len(owners) / len(counts)), most)
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
        if self.rows is not None:
            rows = rows.index_select(0, self.rows)
        places = len(self.prefixes) * self.size
        if self._at is not None:
            rows = rows.new_zeros((places, *rows.shape[1:])).index_copy_(0, self._at, rows)
        return rows.view(len(self.prefixes), self.size, *rows.shape[1:]).transpose(1, 2)

    def scatter(self, places: torch.Tensor) -> torch.Tensor:
        """(group, heads, place, ...) -> (row, heads, ...), of the rows that are meant."""
        rows = places.transpose(1, 2).flatten(0, 1)
        return rows if self._at is None else rows.index_select(0, self._at)


class Shared(NamedTuple):
    """Groups' keys, (group, kv heads, width, seq), values, what is added to the scores, and the rows of each."""

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None
    groups: Groups


def joint_attention(
    query: torch.Tensor,
    shared: Sequence[Shared],
    own: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
) -> torch.Tensor:
    """Attention of rows to their prefix and to what is their own, (row, kv heads, queries, width) like `query`.

    `shared` are prefixes, in several parts where their lengths differ much, so that each row is in one of them; `own`
    the rows' keys, (row, kv heads, width, seq), values and what is added to their scores. `query` is scaled already.
    """
    own_keys, own_values, own_bias = own
    own_scores = query @ own_keys
    if own_bias is not None:
        own_scores = own_scores + own_bias
    if len(shared) == 1:
        out, weights = _to_prefixes(query, own_scores, shared[0])
    else:
        shapes = ((*query.shape[:-1], own_values.shape[-1]), own_scores.shape)
        out, weights = (query.new_empty(shape) for shape in shapes)
        for part in shared:
            assert part.groups.rows is not None
            for whole, some in zip((out, weights), _to_prefixes(query, own_scores, part), strict=True):
                whole.index_copy_(0, part.groups.rows, some)
    return out + weights @ own_values


def _to_prefixes(query: torch.Tensor, own_scores: torch.Tensor, shared: Shared) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows take of their prefixes, and the weights of what is their own; both sum to one attention."""
    keys, values, bias, groups = shared
    queries, own_scores = groups.gather(query), groups.gather(own_scores)
    length, own_length, (n, kv_heads, size, count, _) = keys.shape[-1], own_scores.shape[-1], queries.shape
    columns = pad_to_multiple(length + own_length, query.dtype, query.device)
    at_once = max(1, _SCORES // (kv_heads * size * count * columns))
    out, own_weights = [], []
    for first in range(0, n, at_once):
        part = slice(first, first + at_once)
        scores = queries[part].flatten(2, 3) @ keys[part]
        both = scores.new_empty((*scores.shape[:-1], columns))
        both[..., :length] = scores
        both[..., length : length + own_length] = own_scores[part].flatten(2, 3)
        both[..., length + own_length :] = -math.inf
        if bias is not None:  # to all columns: to a part of a row a CPU adds element by element in bfloat16
            both += pad(bias[part], (0, columns - length))
        weights = both.softmax(dim=-1)  # which is computed in float32, whatever the scores are in
        out.append(weights[..., :length] @ values[part])
        own_weights.append(weights[..., length : length + own_length])
    places = (n, kv_heads, size, count, -1)
    return groups.scatter(joined(out).reshape(places)), groups.scatter(joined(own_weights).reshape(places))


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One below the other; a single one, which may be large, is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def bias_of(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to scores where `mask` is False, or None where that is nowhere."""
    if bool(mask.all()):
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _used(mask: torch.Tensor) -> int:
    """Columns of a mask, (row, column), up to the last that some row uses."""
    return int(mask.any(dim=0).nonzero().max()) + 1 if mask.numel() else 0


def grouped_heads(query: torch.Tensor, kv_heads: int, scale: float) -> torch.Tensor:
    """(batch, heads, seq, width) -> (batch, kv heads, heads a kv head x seq, width), scaled."""
    batch, _, _, width = query.shape
    return (query * scale).reshape(batch, kv_heads, -1, width)


class _Packed:
    """Rows of several lengths laid out one after the other, as everything but attention reads them: without padding."""

    def __init__(self, rows: Sequence[Sequence[int]], device: torch.device) -> None:
        self.sizes = torch.tensor([len(row) for row in rows])
        self.shape = len(rows), int(self.sizes.max())
        self.mask = (torch.arange(self.shape[1]) < self.sizes[:, None]).to(device)
        self.ids = torch.tensor([list(itertools.chain.from_iterable(rows))], device=device)
        self.columns = torch.arange(self.shape[1], device=device).expand(self.shape)[self.mask]
        self.last = (self.sizes.cumsum(0) - 1).to(device)
        self._at = None if bool(self.mask.all()) else self.mask.flatten().nonzero()[:, 0]

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """(1, heads, token, width) -> (row, heads, column, width), padded on the right with zeros."""
        tokens = states[0].transpose(0, 1)
        if self._at is not None:
            room = tokens.new_zeros((self.shape[0] * self.shape[1], *tokens.shape[1:]))
            tokens = room.index_copy_(0, self._at, tokens)
        return tokens.reshape(*self.shape, *tokens.shape[1:]).transpose(1, 2)

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """(row, heads, column, width) -> (1, heads, token, width)."""
        tokens = states.transpose(1, 2).flatten(0, 1)
        if self._at is not None:
            tokens = tokens.index_select(0, self._at)
        return tokens.transpose(0, 1)[None]


class _Reading:
    """Attention of rows that begin a text: plainly causal. Keeps keys and values."""

    def __init__(self, rows: _Packed) -> None:
        self.rows = rows
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        query, key, value = (self.rows.unpack(each) for each in (query, key, value))
        self.keys.append(key.transpose(-1, -2).contiguous())
        self.values.append(value.contiguous())
        return self.rows.pack(self.attend(layer, query, key, value, scale))

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Fused attention, with the key as it came: of a transposed one torch computes it in many steps."""
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)

    def prefixes(self) -> Prefixes:
        """The rows as prefixes."""
        return Prefixes(self.keys, self.values, self.rows.mask, self.rows.sizes.to(self.rows.mask.device))


class _Continuing(_Reading):
    """Attention of rows behind prefixes."""

    def __init__(self, rows: _Packed, behind: Prefixes, owners: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__(rows)
        device, length = rows.mask.device, rows.shape[1]
        self.behind, self.owners = behind, torch.tensor(owners, device=device)
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        self.long = length > _LONG
        if self.long:
            before = behind.mask[self.owners][:, None, None].expand(-1, -1, length, -1)
            self.mask = torch.cat([before, causal.expand(len(owners), 1, -1, -1)], dim=-1)
        else:
            self.groups = Groups.of(owners, max(1, _QUERIES // length), device)
            self.at = torch.tensor(self.groups.prefixes, device=device)
            mask = behind.mask[self.at]
            self.used = _used(mask)
            self.bias = bias_of(mask[:, None, None, : self.used], dtype)
            self.own_bias = bias_of(causal, dtype)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        if self.long:
            keys = torch.cat([self.behind.keys[layer][self.owners].transpose(-1, -2), key], dim=-2)
            values = torch.cat([self.behind.values[layer][self.owners], value], dim=-2)
            grouped = query.shape[1] != value.shape[1]
            return scaled_dot_product_attention(query, keys, values, self.mask, scale=scale, enable_gqa=grouped)
        kv_heads = value.shape[1]
        own_bias = None if self.own_bias is None else self.own_bias.repeat(query.shape[1] // kv_heads, 1)
        keys = self.behind.keys[layer][..., : self.used].index_select(0, self.at)  # layer by layer: it may be large
        values = self.behind.values[layer][:, :, : self.used].index_select(0, self.at)
        out = joint_attention(
            grouped_heads(query, kv_heads, scale),
            [Shared(keys, values, self.bias, self.groups)],
            (self.keys[-1], self.values[-1], own_bias),
        )
        return out.reshape(*query.shape[:-1], -1)

    def prefixes(self) -> Prefixes:
        """The rows, with all before them, as prefixes."""
        own, old, at = super().prefixes(), self.behind, self.owners
        return Prefixes(
            [torch.cat([one[at], other], dim=-1) for one, other in zip(old.keys, own.keys, strict=True)],
            [torch.cat([one[at], other], dim=-2) for one, other in zip(old.values, own.values, strict=True)],
            torch.cat([old.mask[at], own.mask], dim=-1),
            old.lengths[at] + own.lengths,
        )


@torch.inference_mode()
def read(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    behind: Prefixes | None = None,
    owners: Sequence[int] = (),
) -> tuple[torch.Tensor, Callable[[], Prefixes]]:
    """Reads rows, each behind the prefix that `owners` names where there are any.

    Returns the logits after each row's last id, (rows, vocabulary), and what gives the rows as prefixes.
    """
    packed = _Packed(rows, model.device)
    reading, positions = _Reading(packed), packed.columns
    if behind is not None:
        reading = _Continuing(packed, behind, owners, model.dtype)
        positions = positions + behind.lengths[reading.owners].repeat_interleave(packed.sizes.to(model.device))
    last = torch.zeros_like(packed.last), packed.last
    return forward(model, packed.ids, positions[None], reading, last), reading.prefixes


def forward(
    model: PreTrainedModel,
    ids: torch.Tensor,
    positions: torch.Tensor,
    attend: Attend,
    wanted: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """One forward pass of `ids`, (batch, seq), with that attention: the logits at `wanted`, (row, column) each (n,).

    The head sees the wanted states alone: all logits of long rows would be larger than everything else. What is
    multiplied with weights has a few more rows where that is faster (`pad_to_multiple`); attention does not see them.
    """
    dim = 0 if ids.shape[1] == 1 else 1
    there, n = ids.shape[dim], len(wanted[0])
    size, states = (pad_to_multiple(each, model.dtype, model.device) for each in (there, n))

    def attend_there(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        query, key, value = (each.narrow(2 * dim, 0, there) for each in (query, key, value))
        return _with_zeros(attend(layer, query, key, value, scale), 2 * dim, size)

    def only_wanted(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (_with_zeros(args[0][wanted][None], 1, states),)

    head = model.get_output_embeddings()
    assert head is not None
    hook = head.register_forward_pre_hook(only_wanted)
    ids, positions = (_with_zeros(each, dim, size) for each in (ids, positions))
    try:
        with attending(model, attend_there):
            logits: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits[:n]


def _with_zeros(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """The tensor with zeros behind it, so that it has that size in one dimension."""
    missing = size - tensor.shape[dim]
    return pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]) if missing else tensor


@contextlib.contextmanager
def attending(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
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
    if reason := not_plainly_causal(model):
        return reason
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
        found, _ = read(model, branches, read(model, trunks)[1](), owners)
    except REFUSALS as error:
        return f"it does not take attention to shared prefixes: {str(error).splitlines()[0]}"
    differ, other = (
        max(float((one - two).float().abs().max()) for one, two in zip(found, each, strict=True))
        for each in (expected, swapped)
    )
    if not rounding(differ, other):
        return f"attention to shared prefixes changes its logits by {differ:.2g}"
    return None


def rounding(differ: float, other: float) -> bool:
    """Whether two ways of computing the same differ by rounding alone, where a wrong one would change it by `other`.

    In float32 that is next to nothing; in bfloat16 far less than `other`.
    """
    return differ <= max(1e-3, 0.2 * other)


def not_plainly_causal(model: PreTrainedModel) -> str | None:
    """What keeps tokens from being laid out in another way than as rows, as far as config and signature tell."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention"}:
        return f"it has layers of the kind {', '.join(sorted(kinds - {'full_attention'}))}"
    if not kinds and (window := _window(config)):
        return f"its attention reaches back {window} tokens, which what is shared would outgrow"
    if (rope := _rope_type(config)) in {"dynamic", "longrope"}:
        return f"its rotary positions ({rope}) depend on the longest row of a pass"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward pass takes no positions"
    return None


def _rope_type(config: PreTrainedConfig) -> str | None:
    """The kind of rotary positions, where the config tells."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return given.get("rope_type") or given.get("type")


def _window(config: PreTrainedConfig) -> int | None:
    """Tokens that attention reaches back, where the model takes longer texts."""
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    windows = [each for name in _WINDOWS if isinstance(each := getattr(config, name, None), int) and 0 < each < longest]
    return min(windows, default=None)
