"""Log-probabilities of options as the next token, for many questions that begin alike.

The questions are read as trees (`cai.engines.tries`), every row behind what it shares with others
(`cai.engines.prefixes`). What stands behind a batch is read before the next batch, so that keys and values are those of
one path of batches. Left out: options of several tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cai.engines.batching import batches, in_one_pass
from cai.engines.prefixes import Prefixes, read
from cai.engines.tries import Node, trees_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Asked = tuple[list[int], list[int]]
"""(prompt ids, the id of each option)."""
Scores = list[float]
"""Natural log-probability of each option."""


def score(model: PreTrainedModel, asked: Sequence[Asked], budget: int) -> Iterator[tuple[int, Scores]]:
    """(index, the options' log-probabilities) of every question; what is held at once is about `budget` tokens."""
    trees = trees_of([prompt for prompt, _ in asked], budget)
    share = budget // max((tree.depth for tree in trees), default=1)  # of each batch on the way down to a question
    return _answers(model, trees, asked, in_one_pass(share, model.device))


def _answers(
    model: PreTrainedModel,
    nodes: Sequence[Node],
    asked: Sequence[Asked],
    at_once: int,
    behind: Prefixes | None = None,
    owners: Sequence[int] = (),
) -> Iterator[tuple[int, Scores]]:
    """The answers to the questions that end in these nodes, which are read behind their `owners`, or below them."""
    for inner in (True, False):
        before = behind.mask.shape[1] if inner and behind is not None else 0  # kept once more, with each row
        order = [n for n, node in enumerate(nodes) if bool(node.children) is inner]
        order.sort(key=lambda n: len(nodes[n].ids))
        for first, last in batches([before + len(nodes[n].ids) for n in order], at_once):
            part = order[first:last]
            if behind is not None:
                part.sort(key=lambda n: owners[n])
            rows = [nodes[n] for n in part]
            logits, keep = read(model, [node.ids for node in rows], behind, [owners[n] for n in part] if owners else ())
            if ends := [(row, question) for row, node in enumerate(rows) for question in node.ends]:
                found = of_options(logits, [(row, asked[question][1]) for row, question in ends])
                yield from zip([question for _, question in ends], found, strict=True)
            if inner:
                kept = keep()
                del logits, keep  # else they stay until all below is read
                below = [(child, row) for row, node in enumerate(rows) for child in node.children]
                yield from _answers(
                    model, [child for child, _ in below], asked, at_once, kept, [row for _, row in below]
                )


def of_options(logits: torch.Tensor, wanted: Sequence[tuple[int, Sequence[int]]]) -> list[Scores]:
    """Log-probabilities of options, (row, ids) each, from (rows, vocabulary) logits; a part of the rows at a time."""
    scores: list[Scores] = []
    for first in range(0, len(wanted), 256):
        part = wanted[first : first + 256]
        some: Any = logits[[row for row, _ in part]].float().log_softmax(dim=-1).double().cpu()
        scores += [some[n, list(options)].tolist() for n, (_, options) in enumerate(part)]
    return scores
