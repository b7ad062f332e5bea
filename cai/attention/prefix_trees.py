"""Questions that begin alike as trees of token ids.

Questions about one pair of responses share the conversation and both responses and differ in the principle. Sorted,
they form a tree: a node is a run of ids that all questions below share. A node that is too short to be worth a pass of
its own goes in front of each of its children. Ids in, plans out; no tensors.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

_WORTH = 1 / 16
"""A node is read by itself where that saves at least this share of the tokens in and below it."""


@dataclass(frozen=True)
class Node:
    """A run of ids that all questions below share. `ends` are those that end with its last id."""

    ids: Sequence[int]
    ends: list[int] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    @functools.cached_property
    def size(self) -> int:
        """Tokens in this node and below it."""
        return len(self.ids) + sum(child.size for child in self.children)


def trees_of(questions: Sequence[list[int]]) -> list[Node]:
    """The questions as trees."""
    order = sorted((n for n in range(len(questions)) if questions[n]), key=lambda n: questions[n])
    shared = [_common(questions[a], questions[b]) for a, b in itertools.pairwise(order)]
    return [node for tree in _trees(questions, order, shared, 0, len(order), 0) for node in _worth_reading(tree)]


def apart(node: Node) -> Iterator[Node]:
    """The questions in and below a node, each with all its ids from there on in a node of its own."""
    if node.ends:
        yield Node(node.ids, node.ends)
    for child in node.children:
        yield from apart(replace(child, ids=[*node.ids, *child.ids]))


def _trees(
    questions: Sequence[Sequence[int]], order: list[int], shared: list[int], first: int, last: int, depth: int
) -> Iterator[Node]:
    """The trees of the sorted questions first … last-1, which agree in their first `depth` ids."""
    start = first
    for index in range(first, last):
        if index + 1 < last and shared[index] > depth:
            continue
        members = range(start, index + 1)
        until = min((shared[n] for n in members[:-1]), default=len(questions[order[start]]))
        ends = [order[n] for n in members if len(questions[order[n]]) == until]
        node = Node(questions[order[start]][depth:until], ends)
        node.children.extend(_trees(questions, order, shared, start + len(ends), index + 1, until))
        yield node
        start = index + 1


def _worth_reading(node: Node) -> list[Node]:
    """The node, or where it is too short its children with its ids in front of theirs."""
    children = [each for child in node.children for each in _worth_reading(child)]
    kept = Node(node.ids, node.ends, children)
    saved = len(node.ids) * (len(children) - (not node.ends))
    if not children or saved >= _WORTH * kept.size:
        return [kept]
    ended = [Node(node.ids, node.ends)] if node.ends else []
    return ended + [replace(child, ids=[*node.ids, *child.ids]) for child in children]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two questions begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare in C; a loop over ids does not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
