"""Log-probabilities of options as the next token, for many questions that begin alike.

The questions are read as trees, level by level (`cai.engines.tries`), every row behind what it shares with others
(`cai.engines.prefixes`). Left out: options of several tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cai.engines.batching import batches, in_one_pass
from cai.engines.prefixes import Prefixes, read
from cai.engines.tries import Level, levels_of, trees_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Asked = tuple[list[int], list[int]]
"""(prompt ids, the id of each option)."""
Scores = list[float]
"""Natural log-probability of each option."""


def score(model: PreTrainedModel, asked: Sequence[Asked], budget: int) -> Iterator[tuple[int, Scores]]:
    """(index, the options' log-probabilities) of every question; what is held at once is about `budget` tokens."""
    at_once = in_one_pass(budget, model.device)
    trees = trees_of([prompt for prompt, _ in asked], budget)
    first, held = 0, 0
    for number, tree in enumerate(trees):
        if number > first and held + tree.size > budget:
            yield from _score(model, list(levels_of(trees[first:number])), asked, at_once)
            first, held = number, 0
        held += tree.size
    yield from _score(model, list(levels_of(trees[first:])), asked, at_once)


def _score(
    model: PreTrainedModel, levels: Sequence[Level], asked: Sequence[Asked], at_once: int
) -> Iterator[tuple[int, Scores]]:
    """The answers to the questions that end in these trees."""
    behind: Prefixes | None = None
    places: dict[int, int] = {}  # a node's place in the level above -> its place in `behind`
    for level in levels:
        kept: list[Prefixes] = []
        kept_places: dict[int, int] = {}
        for inner in (True, False):
            order = [n for n, node in enumerate(level.nodes) if bool(node.children) is inner]
            order.sort(key=lambda n: len(level.nodes[n].ids))
            for first, last in batches([len(level.nodes[n].ids) for n in order], at_once):
                part = order[first:last]
                if behind is not None:
                    part.sort(key=lambda n: level.owners[n])
                rows = [level.nodes[n].ids for n in part]
                owners = [places[level.owners[n]] for n in part] if behind is not None else []
                logits, keep = read(model, rows, behind, owners)
                ends = [(row, question) for row, n in enumerate(part) for question in level.nodes[n].ends]
                if ends:
                    found = of_options(logits, [(row, asked[question][1]) for row, question in ends])
                    yield from zip([question for _, question in ends], found, strict=True)
                if inner:
                    kept_places |= {n: len(kept_places) + i for i, n in enumerate(part)}
                    kept.append(keep())
        behind, places = kept[0].followed_by(*kept[1:]) if kept else None, kept_places


def of_options(logits: torch.Tensor, wanted: Sequence[tuple[int, Sequence[int]]]) -> list[Scores]:
    """Log-probabilities of options, (row, ids) each, from (rows, vocabulary) logits; a part of the rows at a time."""
    scores: list[Scores] = []
    for first in range(0, len(wanted), 256):
        part = wanted[first : first + 256]
        some: Any = logits[[row for row, _ in part]].float().log_softmax(dim=-1).double().cpu()
        scores += [some[n, list(options)].tolist() for n, (_, options) in enumerate(part)]
    return scores
