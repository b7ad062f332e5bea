"""Loads a constitution: reads the document and what it extends, merges them, and derives what the author left out.

The document that the user names sets the boundary: everything it extends, directly or not, lies in its folder or below,
symbolic links followed. A principle of the same id replaces the inherited one in its place; `drop: true` removes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cai.constitution.schema import ConstitutionDocument, Entry, ExampleEntry, PrincipleEntry, TraitEntry
from cai.document import Document, fail, load_document, validate
from cai.document.shipped import shipped, shipped_names
from cai.storage.rows import Message
from cai.text.errors import BadInput, nearest
from cai.text.formatting import Key, printable, shorten

MAX_DOCUMENTS = 50

PRINCIPLE_REQUESTS = {
    "critique": "Say specifically and briefly where the response falls short of this principle, or that it does not: "
    "{text}",
    "revise": "Rewrite the response so that it lives up to this principle, and keep what was already good about it: "
    "{text}",
    "compare": "Which response lives up better to this principle? {text}",
}
"""What a model is asked about a principle whose author wrote no request of that kind."""

TRAIT_REQUESTS = {
    "critique": 'This is how the assistant describes its own character: "{text}" Say specifically and briefly where '
    "the response does not sound like it, or that it does.",
    "revise": 'Rewrite the response as an assistant would that can truthfully say of itself: "{text}" Let the trait '
    "show only where it fits the conversation; do not announce it.",
    "compare": 'Which response is more like what an assistant would write that can truthfully say of itself: "{text}"',
}


@dataclass(frozen=True, slots=True)
class Example:
    """An edge case of a principle: two responses to one conversation, the first of them better by the principle."""

    messages: tuple[tuple[str, str], ...]
    """(role, content), the last of them the user's."""
    better: str
    worse: str

    @property
    def prompt(self) -> str:
        """What the user says last."""
        return self.messages[-1][1]

    @property
    def conversation(self) -> list[Message]:
        """The conversation as templates and engines take it."""
        return [{"role": role, "content": content} for role, content in self.messages]  # type: ignore[typeddict-item]


@dataclass(frozen=True, slots=True)
class Principle:
    """One principle, complete: what a person reads and what a model is asked."""

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
    """Whether it was written as a trait of character."""
    where: str = field(default="", compare=False)
    """`file:line:column` of its id."""

    def weighted(self, by_tag: Mapping[str, float]) -> float:
        """Its weight, times the factor of each of its tags that has one."""
        return self.weight * math.prod(by_tag.get(tag, 1.0) for tag in self.tags)

    def applies(self, tags: Sequence[str]) -> bool:
        """Whether the principle is for a prompt with these tags."""
        return self.applies_to is None or not set(self.applies_to).isdisjoint(tags)


@dataclass(frozen=True, slots=True)
class Constitution:
    """A document with everything that it extends, compiled."""

    name: str
    description: str
    principles: tuple[Principle, ...]
    path: Path
    documents: tuple[Path, ...] = ()
    """Every file that was read, the named one last."""

    def principle(self, id: str) -> Principle:
        """The principle of that id. Raises BadInput for an id that is not one."""
        ids = [each.id for each in self.principles]
        if id not in ids:
            raise BadInput(printable(f"{self.path}: no principle {id!r}{nearest(id, ids)}"))
        return self.principles[ids.index(id)]

    def plain(self) -> dict[str, object]:
        """As plain data for JSON, in the words of a document that extends nothing."""
        return {
            "name": self.name,
            "description": self.description,
            "principles": [
                {
                    "id": each.id, "text": each.text, "critique": each.critique, "revise": each.revise,
                    "compare": each.compare, "weight": each.weight, "tags": list(each.tags),
                    "applies_to": None if each.applies_to is None else list(each.applies_to),
                    "examples": [
                        {"prompt": one.conversation, "better": one.better, "worse": one.worse} for one in each.examples
                    ],
                    "trait": each.trait,
                }
                for each in self.principles
            ],
        }  # fmt: skip


def load_constitution(path: Path | str) -> Constitution:
    """The constitution in a file, or the shipped one of that name. Raises BadInput with `file:line:column`."""
    path = _find(Path(path))
    # The named file may itself be a link: its author put it into this folder.
    loader = _Loader(path.parent.resolve())
    merged = loader.compile(path, ())
    document, written = loader.read[path.absolute()]
    if not merged:
        raise fail(document, (), "found neither principles nor traits, expected at least one")
    return Constitution(written.name, written.description, tuple(merged.values()), path, tuple(loader.paths))


def _find(path: Path) -> Path:
    """`path`, or the shipped document that is called so."""
    if path.suffix or len(path.parts) != 1 or path.exists():
        return path
    names = shipped_names("constitutions")
    if path.name in names:
        return shipped("constitutions") / f"{path.name}.yaml"
    raise BadInput(printable(f"{path}: no such file, and no shipped constitution{nearest(path.name, names)}"))


