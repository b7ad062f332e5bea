"""Questions that begin alike as trees of token ids.

Questions about one pair of responses share the conversation and both responses and differ in the principle. Sorted,
they form a tree: a node is a run of ids that all questions below share. A node that is too short to be worth a pass of
its own goes in front of each of its children. A tree larger than the budget becomes several that repeat their root.
Ids in, plans out; no tensors.
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

    @functools.cached_property
    def depth(self) -> int:
        """Nodes on the longest way down, this one included."""
        return 1 + max((child.depth for child in self.children), default=0)


def trees_of(questions: Sequence[list[int]], budget: int) -> list[Node]:
    """The questions as trees of at most `budget` tokens where that is possible, small ones first."""
    order = sorted((n for n in range(len(questions)) if questions[n]), key=lambda n: questions[n])
    shared = [_common(questions[a], questions[b]) for a, b in itertools.pairwise(order)]
    trees: list[Node] = []
    for tree in _trees(questions, order, shared, 0, len(order), 0):
        for part in _worth_reading(tree):
            trees += _within(part, budget)
    return sorted(trees, key=lambda tree: tree.size)


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


def _within(tree: Node, budget: int) -> list[Node]:
    """The tree in parts that fit into `budget`, each with its root again; one path alone may be longer."""
    if tree.size <= budget or not tree.children:
        return [tree]
    parts: list[Node] = []
    size = budget
    for child in tree.children:
        if len(tree.ids) + child.size > budget and child.children:
            parts += _within(replace(child, ids=[*tree.ids, *child.ids]), budget)
            size = budget
        elif size + child.size <= budget:
            parts[-1].children.append(child)
            size += child.size
        else:
            parts.append(Node(tree.ids, [], [child]))
            size = len(tree.ids) + child.size
    return [Node(tree.ids, tree.ends), *parts] if tree.ends else parts


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two questions begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare in C; a loop over ids does not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
