"""The decoding loop: prompts in; drawn ids and their log-probabilities out. Tensors, no texts.

Samples of one prompt share it: it is read once, and their rows hold what they drew alone (`cai.engines.prefixes`). The
rows that run fill a budget of tokens; those that ended make room, and waiting ones enter, the longest prompts first. A
row's randomness is a row of uniforms from its own seed, put through the inverse of the cumulative distribution: what
else is in the batch does not touch it.

Left out: beams, penalties, speculative decoding, reading a long prompt in parts.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from cai.engines import Sampling
from cai.engines.prefixes import Groups, Prefixes, bias_of, forward, grouped_heads, joint_attention, read
from cai.engines.sampling import draw, uniforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEAVE = 8
"""Rows leave when one in so many has ended: until then they are computed in vain, and leaving copies the others."""
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
    """A response that is being drawn, to a prompt of `length` tokens. `prompt` is its place among the prefixes."""

    number: int
    length: int
    prompt: int
    uniform: torch.Tensor
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ended: bool = False
    over: bool = False

    def drawn(self) -> Drawn:
        """What there is of it."""
        return Drawn(self.token_ids, self.log_probs, self.ended)


class Room:
    """The keys, (row, kv heads, width, `length`), and values of what rows drew themselves.

    There is room for a little more than they hold, and zeros where nothing is yet: a product with all of it is faster
    than one with a part.
    """

    def __init__(self) -> None:
        self.length = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def keep(self, rows: Sequence[int], new: int, used: int) -> None:
        """Leaves the room of `rows`, of which at most `used` tokens hold something, and makes some for `new` ones."""
        self.length = used + _MORE
        for layers, seq in ((self.keys, -1), (self.values, -2)):
            for n, old in enumerate(layers):
                at = torch.tensor(rows, dtype=torch.long, device=old.device)
                kept = old.narrow(seq, 0, used).index_select(0, at)
                shape = [len(rows) + new, *old.shape[1:]]
                shape[seq] = self.length
                layers[n] = old.new_zeros(shape)
                layers[n][: len(rows)].narrow(seq, 0, used).copy_(kept)

    def make(self, needed: int) -> None:
        """Makes room for `needed` tokens and some more, where there is less."""
        if needed <= self.length:
            return
        more = needed + max(_MORE, needed // 4) - self.length
        self.length += more
        self.keys = [torch.nn.functional.pad(each, (0, more)) for each in self.keys]
        self.values = [torch.nn.functional.pad(each, (0, 0, 0, more)) for each in self.values]

    def write(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, at: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes each row's `key` and `value`, (row, kv heads, 1, width), at its place; the layer's room."""
        if layer == len(self.keys):
            n, heads, _, width = key.shape
            self.keys.append(key.new_zeros((n, heads, width, self.length)))
            self.values.append(value.new_zeros((n, heads, self.length, value.shape[-1])))
        rows = torch.arange(len(at), device=at.device)
        self.keys[layer][rows, :, :, at] = key[:, :, 0]
        self.values[layer][rows, :, at] = value[:, :, 0]
        return self.keys[layer], self.values[layer]


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    wanted: Sequence[Wanted],
    sampling: Sampling,
    stopping: Stopping,
    *,
    budget: int,
    pad_id: int,
    banned: Sequence[int] = (),
) -> Iterator[tuple[int, Drawn]]:
    """(index, what was drawn) of each response as it ends. Rows and prompts that run have `budget` tokens of room."""
    waiting = deque(_by_prompt(wanted, budget, sampling.max_new_tokens))
    rows: list[Row] = []
    prefixes: Prefixes | None = None
    room = Room()
    while True:
        left = [n for n, row in enumerate(rows) if not row.over]
        rows = [rows[n] for n in left]
        prefixes = _still_shared(prefixes, rows)
        entering = _entering(waiting, rows, budget, sampling.max_new_tokens)
        if entering:
            logits, keep = read(model, [group.prompt for group in entering], pad_id)
            first = 0 if prefixes is None else len(prefixes.lengths)
            prefixes = keep() if prefixes is None else prefixes.followed_by(keep())
            new = [
                Row(n, len(group.prompt), first + place, uniforms([wanted[n].seed], sampling.max_new_tokens)[0])
                for place, group in enumerate(entering)
                for n in group.members
            ]
            chance = torch.stack([row.uniform[0] for row in new])
            take(new, draw(logits[[row.prompt - first for row in new]].float(), chance, sampling, banned), stopping)
            rows += new
        if prefixes is None:
            return
        room.keep(left, len(rows) - len(left), max((len(row.token_ids) - 1 for row in rows), default=0))
        step = _Step(model, rows, prefixes, room)
        while sum(row.over for row in rows) * _LEAVE < len(rows):
            take(rows, draw(step(), step.chance, sampling, banned), stopping)
        yield from ((row.number, row.drawn()) for row in rows if row.over)


