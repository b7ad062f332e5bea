"""What a document changes in the principles of those that it extends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ChangeKind = Literal["new", "replaced", "reweighed", "repeated", "dropped", "without effect"]
"""reweighed: of all fields the weight alone differs; repeated: none does; without effect: gives a weight to a principle
that a document between has dropped."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a document does to the principles of those before it."""

    kind: ChangeKind
    id: str
    location: str
    """`file:line:column` of the id in the document that makes the change."""
    fields: tuple[str, ...] = ()
    """The fields that differ from the principle that is replaced, the weight included; of the principle fields those
    that one of the two authors wrote."""
    weights: tuple[float, float] | None = None
    """From and to, where they differ."""
    before: str = ""
    """`file:line:column` of the principle that is replaced or dropped."""

    def plain(self) -> dict[str, object]:
        """Plain data for JSON."""
        facts: dict[str, object] = {"change": self.kind, "id": self.id, "location": self.location}
        if self.before:
            facts["before"] = self.before
        if self.fields:
            facts["fields"] = list(self.fields)
        if self.weights is not None:
            facts["weight"] = {"from": self.weights[0], "to": self.weights[1]}
        return facts
