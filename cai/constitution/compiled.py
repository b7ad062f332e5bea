"""A compiled constitution: its principles with their fields for models, merged with those of extended documents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from cai.constitution.changes import Change
from cai.constitution.selection import selected_ids
from cai.storage.rows import Message
from cai.text.errors import BadInput, did_you_mean
from cai.text.formatting import printable


@dataclass(frozen=True, slots=True)
class Example:
    """An edge case of a principle: two responses to one conversation, of which the principle prefers the first."""

    messages: tuple[tuple[str, str], ...]
    """(role, content) of each message; the last message is the user's."""
    better: str
    worse: str

    @property
    def prompt(self) -> str:
        """The user's last message."""
        return self.messages[-1][1]

    @property
    def conversation(self) -> list[Message]:
        """The messages in the form that templates and engines take."""
        return [{"role": role, "content": content} for role, content in self.messages]  # type: ignore[typeddict-item]


@dataclass(frozen=True, slots=True)
class Principle:
    """One principle with its text for people and its principle fields for models."""

    id: str
    text: str
    critique: str
    revise: str
    compare: str
    weight: float = 1.0
    tags: tuple[str, ...] = ()
    applies_to: tuple[str, ...] | None = None
    examples: tuple[Example, ...] = ()
    trait: bool = False
    """Whether the author wrote it as a trait of character."""
    location: str = field(default="", compare=False)
    """`file:line:column` of its id."""
    derived: tuple[str, ...] = field(default=(), compare=False)
    """The principle fields that its author did not write, which are derived from its text."""

    def weighted(self, by_tag: Mapping[str, float]) -> float:
        """Its weight times the factors that `by_tag` has for its tags."""
        return self.weight * math.prod(by_tag.get(tag, 1.0) for tag in self.tags)

    def applies(self, tags: Sequence[str]) -> bool:
        """Whether the principle applies to a prompt with these tags."""
        return self.applies_to is None or not set(self.applies_to).isdisjoint(tags)

    def differing_fields(self, other: Principle) -> tuple[str, ...]:
        """The fields whose values differ from those of `other`, without those that both derive from their texts."""
        derived_by_both = set(self.derived).intersection(other.derived) if self.trait == other.trait else ()
        names = (field.name for field in fields(self) if field.compare and field.name not in derived_by_both)
        return tuple(name for name in names if getattr(self, name) != getattr(other, name))

    def plain(self) -> dict[str, object]:
        """Plain data for JSON, with the keys of a document."""
        examples = [
            {"prompt": example.conversation, "better": example.better, "worse": example.worse}
            for example in self.examples
        ]
        facts: dict[str, object] = asdict(self) | {"examples": examples}
        del facts["location"], facts["derived"]
        return facts


def applicable_principles(principles: Iterable[Principle], tags: Sequence[str]) -> list[Principle]:
    """The principles that apply to a prompt with these tags."""
    return [principle for principle in principles if principle.applies(tags)]


@dataclass(frozen=True, slots=True)
class Constitution:
    """A document, merged with the documents that it extends."""

    name: str
    description: str
    principles: tuple[Principle, ...]
    path: Path
    documents: tuple[Path, ...] = ()
    """Every file that was read, in the order in which they are applied; the one that the user named is the last."""
    changes: tuple[Change, ...] = field(default=(), compare=False)
    """What the documents change in those that they extend."""

    def principle(self, id: str) -> Principle:
        """The principle of that id. Raises BadInput for an unknown id."""
        principles_by_id = {principle.id: principle for principle in self.principles}
        if id not in principles_by_id:
            dropped = [change.location for change in self.changes if change.id == id and change.kind == "dropped"]
            hint = f", it is dropped at {dropped[-1]}" if dropped else did_you_mean(id, principles_by_id)
            raise BadInput(printable(f"{self.path}: no principle {id!r}{hint}"))
        return principles_by_id[id]

    def select(self, names: Sequence[str] | Literal["all"]) -> tuple[Principle, ...]:
        """All principles, or those that one of `names`, ids and tags, means, in the document's order.

        Raises BadInput for a name that is neither. A name that is both is the id (`cai.constitution.selection`).
        """
        if names == "all":
            return self.principles
        dropped = {change.id: change.location for change in self.changes if change.kind == "dropped"}
        ids = selected_ids(names, {principle.id: principle.tags for principle in self.principles}, self.name, dropped)
        return tuple(principle for principle in self.principles if principle.id in ids)

    def plain(self) -> dict[str, object]:
        """Plain data for JSON, with the keys of a document that extends nothing."""
        principles = [principle.plain() for principle in self.principles]
        return {"name": self.name, "description": self.description, "principles": principles}
