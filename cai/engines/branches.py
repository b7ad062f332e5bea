"""Questions that begin alike, computed once: a tree of token ids as one row with a branch mask.

Questions about one pair of responses share the conversation and both responses and differ in the principle. Sorted,
they form a tree. A subtree is laid out depth first as one row: each token stands at its depth and attends to its own
path alone, so that a question's last token sees exactly what it would see by itself. Where attention over a longer row
would cost more than repeating what is shared, the subtree is split; `row_cost` is the model of that.

Left out: reuse of keys and values between calls, models without a mask over positions (sliding windows, states).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


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


@dataclass
class Row:
    """A tree laid out. Token i is an ancestor of token j, or j itself, where i <= j < `until[i]`."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    until: list[int] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)
    """(question, index of its last token in the row)."""

    @property
    def branches(self) -> bool:
        """Whether the row is more than one path."""
        return any(end < len(self.ids) for end in self.until)


def rows_of(questions: Sequence[list[int]], width: int, budget: int) -> list[Row]:
    """The questions as rows of at most `budget` tokens where that is possible, cheapest by `row_cost`.

    `width` is the model's hidden size.
    """
    order = sorted((n for n in range(len(questions)) if questions[n]), key=lambda n: questions[n])
    shared = [_common(questions[a], questions[b]) for a, b in itertools.pairwise(order)]
    rows: list[Row] = []
    for tree in _trees(questions, order, shared, 0, len(order), 0):
        _, found = _split([], tree, width, budget)
        rows += found
    return rows


def row_cost(length: int, width: int) -> float:
    """Cost of one row in units of a token's matrix products: attention over a row grows with its square.

    A layer has about 12 width² weights and attends with 4 width products a pair of tokens: equal at 6 width tokens. The
    attention kernels reach about half the speed of matrix products, hence 3.
    """
    return length * (1 + length / (3 * width))


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


def _split(path: list[int], node: Node, width: int, budget: int) -> tuple[float, list[Row]]:
    """(cost, rows) of a subtree behind `path`: whole, or in parts that each repeat what they share."""
    whole = len(path) + node.size
    cost = row_cost(whole, width)
    if not node.children:
        return cost, [_laid_out(path, [node])]
    below = [*path, *node.ids]
    best: tuple[float, list[list[Node]]] | None = None
    for limit in _limits(len(below), whole, budget):
        parts = _parts(node.children, len(below), limit)
        total = sum(row_cost(len(below) + sum(child.size for child in part), width) for part in parts)
        if best is None or total < best[0]:
            best = total, parts
    assert best is not None
    total, rows = 0.0, []
    for number, part in enumerate(best[1]):
        ends = node.ends if number == 0 else []
        if len(part) == 1 and part[0].children:
            part_cost, found = _split(below, part[0], width, budget)
            if ends:
                found[0].ends += [(question, len(below) - 1) for question in ends]
        else:
            row = _laid_out(path, [Node(node.ids, ends, part)])
            part_cost, found = row_cost(len(row.ids), width), [row]
        total += part_cost
        rows += found
    return (cost, [_laid_out(path, [node])]) if whole <= budget and cost <= total else (total, rows)


def _limits(shared: int, whole: int, budget: int) -> list[int]:
    """Row lengths to try: from one child a row to all in one."""
    limits = [shared + 1]
    while limits[-1] < min(whole, budget):
        limits.append(min(2 * limits[-1] - shared + 16, whole, budget))
    return limits


def _parts(children: Sequence[Node], shared: int, limit: int) -> list[list[Node]]:
    """The children in runs that fit into `limit` together with what they share; one alone where it does not."""
    parts: list[list[Node]] = []
    length = limit
    for child in children:
        if parts and length + child.size <= limit:
            parts[-1].append(child)
            length += child.size
        else:
            parts.append([child])
            length = shared + child.size
    return parts


def _laid_out(path: Sequence[int], nodes: Sequence[Node]) -> Row:
    row = Row(list(path), list(range(len(path))), [0] * len(path))
    for node in nodes:
        _lay_out(node, row, len(path))
    row.until[: len(path)] = [len(row.ids)] * len(path)
    return row


def _lay_out(node: Node, row: Row, depth: int) -> None:
    start = len(row.ids)
    row.ids += node.ids
    row.positions += range(depth, depth + len(node.ids))
    row.until += [0] * len(node.ids)
    row.ends += [(question, len(row.ids) - 1) for question in node.ends]
    for child in node.children:
        _lay_out(child, row, depth + len(node.ids))
    row.until[start : start + len(node.ids)] = [len(row.ids)] * len(node.ids)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two questions begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare in C; a loop over ids does not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
