"""The decoding loop: prompts in; drawn ids and their log-probabilities out. Tensors, no texts.

Samples of one prompt share it: it is read once, and their rows hold what they drew alone
(`cai.attention.shared_prefixes`). The rows that run fill a budget of tokens; those that ended make room, and waiting
ones enter, the longest prompts first. A row's randomness is a row of uniforms from its own seed, put through the
inverse of the cumulative distribution: what else is in the batch does not touch it. On a CPU prompts stand on shelves
by their length, so that a long one does not pad all others.

Left out: beams, penalties, speculative decoding, reading a long prompt in parts.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch.nn.functional import pad

from cai.attention.cpu_sizes import batches, in_one_pass
from cai.attention.shared_prefixes import (
    Groups,
    Prefixes,
    Shared,
    bias_of,
    forward,
    grouped_heads,
    joined,
    joint_attention,
    read,
)
from cai.contracts.engine import Sampling
from cai.engines.local.token_sampling import draw, uniforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEAVE = 32
"""Rows leave when one in so many has ended: until then they are computed in vain, and leaving costs a little."""
_ENTER = 8
"""New rows enter when one in so many tokens of the budget is free: few prompts at once are read slowly."""
_DRAWN = 256
"""Rows whose tokens are drawn at once."""
_SHORT = 32
"""Tokens up to which prompts are of about the same length, a power of two; longer ones are up to twice as much."""
_MORE = 32
"""There is room for a multiple of so many tokens of a row: a CPU's products of other sizes take up to twice as long."""


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
    """A response that is being drawn, to a prompt of `length` tokens that stands on a shelf.

    `place` is its place among the prompts there.
    """

    number: int
    length: int
    uniform: list[list[float]]
    shelf: int = 0
    place: int = 0
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

    There is room for a few more tokens than are needed, up to `most` a row, and zeros where nothing is yet: a product
    with all tokens is faster than one with a part.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.rows = self.tokens = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def make(self, rows: int, tokens: int) -> None:
        """Makes room for so many, where there is less."""
        more_rows = max(0, rows - self.rows)
        more_tokens = max(0, min(_MORE * math.ceil(tokens / _MORE), self.most) - self.tokens)
        if not more_rows and not more_tokens:
            return
        self.rows += more_rows
        self.tokens += more_tokens
        self.keys = [pad(each, (0, more_tokens, 0, 0, 0, 0, 0, more_rows)) for each in self.keys]
        self.values = [pad(each, (0, 0, 0, more_tokens, 0, 0, 0, more_rows)) for each in self.values]

    def cut(self, rows: int) -> None:
        """Gives back the room of rows that are beyond so many."""
        if rows < self.rows:
            self.rows = rows
            self.keys, self.values = ([each[:rows].clone() for each in some] for some in (self.keys, self.values))

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
    size = max((len(group.members) for group in waiting), default=0)
    batch = _Batch(model, size, sampling.max_new_tokens)
    while waiting or batch.rows:
        if entering := _entering(waiting, batch, budget, sampling.max_new_tokens):
            seeds = {n: wanted[n].seed for group in entering for n in group.members}
            chances = uniforms(list(seeds.values()), sampling.max_new_tokens).tolist()
            new, logits = batch.enter(entering, dict(zip(seeds, chances, strict=True)))
            take(new, logits, sampling, banned, stopping)
        while sum(row.over for row in batch.rows) * _LEAVE < len(batch.rows):
            take(batch.rows, batch.step(), sampling, banned, stopping)
        yield from ((row.number, row.drawn()) for row in batch.leave())


@dataclass
class _Shelf:
    """Prompts of about the same length: longer ones elsewhere do not pad them. `bias` hides what padding they have."""

    prefixes: Prefixes
    bias: torch.Tensor | None

    @classmethod
    def of(cls, prefixes: Prefixes) -> Self:
        """A shelf with these prompts."""
        return cls(prefixes, bias_of(prefixes.mask[:, None, None], prefixes.keys[0].dtype))


def _shelf_of(length: int, device: torch.device) -> int:
    """The shelf of a prompt, named by the most tokens that prompts on it have.

    On a CPU padding costs most, elsewhere more steps do: all stand on one there.
    """
    return max(_SHORT, 1 << (length - 1).bit_length()) if device.type == "cpu" else sys.maxsize


