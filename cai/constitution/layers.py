"""The order in which a document and those that it extends are applied, and what each of them changes.

Each document is applied once: after every document that it extends, and where `extends` is a list, in the order of the
list. So a principle that a document dropped or changed stays so, however often the document below it is named. This is
the linearisation C3 (Barrett et al. 1996, the method resolution order of Python), except that a list may name a
document that another one on it extends: that one is applied first, wherever it stands.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cai.constitution.changes import Change, ChangeKind
from cai.constitution.compiled import Principle


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """What a document says about one id."""

    id: str
    principle: Principle | None
    """None where the document drops or reweighs it."""
    location: str
    """`file:line:column` of the id."""
    weight: float | None = None
    """The weight that the document gives to the inherited principle, of which it changes nothing else."""

    def applied_to(self, inherited: Principle | None) -> Principle | None:
        """The principle after this entry; None where it is dropped."""
        if self.weight is None or inherited is None:
            return self.principle
        return replace(inherited, weight=self.weight)


@dataclass(frozen=True, slots=True)
class Layer:
    """One document of those that make up a constitution."""

    path: Path
    order: tuple[Path, ...]
    """The documents in the order in which they are applied, this one last."""
    entries: tuple[LayerEntry, ...]


class ContradictoryOrder(Exception):
    """Documents, by their names, that one list has in one order and another list in another."""


def merged_order(bases: Sequence[Layer]) -> list[Path]:
    """The documents that `bases`, in the order listed, consist of, each once, in the order in which they are applied.

    Raises ContradictoryOrder where no order fits every list.
    """
    listed = {base.path: base for base in bases}
    extended_by_others = {path for base in listed.values() for path in base.order[:-1]}
    outermost = [base for base in listed.values() if base.path not in extended_by_others]
    waiting = [list(base.order) for base in outermost] + [[base.path for base in outermost]]
    merged: list[Path] = []
    while waiting := [order for order in waiting if order]:
        later = {path for order in waiting for path in order[1:]}
        first = next((order[0] for order in waiting if order[0] not in later), None)
        if first is None:
            raise ContradictoryOrder(_conflicting_names(waiting))
        merged.append(first)
        waiting = [order[1:] if order[0] == first else order for order in waiting]
    return merged


def _conflicting_names(orders: Sequence[Sequence[Path]]) -> str:
    """The documents of which one order has some before others and another order the other way round."""
    pairs = dict.fromkeys(pair for order in orders for pair in itertools.combinations(order, 2))
    in_both_orders = [path for first, second in pairs if (second, first) in pairs for path in (first, second)]
    return " and ".join(dict.fromkeys(path.name for path in in_both_orders or [order[0] for order in orders]))


def apply_layers(layers: Iterable[Layer]) -> tuple[dict[str, Principle], tuple[Change, ...]]:
    """The principles by id after applying `layers`, in this order, and what they changed.

    An id that is replaced keeps its place. New principles of documents that extend nothing are no change.
    """
    principles: dict[str, Principle] = {}
    changes: list[Change] = []
    for layer in layers:
        for entry in layer.entries:
            before = principles.get(entry.id)
            after = entry.applied_to(before)
            if after is None:
                principles.pop(entry.id, None)
            else:
                principles[entry.id] = after
            if before is not None or entry.weight is not None or (after is not None and len(layer.order) > 1):
                changes.append(_change(entry, before, after))
    return principles, tuple(changes)


def _change(entry: LayerEntry, before: Principle | None, after: Principle | None) -> Change:
    if before is None:
        return Change("new" if after else "without effect", entry.id, entry.location)
    if after is None:
        return Change("dropped", entry.id, entry.location, before=before.location)
    fields = before.differing_fields(after)
    weights = (before.weight, after.weight) if "weight" in fields else None
    kind: ChangeKind = "repeated" if not fields else "reweighed" if fields == ("weight",) else "replaced"
    return Change(kind, entry.id, entry.location, fields, weights, before.location)
