"""YAML documents that remember where everything stands, and the one sentence that a wrong one is refused with.

Constitutions, recipes and profiles are read here. A document is one mapping of plain data: text, numbers, true and
false, lists and mappings. How it is built, and within which bounds, is in `cai.document.building`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cai.document.building import Builder, Node, Plain, value_of
from cai.text.errors import BadInput, nearest
from cai.text.formatting import Key, describe, dotted, printable

if TYPE_CHECKING:
    from pydantic import BaseModel

    Model = TypeVar("Model", bound=BaseModel)
else:
    Model = TypeVar("Model")

MAX_BYTES = 5_000_000
_UNREADABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufeff\uff00-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Document:
    """One file: its data, and the position of all of it. `keys` reach a value: `("principles", 3, "weight")`."""

    path: Path
    root: Node

    @property
    def value(self) -> dict[str, Plain]:
        """The document as plain data."""
        assert isinstance(self.root.value, dict)
        return self.root.value

    def node(self, keys: tuple[Key, ...]) -> Node:
        """The node at `keys`; where there is none, the innermost one around it that exists."""
        node = self.root
        for key in keys:
            if key not in node.children:
                break
            node = node.children[key]
        return node

    def position(self, keys: tuple[Key, ...]) -> tuple[int, int]:
        """Line and column, from 1, of the value at `keys`; of what is around it where there is none."""
        node = self.node(keys)
        return node.line, node.column

    def key_position(self, keys: tuple[Key, ...]) -> tuple[int, int]:
        """Line and column, from 1, of the last of `keys` itself; of the value where that is an item of a list."""
        around = self.node(keys[:-1])
        if keys and keys[-1] in around.keys:
            return around.keys[str(keys[-1])]
        return self.position(keys)

    def where(self, keys: tuple[Key, ...], *, key: bool = False) -> str:
        """`file:line:column` of the value, or of the key; what was set from elsewhere is named by that."""
        node = self.node(keys)
        if node.source:
            return node.source
        line, column = self.key_position(keys) if key else self.position(keys)
        return f"{self.path}:{line}:{column}"

    def with_value(self, keys: tuple[Key, ...], value: Plain, source: str) -> Document:
        """A copy with `value` at `keys`, whose errors are reported as `source`. Mappings on the way are created."""
        return replace(self, root=_with_value(self.root, keys, value, source))


def load_document(path: Path) -> Document:
    """The document in the file `path`. Raises BadInput with one sentence for everything that is not one."""
    path = Path(path)
    try:
        if path.is_dir():
            raise BadInput(printable(f"{path}: found a folder, expected a YAML file"))
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
            raise BadInput(printable(f"{path}: no such file{nearest(path.name, names)}")) from None
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(printable(f"{path}: cannot be read: {reason}")) from None
    if len(data) > MAX_BYTES:
        raise BadInput(
            printable(
                f"{path}:1:1: found a file of more than {MAX_BYTES:,} bytes, expected a document that a person wrote"
            )
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _line_and_column(data[: error.start].decode("utf-8", "replace"))
        raise BadInput(
            printable(f"{path}:{line}:{column}: found bytes that are not UTF-8, expected a text file in UTF-8")
        ) from None
    return parse_document(text, path)


def parse_document(text: str, path: Path) -> Document:
    """The document written in `text`; `path` is what messages call it. Raises BadInput like `load_document`."""
    if odd := _UNREADABLE.search(text):
        line, column = _line_and_column(text[: odd.start()])
        raise BadInput(printable(f"{path}:{line}:{column}: found the control character {odd.group()!r}, expected text"))
    root = Builder(path, text).build()
    if not isinstance(root.value, dict):
        raise BadInput(
            printable(
                f"{path}:{root.line}:{root.column}: found {describe(root.value)}, expected a mapping of keys to values"
            )
        )
    return Document(path, root)


def validate(document: Document, model: type[Model], at: tuple[Key, ...] = ()) -> Model:
    """The part of the document at `at` as a `model`. Raises BadInput with the first thing that is wrong."""
    from pydantic import ValidationError

    value: Plain = document.value
    for depth, key in enumerate(at):
        if key not in document.node(at[:depth]).children:
            raise fail(document, at[:depth], f"found no {key!r}")
        value = document.node(at[: depth + 1]).value
    try:
        return model.model_validate(value)
    except ValidationError as error:
        from cai.document.validation import explain

        raise explain(document, model, at, error) from None


def fail(document: Document, keys: tuple[Key, ...], message: str, *, key: bool = False) -> BadInput:
    """The error to raise for what is wrong at `keys`: `file:line:column: path.to.key: message`.

    `key=True` points at the key rather than at its value.
    """
    path = f"{dotted(keys)}: " if keys else ""
    return BadInput(printable(f"{document.where(keys, key=key)}: {path}{message}"))


def _line_and_column(before: str) -> tuple[int, int]:
    """Position, from 1, of the character that follows `before`."""
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def _with_value(node: Node, keys: tuple[Key, ...], value: Plain, source: str) -> Node:
    if not keys:
        return _imported(value, source)
    key, rest = keys[0], keys[1:]
    if isinstance(node.value, list) and key not in node.children:
        raise BadInput(printable(f"{source}: found the item {key!r}, expected one of a list of {len(node.value)}"))
    if not isinstance(node.value, dict | list):
        node = Node({}, node.line, node.column, source=source)
    child = node.children.get(key) or Node({}, node.line, node.column, source=source)
    children = {**node.children, key: _with_value(child, rest, value, source)}
    return replace(node, value=value_of(node.value, children), children=children)


def _imported(value: Plain, source: str) -> Node:
    """Nodes for a value that stands in no file."""
    pairs: Iterable[tuple[Key, Plain]] = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    return Node(value, 0, 0, {key: _imported(each, source) for key, each in pairs}, source=source)
