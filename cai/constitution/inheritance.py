"""Reads a constitution with the documents that it extends, merges them, and derives absent fields.

The folder of the document that the user names is the boundary: every document that it extends, directly or not, is in
that folder or below it, with symbolic links followed. A principle with the id of an inherited one takes its place; an
entry with `weight` alone changes the inherited one's weight, and `drop: true` removes it. In which order documents are
applied is in `cai.constitution.layers`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from cai.constitution.compiled import Constitution, Example, Principle
from cai.constitution.layers import ContradictoryOrder, Layer, LayerEntry, apply_layers, merged_order
from cai.constitution.schema import ConstitutionDocument, Entry, ExampleEntry, TraitEntry
from cai.document import (
    Document,
    Problem,
    Problems,
    WrongDocument,
    check_kind,
    error_at,
    load_document,
    validate,
)  # fmt: skip
from cai.document.shipped import kind_hint, shipped_folder, shipped_names
from cai.text.errors import BadInput, did_you_mean
from cai.text.formatting import Key, describe, printable, shorten

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


def load_constitution(path: Path | str) -> Constitution:
    """The constitution in a file, or the shipped one of that name.

    Each document is applied once, after all that it extends, and those of one list in the order of the list. Raises
    BadInput with every problem of the document and of those that it extends, each with `file:line:column`.
    """
    path = _resolve_name(Path(path))
    # The named file may itself be a link: its author put it into this folder.
    loader = _Loader(path.parent.resolve())
    layer = loader.layer(path, ())
    principles, changes = apply_layers(loader.layers[document_path] for document_path in layer.order)
    document, written = loader.documents[path]
    if not principles:
        dropped = any(change.kind == "dropped" for change in changes)
        reason = "found that every principle is dropped" if dropped else "found neither principles nor traits"
        raise error_at(document, (), f"{reason}, expected at least one")
    return Constitution(written.name, written.description, tuple(principles.values()), path, layer.order, changes)


def _resolve_name(path: Path) -> Path:
    """`path`, or the shipped document of that name."""
    if path.suffix or len(path.parts) != 1 or path.exists():
        return path
    names = shipped_names("constitutions")
    if path.name in names:
        return shipped_folder("constitutions") / f"{path.name}.yaml"
    hint = did_you_mean(path.name, names) or kind_hint(path.name, "constitutions")
    raise WrongDocument([Problem(f"no such file, and no shipped constitution{hint}", str(path))])


class _Loader:
    """Reads each document once, however many documents extend it."""

    def __init__(self, boundary: Path) -> None:
        self.boundary = boundary
        """The folder that all extended documents are in, or below."""
        self.documents: dict[Path, tuple[Document, ConstitutionDocument]] = {}
        self.layers: dict[Path, Layer] = {}
        self.refused: dict[Path, BadInput] = {}

    def layer(self, path: Path, chain: tuple[Path, ...]) -> Layer:
        """The document at `path`, which the last of `chain` extends, which the one before does.

        Raises BadInput with its problems and those of the documents that it extends.
        """
        if path in self.refused:
            raise self.refused[path]
        if path not in self.layers:
            try:
                self.layers[path] = self._read(path, chain)
            except BadInput as error:
                self.refused[path] = error
                raise
        return self.layers[path]

    def _read(self, path: Path, chain: tuple[Path, ...]) -> Layer:
        document = load_document(path)
        check_kind(document, "constitution")
        problems, problems_of_bases = Problems(), Problems()
        with problems.collect():
            self.documents[path] = (document, validate(document, ConstitutionDocument))
        bases: list[Layer] = []
        for keys, name in _extended_names(document):
            with problems_of_bases.collect():
                bases.append(self.layer(self._resolve(document, keys, name, (*chain, path)), (*chain, path)))
        order: list[Path] = []
        try:
            order = merged_order(bases)
        except ContradictoryOrder as error:
            message = f"found {error} in orders that contradict each other, expected one order in every `extends`"
            problems.add(error_at(document, ("extends",), message))
        inherited = None
        if not problems_of_bases and (order or not bases):
            inherited, _ = apply_layers(self.layers[base] for base in order)
        _check_entries(document, inherited, problems)
        problems.extend(problems_of_bases)
        problems.raise_if_any()
        written = self.documents[path][1]
        return Layer(path, (*order, path), tuple(_layer_entries(document, written)))

    def _resolve(self, document: Document, keys: tuple[Key, ...], name: str, chain: tuple[Path, ...]) -> Path:
        """The path of the document `name` that `document`, the last of `chain`, extends at `keys`."""
        if not name.endswith((".yaml", ".yml")) or printable(name) != name:
            hint = _nearest_hint(name, chain[-1].parent.resolve(), chain)
            raise error_at(document, keys, f"found {describe(name)}, expected the relative path of a .yaml file{hint}")
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
            hint = _nearest_hint(target.stem, target.parent, chain)
            raise error_at(document, keys, f"found {shown}, which is no file{hint}")
        # The path from the first document's folder, without `..`: each file has one path in caches and messages.
        return chain[0].parent / target.relative_to(self.boundary)


def _nearest_hint(name: str, folder: Path, chain: tuple[Path, ...]) -> str:
    """The document in `folder` that `name`, without its suffix, most likely means, or how to extend a shipped one.

    None of `chain` is named: it would extend itself.
    """
    in_chain = [path.resolve() for path in chain]
    siblings = [path for path in folder.iterdir() if path not in in_chain] if folder.is_dir() else []
    files = {path.stem: path.name for path in siblings if path.suffix in (".yaml", ".yml")}
    if nearest := difflib.get_close_matches(name, files, n=1):
        return f"; did you mean {files[nearest[0]]!r}?"
    if nearest := difflib.get_close_matches(name, shipped_names("constitutions"), n=1):
        source = shipped_folder("constitutions") / f"{nearest[0]}.yaml"
        copy = f"cp {source} {chain[-1].parent}"
        return f"; {nearest[0]!r} is shipped, and is extended as a copy beside this file: {copy}"
    return ""


def _extended_names(document: Document) -> list[tuple[tuple[Key, ...], str]]:
    """(keys, relative path) of each document that `document` extends, which may be wrong elsewhere."""
    extends = document.value.get("extends")
    if isinstance(extends, list):
        return [(("extends", index), name) for index, name in enumerate(extends) if isinstance(name, str)]
    return [(("extends",), extends)] if isinstance(extends, str) else []


def _check_entries(document: Document, inherited: Mapping[str, Principle] | None, problems: Problems) -> None:
    """Adds ids that stand twice to `problems`, and dropped ids that are not among the inherited principles, if known.

    The document may be wrong elsewhere.
    """
    locations: dict[str, str] = {}
    for section in ("principles", "traits"):
        entries = document.value.get(section)
        for index, entry in enumerate(entries if isinstance(entries, list) else ()):
            if not isinstance(entry, dict) or not isinstance(id_ := entry.get("id"), str):
                continue
            keys = (section, index, "id")
            if id_ in locations:
                message = f"found the id {id_!r} a second time, expected it once; see {locations[id_]}"
                problems.add(error_at(document, keys, message))
            elif entry == {"id": id_, "drop": True} and inherited is not None and id_ not in inherited:
                expected = f"expected the id of a principle in an extended document{did_you_mean(id_, inherited)}"
                problems.add(error_at(document, keys, f"found 'drop: true' for {id_!r}, {expected}"))
            elif entry.keys() == {"id", "weight"} and inherited is not None and id_ not in inherited:
                expected = "expected `text` too, or the id of a principle in an extended document"
                hint = did_you_mean(id_, inherited)
                problems.add(error_at(document, keys, f"found `weight` alone for {id_!r}, {expected}{hint}"))
            locations.setdefault(id_, document.location(keys))


def _layer_entries(document: Document, written: ConstitutionDocument) -> Iterator[LayerEntry]:
    """What a right document says about each id, in the order of its entries."""
    sections: dict[str, tuple[Entry, ...]] = {"principles": written.principles, "traits": written.traits}
    for section, entries in sections.items():
        for index, entry in enumerate(entries):
            location = document.location((section, index, "id"))
            if entry.reweighs:
                yield LayerEntry(entry.id, None, location, entry.weight)
            else:
                yield LayerEntry(entry.id, None if entry.drop else _compiled(entry, location), location)


def _compiled(entry: Entry, location: str) -> Principle:
    is_trait = isinstance(entry, TraitEntry)
    derived = {
        name: getattr(entry, name) or template.replace("{text}", entry.text)
        for name, template in (TRAIT_FIELDS if is_trait else PRINCIPLE_FIELDS).items()
    }
    return Principle(
        id=entry.id, text=entry.text, **derived, weight=entry.weight, applies_to=entry.applies_to,
        tags=entry.tags or (("trait",) if is_trait else ()), examples=tuple(map(_example, entry.examples)),
        trait=is_trait, location=location, derived=tuple(name for name in derived if not getattr(entry, name)),
    )  # fmt: skip


def with_text(principle: Principle, text: str) -> Principle:
    """The principle as if its author had written this text alone: what models are asked is derived from it."""
    templates = TRAIT_FIELDS if principle.trait else PRINCIPLE_FIELDS
    critique, revise, compare = (templates[name].replace("{text}", text) for name in ("critique", "revise", "compare"))
    return replace(
        principle, text=text, critique=critique, revise=revise, compare=compare, derived=tuple(PRINCIPLE_FIELDS)
    )


def _example(entry: ExampleEntry) -> Example:
    turns = entry.prompt
    messages = (("user", turns),) if isinstance(turns, str) else tuple((turn.role, turn.content) for turn in turns)
    return Example(messages, entry.better, entry.worse)