class _Loader:
    """Reads each document once, whichever of the others extend it, and remembers what it compiles to."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.read: dict[Path, tuple[Document, ConstitutionDocument]] = {}
        self.compiled: dict[Path, dict[str, Principle]] = {}
        self.paths: list[Path] = []

    def compile(self, path: Path, chain: tuple[Path, ...]) -> dict[str, Principle]:
        """Principles by id of the document at `path`, which the documents in `chain` are waiting for."""
        if path.absolute() in self.compiled:
            return self.compiled[path.absolute()]
        document = load_document(path)
        written = validate(document, ConstitutionDocument)
        self.read[path.absolute()] = (document, written)
        merged: dict[str, Principle] = {}
        for keys, name in _extended(written):
            base = self._resolve(document, keys, name, (*chain, path))
            # In place where the id is known already, so that the order stays that of the document read first.
            merged.update(self.compile(base, (*chain, path)))
        _merge(merged, document, written)
        self.compiled[path.absolute()] = merged
        self.paths.append(path)
        return merged

    def _resolve(self, document: Document, keys: tuple[Key, ...], name: str, chain: tuple[Path, ...]) -> Path:
        """The file that `name` at `keys` of `document` means."""
        shown = shorten(repr(name), 100)
        if Path(name).is_absolute():
            raise fail(document, keys, f"found the absolute path {shown}, expected one relative to this document")
        try:
            target = (chain[-1].parent / name).resolve()
            exists = target.is_file()
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "symbolic links in a circle"
            raise fail(document, keys, f"found {shown}, which cannot be read: {reason}") from None
        if not target.is_relative_to(self.tree):
            raise fail(
                document,
                keys,
                f"found {shown}, which lies outside of the folder of {chain[0]}, expected a "
                "document in that folder or below",
            )
        seen = [each.resolve() for each in chain]
        if target in seen:
            names = [each.name for each in (*chain[seen.index(target) :], target)]
            raise fail(document, keys, f"found a circle of documents, {' -> '.join(names)}, expected it to end")
        if len(chain) >= MAX_DOCUMENTS:
            raise fail(document, keys, f"found a chain of more than {MAX_DOCUMENTS} documents, expected fewer")
        if not exists:
            siblings = target.parent.iterdir() if target.parent.is_dir() else ()
            others = [each.name for each in siblings if each not in seen]
            raise fail(document, keys, f"found {shown}, which is no file{nearest(target.name, others)}")
        # `..` has been followed: what is compared, cached and reported is one path for one file.
        return chain[0].parent / target.relative_to(self.tree)


def _extended(written: ConstitutionDocument) -> list[tuple[tuple[Key, ...], str]]:
    """(keys, path) of each document that `written` extends."""
    if written.extends is None:
        return []
    if isinstance(written.extends, str):
        return [(("extends",), written.extends)]
    return [(("extends", index), name) for index, name in enumerate(written.extends)]


def _merge(merged: dict[str, Principle], document: Document, written: ConstitutionDocument) -> None:
    """Change what was inherited into what this document says."""
    own: dict[str, str] = {}
    entries: list[tuple[tuple[Key, ...], PrincipleEntry | TraitEntry]] = [
        *((("principles", index), principle) for index, principle in enumerate(written.principles)),
        *((("traits", index), trait) for index, trait in enumerate(written.traits)),
    ]
    for keys, entry in entries:
        at = (*keys, "id")
        if entry.id in own:
            raise fail(document, at, f"found the id {entry.id!r} a second time, expected it once; see {own[entry.id]}")
        own[entry.id] = document.where(at)
        if not entry.drop:
            merged[entry.id] = _compiled(entry, own[entry.id])
        elif entry.id in merged:
            del merged[entry.id]
        else:
            raise fail(
                document,
                at,
                f"found 'drop: true' for {entry.id!r}, expected the id of a principle in an "
                f"extended document{nearest(entry.id, merged)}",
            )


def _compiled(entry: Entry, where: str) -> Principle:
    trait = isinstance(entry, TraitEntry)
    derived = TRAIT_REQUESTS if trait else PRINCIPLE_REQUESTS
    return Principle(
        id=entry.id,
        text=entry.text,
        critique=entry.critique or derived["critique"].replace("{text}", entry.text),
        revise=entry.revise or derived["revise"].replace("{text}", entry.text),
        compare=entry.compare or derived["compare"].replace("{text}", entry.text),
        weight=entry.weight,
        tags=entry.tags or (("trait",) if trait else ()),
        applies_to=entry.applies_to,
        examples=tuple(_example(each) for each in entry.examples),
        trait=trait,
        where=where,
    )


def _example(entry: ExampleEntry) -> Example:
    turns = entry.prompt
    messages = (("user", turns),) if isinstance(turns, str) else tuple((turn.role, turn.content) for turn in turns)
    return Example(messages, entry.better, entry.worse)