class _Step:
    """One more token of the same rows: the model's forward pass behind their prompts and what they drew."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Row], prefixes: Prefixes, room: Room) -> None:
        self.model = model
        self.rows = rows
        self.room = room
        self.device = model.device
        self.groups = Groups([row.prompt for row in rows], self.device)
        self.shared = prefixes.select(self.groups.prefixes)
        self.bias = bias_of(self.shared.mask[:, None, None], model.dtype)
        self.before = prefixes.lengths[[row.prompt for row in rows]]
        self.last = torch.arange(len(rows), device=self.device), torch.zeros(len(rows), dtype=torch.long)
        self.uniforms = torch.stack([row.uniform for row in rows])

    def __call__(self) -> torch.Tensor:
        """Logits of the next token, (row, vocabulary), float32. Its randomness is `chance`, (row,), afterwards."""
        drawn = [len(row.token_ids) - 1 for row in self.rows]
        self.chance = self.uniforms[range(len(drawn)), [min(n + 1, len(self.uniforms[0]) - 1) for n in drawn]]
        self.at = torch.tensor(drawn, device=self.device)
        self.room.make(max(drawn) + 1)
        own = torch.arange(self.room.length, device=self.device) <= self.at[:, None]
        self.own_bias = bias_of(own[:, None, None], self.model.dtype)
        ids = torch.tensor([[row.token_ids[-1]] for row in self.rows], device=self.device)
        return forward(self.model, ids, (self.before + self.at)[:, None], self._attend, self.last).float()

    def _attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        keys, values = self.room.write(layer, key, value, self.at)
        return joint_attention(
            grouped_heads(query, key.shape[1], scale),
            (self.shared.keys[layer], self.shared.values[layer], self.bias),
            self.groups,
            (keys, values, self.own_bias),
        ).reshape(*query.shape[:-1], -1)


def take(rows: Sequence[Row], drawn: tuple[torch.Tensor, torch.Tensor], stopping: Stopping) -> None:
    """Adds each row's token and log-probability; a row that was over already is left as it is."""
    for row, token, log_prob in zip(rows, *(each.tolist() for each in drawn), strict=True):
        if row.over:
            continue
        row.token_ids.append(token)
        row.log_probs.append(log_prob)
        row.ended = token in stopping.ids or (stopping.complete is not None and stopping.complete(row.token_ids))
        row.over = row.ended or len(row.token_ids) == len(row.uniform)


def _by_prompt(wanted: Sequence[Wanted], budget: int, room: int) -> list[_Group]:
    """Those with the same prompt together, as far as `budget` has room for them, the longest prompts first."""
    ordered = sorted(range(len(wanted)), key=lambda n: (-len(wanted[n].prompt), wanted[n].prompt))
    groups: list[_Group] = []
    for prompt, same in itertools.groupby(ordered, key=lambda n: wanted[n].prompt):
        at_once = max(1, (budget - len(prompt)) // room)
        members = list(same)
        groups += [_Group(prompt, members[first : first + at_once]) for first in range(0, len(members), at_once)]
    return groups


def _entering(waiting: deque[_Group], rows: Sequence[Row], budget: int, room: int) -> list[_Group]:
    """Takes from `waiting` what there is room for beside `rows`; at least one where nothing runs."""
    if not waiting:
        return []
    longest = max([len(waiting[0].prompt), *(row.length for row in rows)])
    free = budget - len(rows) * room - len({row.prompt for row in rows}) * longest
    entering: list[_Group] = []
    while waiting and ((needed := longest + len(waiting[0].members) * room) <= free or not (rows or entering)):
        free -= needed
        entering.append(waiting.popleft())
    return entering


def _still_shared(prefixes: Prefixes | None, rows: Sequence[Row]) -> Prefixes | None:
    """The prompts that still have rows, which learn their new places."""
    if prefixes is None or not rows:
        return None
    old = sorted({row.prompt for row in rows})
    places = {prompt: n for n, prompt in enumerate(old)}
    for row in rows:
        row.prompt = places[row.prompt]
    return prefixes.select(old)