class _Batch:
    """The rows that run: a forward pass of one more token of each, behind its prompt and what it drew.

    Rows lie without gaps: the last ones take the places of those that leave. A prompt has `size` places for its rows,
    counted from the first prompt of its shelf; a row draws `most` tokens at most.
    """

    def __init__(self, model: PreTrainedModel, size: int, most: int) -> None:
        self.model = model
        self.size = size
        self.rows: list[Row] = []
        self.shelves: dict[int, _Shelf] = {}
        self.room = Room(most)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt that still has rows."""
        return list({(row.shelf, row.place // self.size): row.length for row in self.rows}.values())

    def enter(
        self, groups: Sequence[_Group], uniform: Mapping[int, list[list[float]]]
    ) -> tuple[list[Row], torch.Tensor]:
        """Reads new prompts, after forgetting those without rows. New rows, and the logits of their first tokens."""
        for shelf in list(self.shelves):
            self._keep(shelf, self._prompts(shelf))
        self.room.cut(len(self.rows) + len(uniform))
        new: list[Row] = []
        logits: list[torch.Tensor] = []
        ordered = sorted(groups, key=lambda group: len(group.prompt))
        for shelf, some in itertools.groupby(ordered, lambda group: _shelf_of(len(group.prompt), self.model.device)):
            beginning = list(some)
            before, last = self._read(shelf, [group.prompt for group in beginning])
            logits.append(last[[n for n, group in enumerate(beginning) for _ in group.members]])
            new += [
                Row(number, len(group.prompt), uniform[number], shelf, place)
                for n, group in enumerate(beginning)
                for place, number in enumerate(group.members, (before + n) * self.size)
            ]
        self.rows += new
        return new, joined(logits)

    def _read(self, shelf: int, prompts: Sequence[Sequence[int]]) -> tuple[int, torch.Tensor]:
        """Puts prompts, the shortest first, behind those on a shelf: how many there were, and the logits after each."""
        there = [self.shelves[shelf].prefixes] if shelf in self.shelves else []
        before = sum(len(each.lengths) for each in there)
        sizes = [len(prompt) for prompt in prompts]
        logits: list[torch.Tensor] = []
        for first, last in batches(sizes, in_one_pass(len(sizes) * sizes[-1], self.model.device)):
            some, keep = read(self.model, prompts[first:last])
            logits.append(some)
            there.append(keep())
        self.shelves[shelf] = _Shelf.of(there[0].followed_by(*there[1:]))
        return before, joined(logits)

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
        for shelf, there in list(self.shelves.items()):
            if 2 * len(prompts := self._prompts(shelf)) < len(there.prefixes.lengths):
                self._keep(shelf, prompts)
        return over

    def _prompts(self, shelf: int) -> list[int]:
        """The prompts on a shelf that still have rows."""
        return sorted({row.place // self.size for row in self.rows if row.shelf == shelf})

    def _keep(self, shelf: int, prompts: Sequence[int]) -> None:
        """Forgets the other prompts of the shelf."""
        places = {prompt: n for n, prompt in enumerate(prompts)}
        for row in self.rows:
            if row.shelf == shelf:
                prompt, member = divmod(row.place, self.size)
                row.place = places[prompt] * self.size + member
        there = self.shelves.pop(shelf)
        if prompts:
            self.shelves[shelf] = _Shelf.of(there.prefixes.select(prompts))

    def step(self) -> torch.Tensor:
        """Logits of the next token of each row, (row, vocabulary)."""
        device, rows = self.model.device, self.rows
        drawn = [len(row.token_ids) - 1 for row in rows]
        self.room.make(len(rows), max(drawn) + 1)
        at = torch.tensor(drawn, device=device)
        own = torch.arange(self.room.tokens, device=device) <= at[:, None]
        attend = functools.partial(self._attend, self._groups(), at, bias_of(own[:, None, None], self.model.dtype))
        ids = torch.tensor([[row.token_ids[-1]] for row in rows], device=device)
        positions = torch.tensor([[row.length + n] for row, n in zip(rows, drawn, strict=True)], device=device)
        last = torch.arange(len(rows), device=device), torch.zeros_like(at)
        return forward(self.model, ids, positions, attend, last)

    def _groups(self) -> list[tuple[_Shelf, Groups]]:
        """Which rows share which prompts, a shelf at a time."""
        found = []
        for key, shelf in self.shelves.items():
            rows = [n for n, row in enumerate(self.rows) if row.shelf == key]
            places = [self.rows[n].place for n in rows]
            if rows:
                some = None if len(rows) == len(self.rows) else rows
                prompts = range(len(shelf.prefixes.lengths))
                found.append((shelf, Groups(prompts, self.size, places, self.model.device, some)))
        return found

    def _attend(
        self,
        groups: Sequence[tuple[_Shelf, Groups]],
        at: torch.Tensor,
        own_bias: torch.Tensor | None,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        keys, values = self.room.write(layer, key, value, at)
        shared = [
            Shared(shelf.prefixes.keys[layer], shelf.prefixes.values[layer], shelf.bias, each) for shelf, each in groups
        ]
        out = joint_attention(grouped_heads(query, key.shape[1], scale), shared, (keys, values, own_bias))
        return out.reshape(*query.shape[:-1], -1)


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
    device, lengths = batch.model.device, batch.lengths
    longest = max([len(waiting[0].prompt), *lengths])
    free = budget - len(batch.rows) * room - sum(min(longest, _shelf_of(length, device)) for length in lengths)
    entering: list[_Group] = []
    if batch.rows and free < budget // _ENTER:
        return entering
    while waiting:
        needed = min(longest, _shelf_of(len(waiting[0].prompt), device)) + len(waiting[0].members) * room
        if needed > free and (batch.rows or entering):
            break
        free -= needed
        entering.append(waiting.popleft())
    return entering
