"""The decoding loop: prompts in; drawn ids and their log-probabilities out. Tensors, no texts.

Samples of one prompt share it: it is read once, and their rows hold what they drew alone (`cai.engines.prefixes`). The
rows that run fill a budget of tokens; those that ended make room, and waiting ones enter, the longest prompts first. A
row's randomness is a row of uniforms from its own seed, put through the inverse of the cumulative distribution: what
else is in the batch does not touch it.

Left out: beams, penalties, speculative decoding, reading a long prompt in parts.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from cai.engines import Sampling
from cai.engines.batching import batches, in_one_pass
from cai.engines.prefixes import Groups, Prefixes, bias_of, forward, grouped_heads, joint_attention, read
from cai.engines.sampling import draw, uniforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEAVE = 32
"""Rows leave when one in so many has ended: until then they are computed in vain, and leaving costs a little."""
_ENTER = 8
"""New rows enter when one in so many tokens of the budget is free: few prompts at once are read slowly."""
_DRAWN = 256
"""Rows whose tokens are drawn at once."""
_MORE = 16
"""Tokens of a row that room is made for at once."""


class Wanted(NamedTuple):
    """A response wanted: the prompt's ids, and the seed of its randomness."""

    prompt: Sequence[int]
    seed: int


class _Group(NamedTuple):
    """Responses wanted to one prompt, by their index."""

    prompt: Sequence[int]
    members: list[int]


class Drawn(NamedTuple):
    """What was drawn for one prompt: ids, natural log-probabilities, and whether it ended by itself."""

    token_ids: list[int]
    log_probs: list[float]
    ended: bool


@dataclass(frozen=True)
class Stopping:
    """What ends a response: one of `ids` drawn, or `complete`, asked about the ids drawn for one row so far."""

    ids: frozenset[int]
    complete: Callable[[list[int]], bool] | None = None


@dataclass
class Row:
    """A response that is being drawn, to a prompt of `length` tokens. `place` is its place among the prompts."""

    number: int
    length: int
    place: int
    uniform: list[list[float]]
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ended: bool = False
    over: bool = False

    @property
    def chance(self) -> list[float]:
        """The two numbers that decide the next token."""
        return self.uniform[min(len(self.token_ids), len(self.uniform) - 1)]

    def drawn(self) -> Drawn:
        """What there is of it."""
        return Drawn(self.token_ids, self.log_probs, self.ended)


