"""What differs between two constitutions: principles added, removed and changed, field by field."""

from __future__ import annotations

from typing import NamedTuple

from cai.constitution.compiled import Constitution, Principle


class Changed(NamedTuple):
    """A principle that both have, with different values in `fields` (`Principle.differing_fields`)."""

    before: Principle
    after: Principle
    fields: tuple[str, ...]


class Differences(NamedTuple):
    """What the second of two constitutions has, lacks, or says in other words. Their names and orders do not count."""

    added: tuple[Principle, ...]
    removed: tuple[Principle, ...]
    changed: tuple[Changed, ...]

    def plain(self) -> dict[str, object]:
        """Plain data for JSON: of each changed field the values of both."""
        changed = []
        for before, after, fields in self.changed:
            values = before.plain(), after.plain()
            changed.append(
                {
                    "id": before.id,
                    "locations": [before.location, after.location],
                    "fields": {field: [side[field] for side in values] for field in fields},
                }
            )
        return {
            "added": [principle.plain() | {"location": principle.location} for principle in self.added],
            "removed": [principle.plain() | {"location": principle.location} for principle in self.removed],
            "changed": changed,
        }


def differences(first: Constitution, second: Constitution) -> Differences:
    """The differences of the second constitution from the first, principles matched by id."""
    before = {principle.id: principle for principle in first.principles}
    after = {principle.id: principle for principle in second.principles}
    common = ((principle, after[id_]) for id_, principle in before.items() if id_ in after)
    changed = (Changed(old, new, old.differing_fields(new)) for old, new in common)
    return Differences(
        tuple(principle for id_, principle in after.items() if id_ not in before),
        tuple(principle for id_, principle in before.items() if id_ not in after),
        tuple(change for change in changed if change.fields),
    )
