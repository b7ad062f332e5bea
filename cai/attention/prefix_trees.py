"""Prefix trees of questions, as token ids.

Questions about one pair of responses share the conversation and both responses and differ in the principle. Sorted,
they form a tree: a node is a run of ids that all questions below it share. A node that is too short to be worth a
forward pass of its own is merged into each of its children. Ids in, trees out; no tensors.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

_MIN_SAVED_SHARE = 1 / 16
"""A node has a forward pass of its own where that saves at least this share of the tokens in and below it."""


@dataclass(frozen=True)
class Node:
    """A run of ids that all questions below share. `complete` are the indices of the questions that end with it."""

    token_ids: Sequence[int]
    complete: list[int] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    @functools.cached_property
    def n_tokens(self) -> int:
        """Tokens in this node and below it."""
        return len(self.token_ids) + sum(child.n_tokens for child in self.children)


def build_trees(questions: Sequence[list[int]]) -> list[Node]:
    """The questions, as token ids, as prefix trees. Questions without tokens are left out."""
    order = sorted((index for index in range(len(questions)) if questions[index]), key=lambda index: questions[index])
    # How many ids each of the sorted questions shares with the next.
    overlaps = [_common_prefix_length(questions[a], questions[b]) for a, b in itertools.pairwise(order)]
    trees = _build_subtrees(questions, order, overlaps, 0, len(order), 0)
    return [node for tree in trees for node in _merge_short_nodes(tree)]


def split_into_questions(node: Node) -> Iterator[Node]:
    """A node without children for each run of ids from `node` to the end of a question in or below it."""
    if node.complete:
        yield Node(node.token_ids, node.complete)
    for child in node.children:
        yield from split_into_questions(_prepend(node, child))


def _build_subtrees(
    questions: Sequence[Sequence[int]], order: list[int], overlaps: list[int], first: int, last: int, depth: int
) -> Iterator[Node]:
    """The trees of the sorted questions `first` to `last` - 1, which agree in their first `depth` ids."""
    start = first
    for index in range(first, last):
        if index + 1 < last and overlaps[index] > depth:
            continue
        members = range(start, index + 1)
        end = min((overlaps[n] for n in members[:-1]), default=len(questions[order[start]]))
        complete = [order[n] for n in members if len(questions[order[n]]) == end]
        node = Node(questions[order[start]][depth:end], complete)
        node.children.extend(_build_subtrees(questions, order, overlaps, start + len(complete), index + 1, end))
        yield node
        start = index + 1


def _merge_short_nodes(node: Node) -> list[Node]:
    """The node, or where it is too short its children with its ids in front of theirs."""
    children = [part for child in node.children for part in _merge_short_nodes(child)]
    merged = Node(node.token_ids, node.complete, children)
    n_saved = len(node.token_ids) * (len(children) - (not node.complete))
    if not children or n_saved >= _MIN_SAVED_SHARE * merged.n_tokens:
        return [merged]
    complete = [Node(node.token_ids, node.complete)] if node.complete else []
    return complete + [_prepend(node, child) for child in children]


def _prepend(parent: Node, child: Node) -> Node:
    return replace(child, token_ids=[*parent.token_ids, *child.token_ids])


def _common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:  # binary search: slices are compared in C, a loop over ids is not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
