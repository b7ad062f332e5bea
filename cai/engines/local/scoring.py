"""Log-probabilities of options as the next token, for many questions that begin alike.

The questions are read as trees (`cai.attention.prefix_trees`), every row behind what it shares with others
(`cai.attention.shared_prefixes`). All that follows a batch is read before the next one, so that keys and values are
held of one path of batches. Left out: options of several tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cai.attention.cpu_sizes import batches, in_one_pass
from cai.attention.prefix_trees import Node, apart, trees_of
from cai.attention.shared_prefixes import Prefixes, read

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Asked = tuple[list[int], list[int]]
"""(prompt ids, the id of each option)."""
Scores = list[float]
"""Natural log-probability of each option."""


def score(model: PreTrainedModel, asked: Sequence[Asked], budget: int) -> Iterator[tuple[int, Scores]]:
    """(index, the options' log-probabilities) of every question; about `budget` tokens are held at once."""
    trees = trees_of([prompt for prompt, _ in asked])
    return _answers(model, [(tree, 0) for tree in trees], asked, budget)


def _answers(
    model: PreTrainedModel,
    nodes: Sequence[tuple[Node, int]],
    asked: Sequence[Asked],
    room: int,
    behind: Prefixes | None = None,
) -> Iterator[tuple[int, Scores]]:
    """The answers to the questions that end in or below these nodes, each with the row of `behind` that it follows.

    `room` is for tokens held beside `behind`. Half of it goes to a batch that others follow, with all before it, which
    is kept once more for each of its rows; a node for which that would be too long is read with each of its questions.
    """
    before = 0 if behind is None else behind.mask.shape[1]
    if behind is not None:
        nodes = [
            (each, owner)
            for node, owner in nodes
            for each in ([node] if not node.children or before + len(node.ids) <= room else apart(node))
        ]
    for inner in (True, False):
        order = sorted((each for each in nodes if bool(each[0].children) is inner), key=lambda each: len(each[0].ids))
        kept_too = (before, room // 2) if inner else ()
        sizes = [len(node.ids) for node, _ in order]
        for first, last in batches(sizes, in_one_pass(room, model.device), *kept_too):
            rows = sorted(order[first:last], key=lambda each: each[1])
            logits, keep = read(model, [node.ids for node, _ in rows], behind, [owner for _, owner in rows])
            if ends := [(row, question) for row, (node, _) in enumerate(rows) for question in node.ends]:
                found = of_options(logits, [(row, asked[question][1]) for row, question in ends])
                yield from zip([question for _, question in ends], found, strict=True)
            prefixes = keep() if inner else None
            del logits, keep  # else they stay until all below is read, or the next batch
            if prefixes is not None:
                below = [(child, row) for row, (node, _) in enumerate(rows) for child in node.children]
                yield from _answers(model, below, asked, room - prefixes.mask.numel(), prefixes)
                del prefixes


def of_options(logits: torch.Tensor, wanted: Sequence[tuple[int, Sequence[int]]]) -> list[Scores]:
    """Log-probabilities of options, (row, ids) each, from (rows, vocabulary) logits; a part of the rows at a time."""
    scores: list[Scores] = []
    for first in range(0, len(wanted), 256):
        part = wanted[first : first + 256]
        some: Any = logits[[row for row, _ in part]].float().log_softmax(dim=-1).double().cpu()
        scores += [some[n, list(options)].tolist() for n, (_, options) in enumerate(part)]
    return scores
