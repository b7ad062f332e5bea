"""What layers change in a constitution, and what differs between two, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from cai.constitution.changes import Change
from cai.constitution.compiled import Constitution, Principle
from cai.constitution.differences import Differences
from cai.text.formatting import printable
from cai.text.tables import aligned_lines


def change_lines(constitution: Constitution) -> Iterator[str]:
    """The overlay report: every principle that a document adds, replaces, reweighs or drops, and where; a line each.

    Nothing where the document extends none.
    """
    if len(constitution.documents) == 1:
        return
    yield printable(f"made of {', '.join(map(str, constitution.documents))}, applied in this order")
    rows = [(f"  {change.kind}", change.id, change.location, _effect(change)) for change in constitution.changes]
    yield from aligned_lines(rows) if rows else ["  no principle is new, replaced or dropped"]


def difference_lines(first: Constitution, second: Constitution, differing: Differences) -> Iterator[str]:
    """The differences of two constitutions, principle by principle, field by field."""
    yield printable(f"- {first.path}: {first.name}")
    yield printable(f"+ {second.path}: {second.name}")
    added, removed, changed = differing
    for sign, word, principles in (("+", "added", added), ("-", "removed", removed)):
        for principle in principles:
            yield ""
            yield printable(f"{word}  {principle.id}  {principle.location}")
            yield printable(f"  {sign} {principle.text}")
    for before, after, fields in changed:
        yield ""
        yield printable(f"changed  {before.id}  {before.location}  {after.location}")
        for field in fields:
            yield f"  {field}"
            yield from (printable(f"  - {value}") for value in _values(before, field))
            yield from (printable(f"  + {value}") for value in _values(after, field))
    n_same = len(first.principles) - len(removed) - len(changed)
    yield ""
    yield f"{len(added)} added, {len(removed)} removed, {len(changed)} changed, {n_same} the same"


def _effect(change: Change) -> str:
    """What a change does: `text, critique, revise, compare; weight 2 to 1`, and where the principle stood before."""
    fields = ", ".join(field for field in change.fields if field != "weight")
    weights = "" if change.weights is None else f"weight {change.weights[0]:g} to {change.weights[1]:g}"
    before = f"was {change.before}" if change.before else ""
    return "; ".join(part for part in (fields, weights, before) if part)


def _values(principle: Principle, field: str) -> list[str]:
    """The value of a field as lines; an example is a line."""
    value = getattr(principle, field)
    if field == "examples":
        return [
            f"{' / '.join(text for _, text in example.messages)}  better: {example.better}  worse: {example.worse}"
            for example in value
        ]
    if isinstance(value, tuple):
        return [", ".join(value) or "none"]
    if value is None:
        return ["all prompts"]
    return [f"{value:g}" if isinstance(value, float) else str(value)]
