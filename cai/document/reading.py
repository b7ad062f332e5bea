"""YAML documents whose values keep their positions, and the one sentence that a wrong document is refused with.

Constitutions, recipes and profiles are read here. A document is one mapping of plain data: text, numbers, true and
false, lists and mappings. `cai.document.building` builds it and bounds its size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cai.document.building import Node, Plain, Position, build_nodes, resolve_scalar, value_of
from cai.document.problems import Problem, WrongDocument
from cai.text.encodings import utf16_hint
from cai.text.errors import BadInput, did_you_mean
from cai.text.formatting import Key, describe, dotted, printable

MAX_BYTES = 5_000_000
_UNREADABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufeff\uff00-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Document:
    """One file: its data, and the position of every value. `keys` lead to one: `("principles", 3, "weight")`."""

    path: Path
    root: Node

    @property
    def value(self) -> dict[str, Plain]:
        """The document as plain data."""
        assert isinstance(self.root.value, dict)
        return self.root.value

    def node(self, keys: tuple[Key, ...]) -> Node:
        """The node at `keys`, or the innermost existing node around it."""
        node = self.root
        for key in keys:
            if key not in node.children:
                break
            node = node.children[key]
        return node

    def position(self, keys: tuple[Key, ...]) -> Position:
        """The position of the value at `keys`, or of the innermost existing value around it."""
        return self.node(keys).position

    def key_position(self, keys: tuple[Key, ...]) -> Position:
        """The position of the last key itself, or of the value where it is an item of a list."""
        parent = self.node(keys[:-1])
        if keys and keys[-1] in parent.keys:
            return parent.keys[str(keys[-1])]
        return self.position(keys)

    def location(self, keys: tuple[Key, ...], *, key: bool = False) -> str:
        """`file:line:column` of the value, or of the key; for a value from the command line, the option that set it."""
        node = self.node(keys)
        if node.source:
            return node.source
        return f"{self.path}:{self.key_position(keys) if key else self.position(keys)}"

    def with_value(self, keys: tuple[Key, ...], value: Plain, source: str) -> Document:
        """A copy with `value` at `keys`, whose errors are reported as `source`. Mappings on the way are created."""
        return replace(self, root=_with_value(self.root, keys, value, source))


def load_document(path: Path) -> Document:
    """The document in the file `path`. Raises BadInput, in one sentence, where the file is no valid document."""
    path = Path(path)
    try:
        if path.is_dir():
            raise WrongDocument([Problem("found a folder, expected a YAML file", str(path))])
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
            raise WrongDocument([Problem(f"no such file{did_you_mean(path.name, siblings)}", str(path))]) from None
        reason = getattr(error, "strerror", None) or str(error)
        raise WrongDocument([Problem(f"cannot be read: {reason}", str(path))]) from None
    if len(data) > MAX_BYTES:
        message = f"found a file of more than {MAX_BYTES:,} bytes, expected a document that a person wrote"
        raise _error(path, Position(1, 1), message)
    if hint := utf16_hint(data):
        raise _error(path, Position(1, 1), hint)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        position = _position_after(data[: error.start].decode("utf-8", "replace"))
        raise _error(path, position, "found bytes that are not UTF-8, expected a text file in UTF-8") from None
    return parse_document(text, path)


def parse_document(text: str, path: Path) -> Document:
    """The document written in `text`; messages call it `path`. Raises BadInput like `load_document`."""
    if control := _UNREADABLE.search(text):
        position = _position_after(text[: control.start()])
        raise _error(path, position, f"found the control character {control.group()!r}, expected text")
    root = build_nodes(path, text)
    if not isinstance(root.value, dict):
        raise _error(path, root.position, f"found {describe(root.value)}, expected a mapping of keys to values")
    return Document(path, root)


def error_at(document: Document, keys: tuple[Key, ...], message: str, *, key: bool = False) -> BadInput:
    """The error for a problem at `keys`, or with `key` at the key: `file:line:column: path.to.key: message`."""
    message = f"{dotted(keys)}: {message}" if keys else message
    if source := document.node(keys).source:
        return WrongDocument([Problem(message, source=source)])
    position = document.key_position(keys) if key else document.position(keys)
    return WrongDocument([Problem(message, str(document.path), position.line, position.column)])


def override_value(document: Document, override: str) -> Document:
    """The document with `a.b.c=value` set. Stages are named by their id; the value is read as YAML."""
    source = f"--set {override}"
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise BadInput(printable(f"{source}: expected key=value, as in --set stages.policy.train.beta=0.2"))
    keys: tuple[Key, ...] = ()
    for step in path.split("."):
        keys = (*keys, _resolve_step(document.node(keys), step, keys, source))
    # Lists, mappings and quoted text need the parser; all other text is one plain scalar, even with ': ' in it.
    needs_parser = text.startswith(("[", "{", '"', "'"))
    value = parse_document(f"value: {text}", Path(source)).value["value"] if needs_parser else resolve_scalar(text)
    return document.with_value(keys, value, source)


def _resolve_step(node: Node, step: str, keys: tuple[Key, ...], source: str) -> Key:
    """The key that one step of an override's path means in `node`: a mapping's key, a list's index, or a stage's id."""
    if not isinstance(node.value, list):
        return step
    if keys == ("stages",):
        ids = [stage.get("id") if isinstance(stage, dict) else None for stage in node.value]
        if step in ids:
            return ids.index(step)
        stage_ids = [stage_id for stage_id in ids if isinstance(stage_id, str)]
        message = f"{source}: no stage {step!r}, expected one of {', '.join(stage_ids)}{did_you_mean(step, stage_ids)}"
        raise BadInput(printable(message))
    if not re.fullmatch(r"[0-9]{1,6}", step) or int(step) >= len(node.value):
        raise BadInput(printable(f"{source}: found {step!r}, expected an index below {len(node.value)}"))
    return int(step)


def _error(path: Path, position: Position, message: str) -> BadInput:
    return WrongDocument([Problem(message, str(path), position.line, position.column)])


def _position_after(text: str) -> Position:
    """The position of the character that follows `text`."""
    return Position(text.count("\n") + 1, len(text) - text.rfind("\n"))


def _with_value(node: Node, keys: tuple[Key, ...], value: Plain, source: str) -> Node:
    if not keys:
        return _nodes_of(value, source)
    key, rest = keys[0], keys[1:]
    if isinstance(node.value, list) and key not in node.children:
        raise BadInput(printable(f"{source}: found the item {key!r}, expected one of a list of {len(node.value)}"))
    if not isinstance(node.value, dict | list):
        node = Node({}, node.position, source=source)
    child = node.children.get(key) or Node({}, node.position, source=source)
    children = {**node.children, key: _with_value(child, rest, value, source)}
    return replace(node, value=value_of(node.value, children), children=children)


def _nodes_of(value: Plain, source: str) -> Node:
    """Nodes for a value that does not come from a file."""
    pairs: Iterable[tuple[Key, Plain]] = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    return Node(value, Position(0, 0), {key: _nodes_of(child, source) for key, child in pairs}, source=source)