class Room:
    """The keys, (row, kv heads, width, token), and values, (row, kv heads, token, width), of what rows drew themselves.

    There is room for a few more rows and tokens than are needed, and zeros where nothing is yet: a product with all
    tokens is faster than one with a part.
    """

    def __init__(self) -> None:
        self.rows = self.tokens = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def make(self, rows: int, tokens: int) -> None:
        """Makes room for so many, and some more, where there is less."""
        more_rows = 0 if rows <= self.rows else rows - self.rows + rows // 4
        more_tokens = 0 if tokens <= self.tokens else tokens - self.tokens + max(_MORE, tokens // 4)
        if not more_rows and not more_tokens:
            return
        self.rows += more_rows
        self.tokens += more_tokens
        self.keys = [pad(each, (0, more_tokens, 0, 0, 0, 0, 0, more_rows)) for each in self.keys]
        self.values = [pad(each, (0, 0, 0, more_tokens, 0, 0, 0, more_rows)) for each in self.values]

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Rows take the places of others."""
        for each in (*self.keys, *self.values):
            each[list(targets)] = each[list(sources)]

    def write(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, at: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes each row's key and value, (row, kv heads, 1, width), at its token; all keys and values of the rows."""
        n, heads, _, width = key.shape
        if layer == len(self.keys):
            self.keys.append(key.new_zeros((self.rows, heads, width, self.tokens)))
            self.values.append(value.new_zeros((self.rows, heads, self.tokens, value.shape[-1])))
        keys, values = self.keys[layer][:n], self.values[layer][:n]
        rows = torch.arange(n, device=at.device)
        keys[rows, :, :, at] = key[:, :, 0]
        values[rows, :, at] = value[:, :, 0]
        return keys, values


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
    """(index, what was drawn) of each response as it ends. Rows and prompts that run have `budget` tokens of room."""
    waiting = deque(_by_prompt(wanted, budget, sampling.max_new_tokens))
    batch = _Batch(model, max((len(group.members) for group in waiting), default=0))
    while waiting or batch.rows:
        if entering := _entering(waiting, batch, budget, sampling.max_new_tokens):
            seeds = {n: wanted[n].seed for group in entering for n in group.members}
            chances = uniforms(list(seeds.values()), sampling.max_new_tokens).tolist()
            new, logits = batch.enter(entering, dict(zip(seeds, chances, strict=True)))
            take(new, logits, sampling, banned, stopping)
        while sum(row.over for row in batch.rows) * _LEAVE < len(batch.rows):
            take(batch.rows, batch.step(), sampling, banned, stopping)
        yield from ((row.number, row.drawn()) for row in batch.leave())


class _Batch:
    """The rows that run: a forward pass of one more token of each, behind its prompt and what it drew.

    Rows lie without gaps: the last ones take the places of those that leave. A prompt has `size` places for its rows.
    """

    def __init__(self, model: PreTrainedModel, size: int) -> None:
        self.model = model
        self.size = size
        self.rows: list[Row] = []
        self.prefixes: Prefixes | None = None
        self.bias: torch.Tensor | None = None
        self.room = Room()

    @property
    def n_prompts(self) -> int:
        """The prompts that are kept, with rows or without."""
        return 0 if self.prefixes is None else len(self.prefixes.lengths)

    @property
    def prompts(self) -> list[int]:
        """The prompts that still have rows."""
        return sorted({row.place // self.size for row in self.rows})

    def enter(
        self, groups: Sequence[_Group], uniform: Mapping[int, list[list[float]]]
    ) -> tuple[list[Row], torch.Tensor]:
        """Reads new prompts, after forgetting those without rows. New rows, and the logits of their first tokens."""
        groups = sorted(groups, key=lambda group: len(group.prompt))
        sizes = [len(group.prompt) for group in groups]
        parts: list[Prefixes] = []
        logits: list[torch.Tensor] = []
        for begin, end in batches(sizes, in_one_pass(len(sizes) * sizes[-1], self.model.device)):
            last, keep = read(self.model, [group.prompt for group in groups[begin:end]])
            logits.append(last)
            parts.append(keep())
        self._keep(self.prompts)
        before = self.n_prompts
        first, *others = parts if self.prefixes is None else [self.prefixes, *parts]
        self._set(first.followed_by(*others))
        new = [
            Row(number, len(group.prompt), (before + n) * self.size + member, uniform[number])
            for n, group in enumerate(groups)
            for member, number in enumerate(group.members)
        ]
        self.rows += new
        return new, torch.cat(logits)[[row.place // self.size - before for row in new]]

    def leave(self) -> list[Row]:
        """Takes out the rows that are over."""
        over = [row for row in self.rows if row.over]
        left = len(self.rows) - len(over)
        gaps = [n for n in range(left) if self.rows[n].over]
        last = [n for n in range(left, len(self.rows)) if not self.rows[n].over]
        for gap, n in zip(gaps, last, strict=True):
            self.rows[gap] = self.rows[n]
        self.room.make(len(self.rows), 0)  # rows that end with their first token have not been there yet
        del self.rows[left:]
        if gaps:
            self.room.move(last, gaps)
        if 2 * len(prompts := self.prompts) < self.n_prompts:
            self._keep(prompts)
        return over

    def _keep(self, prompts: Sequence[int]) -> None:
        """Forgets the other prompts."""
        places = {prompt: n for n, prompt in enumerate(prompts)}
        for row in self.rows:
            prompt, member = divmod(row.place, self.size)
            row.place = places[prompt] * self.size + member
        self._set(self.prefixes.select(prompts) if self.prefixes is not None and prompts else None)

    def _set(self, prefixes: Prefixes | None) -> None:
        self.prefixes = prefixes
        self.bias = None if prefixes is None else bias_of(prefixes.mask[:, None, None], self.model.dtype)

    def step(self) -> torch.Tensor:
        """Logits of the next token of each row, (row, vocabulary)."""
        device, rows = self.model.device, self.rows
        assert self.prefixes is not None
        drawn = [len(row.token_ids) - 1 for row in rows]
        self.room.make(len(rows), max(drawn) + 1)
        groups = Groups(range(self.n_prompts), self.size, [row.place for row in rows], device)
        at = torch.tensor(drawn, device=device)
        own = torch.arange(self.room.tokens, device=device) <= at[:, None]
        attend = functools.partial(self._attend, groups, at, bias_of(own[:, None, None], self.model.dtype))
        ids = torch.tensor([[row.token_ids[-1]] for row in rows], device=device)
        positions = torch.tensor([[row.length + n] for row, n in zip(rows, drawn, strict=True)], device=device)
        last = torch.arange(len(rows), device=device), torch.zeros_like(at)
        return forward(self.model, ids, positions, attend, last)

    def _attend(
        self,
        groups: Groups,
        at: torch.Tensor,
        own_bias: torch.Tensor | None,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        assert self.prefixes is not None
        keys, values = self.room.write(layer, key, value, at)
        return joint_attention(
            grouped_heads(query, key.shape[1], scale),
            (self.prefixes.keys[layer], self.prefixes.values[layer], self.bias),
            groups,
            (keys, values, own_bias),
        ).reshape(*query.shape[:-1], -1)


def take(
    rows: Sequence[Row], logits: torch.Tensor, sampling: Sampling, banned: Sequence[int], stopping: Stopping
) -> None:
    """Draws a token for each row, from its (row, vocabulary) logits; a row that was over already is left as it is."""
    chance = torch.tensor([row.chance for row in rows], dtype=torch.float64)
    drawn: list[tuple[int, float]] = []
    for first in range(0, len(rows), _DRAWN):  # what drawing needs beside the logits is a multiple of them
        part = slice(first, first + _DRAWN)
        tokens, log_probs = draw(logits[part].float(), chance[part], sampling, banned)
        drawn += zip(tokens.tolist(), log_probs.tolist(), strict=True)
    for row, (token, log_prob) in zip(rows, drawn, strict=True):
        if row.over:
            continue
        row.token_ids.append(token)
        row.log_probs.append(log_prob)
        row.ended = token in stopping.ids or (stopping.complete is not None and stopping.complete(row.token_ids))
        row.over = row.ended or len(row.token_ids) == len(row.uniform)


def _by_prompt(wanted: Sequence[Wanted], budget: int, room: int) -> list[_Group]:
    """Those with the same prompt together, as far as `budget` has room for them, the longest prompts first.

    None is much larger than the others are on average: each prompt gets as many places as the largest needs.
    """
    order = sorted(range(len(wanted)), key=lambda n: (-len(wanted[n].prompt), wanted[n].prompt))
    same = [list(each) for _, each in itertools.groupby(order, key=lambda n: wanted[n].prompt)]
    groups: list[_Group] = []
    for members in same:
        prompt = wanted[members[0]].prompt
        fit = max(budget - len(prompt), len(prompt)) // room  # as many at least as weigh what the prompt does
        at_once = max(1, min(fit, -(-2 * len(wanted) // len(same))))
        groups += [_Group(prompt, members[first : first + at_once]) for first in range(0, len(members), at_once)]
    return groups


def _entering(waiting: deque[_Group], batch: _Batch, budget: int, room: int) -> list[_Group]:
    """Takes from `waiting` what there is enough room for beside the rows that run; at least one where none does."""
    if not waiting:
        return []
    longest = max([len(waiting[0].prompt), *(row.length for row in batch.rows)])
    free = budget - len(batch.rows) * room - len(batch.prompts) * longest
    entering: list[_Group] = []
    if batch.rows and free < budget // _ENTER:
        return entering
    while waiting and ((needed := longest + len(waiting[0].members) * room) <= free or not (batch.rows or entering)):
        free -= needed
        entering.append(waiting.popleft())
    return entering
