"""Loads a constitution: reads the document and those that it extends, merges them, and derives absent fields.

The folder of the document that the user names is the boundary: every document that it extends, directly or not, is in
that folder or below it, with symbolic links followed. A principle with the id of an inherited one takes its place;
`drop: true` removes the inherited one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from cai.constitution.schema import ConstitutionDocument, Entry, ExampleEntry, PrincipleEntry, TraitEntry
from cai.document import Document, error_at, load_document, validate
from cai.document.shipped import shipped_folder, shipped_names
from cai.storage.rows import Message
from cai.text.errors import BadInput, did_you_mean
from cai.text.formatting import Key, printable, shorten

MAX_DOCUMENTS = 50

PRINCIPLE_FIELDS = {
    "critique": "Say specifically and briefly where the response falls short of this principle, or that it does not: "
    "{text}",
    "revise": "Rewrite the response so that it lives up to this principle, and keep what was already good about it: "
    "{text}",
    "compare": "Which response lives up better to this principle? {text}",
}
"""The principle fields of a principle whose author did not write them, derived from its text."""

TRAIT_FIELDS = {
    "critique": 'This is how the assistant describes its own character: "{text}" Say specifically and briefly where '
    "the response does not sound like it, or that it does.",
    "revise": 'Rewrite the response as an assistant would that can truthfully say of itself: "{text}" Let the trait '
    "show only where it fits the conversation; do not announce it.",
    "compare": 'Which response is more like what an assistant would write that can truthfully say of itself: "{text}"',
}
"""The same for traits."""


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

    def weighted(self, by_tag: Mapping[str, float]) -> float:
        """Its weight times the factors that `by_tag` has for its tags."""
        return self.weight * math.prod(by_tag.get(tag, 1.0) for tag in self.tags)

    def applies(self, tags: Sequence[str]) -> bool:
        """Whether the principle applies to a prompt with these tags."""
        return self.applies_to is None or not set(self.applies_to).isdisjoint(tags)


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
    """Every file that was read; the one that the user named is the last."""

    def principle(self, id: str) -> Principle:
        """The principle of that id. Raises BadInput for an unknown id."""
        principles_by_id = {principle.id: principle for principle in self.principles}
        if id not in principles_by_id:
            raise BadInput(printable(f"{self.path}: no principle {id!r}{did_you_mean(id, principles_by_id)}"))
        return principles_by_id[id]

    def plain(self) -> dict[str, object]:
        """Plain data for JSON, with the keys of a document that extends nothing."""
        principles = []
        for principle in self.principles:
            examples = [
                {"prompt": example.conversation, "better": example.better, "worse": example.worse}
                for example in principle.examples
            ]
            principles.append(asdict(principle) | {"examples": examples})
            del principles[-1]["location"]
        return {"name": self.name, "description": self.description, "principles": principles}


def load_constitution(path: Path | str) -> Constitution:
    """The constitution in a file, or the shipped one of that name. Raises BadInput with `file:line:column`."""
    path = _resolve_name(Path(path))
    # The named file may itself be a link: its author put it into this folder.
    loader = _Loader(path.parent.resolve())
    principles = loader.compile(path, ())
    document, written = loader.documents[path.absolute()]
    if not principles:
        raise error_at(document, (), "found neither principles nor traits, expected at least one")
    return Constitution(written.name, written.description, tuple(principles.values()), path, tuple(loader.paths))


def _resolve_name(path: Path) -> Path:
    """`path`, or the shipped document of that name."""
    if path.suffix or len(path.parts) != 1 or path.exists():
        return path
    names = shipped_names("constitutions")
    if path.name in names:
        return shipped_folder("constitutions") / f"{path.name}.yaml"
    raise BadInput(printable(f"{path}: no such file, and no shipped constitution{did_you_mean(path.name, names)}"))


class _Loader:
    """Reads and compiles each document once, however many documents extend it."""

    def __init__(self, boundary: Path) -> None:
        self.boundary = boundary
        """The folder that all extended documents are in, or below."""
        self.documents: dict[Path, tuple[Document, ConstitutionDocument]] = {}
        self.compiled: dict[Path, dict[str, Principle]] = {}
        self.paths: list[Path] = []

    def compile(self, path: Path, chain: tuple[Path, ...]) -> dict[str, Principle]:
        """Principles by id of the document at `path`, which the last of `chain` extends, which the one before does."""
        if path.absolute() in self.compiled:
            return self.compiled[path.absolute()]
        document = load_document(path)
        written = validate(document, ConstitutionDocument)
        self.documents[path.absolute()] = (document, written)
        principles: dict[str, Principle] = {}
        for keys, name in _extended_names(written):
            base = self._resolve(document, keys, name, (*chain, path))
            # `update` keeps the place of an id that it replaces: the order is that of the document read first.
            principles.update(self.compile(base, (*chain, path)))
        _merge(principles, document, written)
        self.compiled[path.absolute()] = principles
        self.paths.append(path)
        return principles

    def _resolve(self, document: Document, keys: tuple[Key, ...], name: str, chain: tuple[Path, ...]) -> Path:
        """The path of the document `name` that `document`, the last of `chain`, extends at `keys`."""
        shown = shorten(repr(name), 100)
        if Path(name).is_absolute():
            raise error_at(document, keys, f"found the absolute path {shown}, expected one relative to this document")
        try:
            target = (chain[-1].parent / name).resolve()
            exists = target.is_file()
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "symbolic links in a circle"
            raise error_at(document, keys, f"found {shown}, which cannot be read: {reason}") from None
        if not target.is_relative_to(self.boundary):
            outside = f"found {shown}, which lies outside of the folder of {chain[0]}"
            raise error_at(document, keys, f"{outside}, expected a document in that folder or below")
        resolved_chain = [path.resolve() for path in chain]
        if target in resolved_chain:
            names = [path.name for path in (*chain[resolved_chain.index(target) :], target)]
            raise error_at(document, keys, f"found a circle of documents, {' -> '.join(names)}, expected it to end")
        if len(chain) >= MAX_DOCUMENTS:
            raise error_at(document, keys, f"found a chain of more than {MAX_DOCUMENTS} documents, expected fewer")
        if not exists:
            siblings = target.parent.iterdir() if target.parent.is_dir() else ()
            names = [path.name for path in siblings if path not in resolved_chain]
            raise error_at(document, keys, f"found {shown}, which is no file{did_you_mean(target.name, names)}")
        # The path from the first document's folder, without `..`: each file has one path in caches and messages.
        return chain[0].parent / target.relative_to(self.boundary)


def _extended_names(written: ConstitutionDocument) -> list[tuple[tuple[Key, ...], str]]:
    """(keys, relative path) of each document that `written` extends."""
    if isinstance(written.extends, str):
        return [(("extends",), written.extends)]
    return [(("extends", index), name) for index, name in enumerate(written.extends or ())]


def _merge(principles: dict[str, Principle], document: Document, written: ConstitutionDocument) -> None:
    """Changes the inherited `principles` as this document says."""
    locations: dict[str, str] = {}
    entries: list[tuple[tuple[Key, ...], PrincipleEntry | TraitEntry]] = [
        *((("principles", index, "id"), principle) for index, principle in enumerate(written.principles)),
        *((("traits", index, "id"), trait) for index, trait in enumerate(written.traits)),
    ]
    for keys, entry in entries:
        if entry.id in locations:
            message = f"found the id {entry.id!r} a second time, expected it once; see {locations[entry.id]}"
            raise error_at(document, keys, message)
        locations[entry.id] = document.location(keys)
        if not entry.drop:
            principles[entry.id] = _compiled(entry, locations[entry.id])
        elif entry.id in principles:
            del principles[entry.id]
        else:
            expected = f"expected the id of a principle in an extended document{did_you_mean(entry.id, principles)}"
            raise error_at(document, keys, f"found 'drop: true' for {entry.id!r}, {expected}")


def _compiled(entry: Entry, location: str) -> Principle:
    is_trait = isinstance(entry, TraitEntry)
    derived = {
        name: getattr(entry, name) or template.replace("{text}", entry.text)
        for name, template in (TRAIT_FIELDS if is_trait else PRINCIPLE_FIELDS).items()
    }
    return Principle(
        id=entry.id, text=entry.text, **derived, weight=entry.weight, applies_to=entry.applies_to,
        tags=entry.tags or (("trait",) if is_trait else ()), examples=tuple(map(_example, entry.examples)),
        trait=is_trait, location=location,
    )  # fmt: skip


def with_text(principle: Principle, text: str) -> Principle:
    """The principle as if its author had written this text alone: what models are asked is derived from it."""
    templates = TRAIT_FIELDS if principle.trait else PRINCIPLE_FIELDS
    critique, revise, compare = (templates[name].replace("{text}", text) for name in ("critique", "revise", "compare"))
    return replace(principle, text=text, critique=critique, revise=revise, compare=compare)


def _example(entry: ExampleEntry) -> Example:
    turns = entry.prompt
    messages = (("user", turns),) if isinstance(turns, str) else tuple((turn.role, turn.content) for turn in turns)
    return Example(messages, entry.better, entry.worse)
