"""Builds a document's nodes from the YAML parser's events: plain data, each value with its line and column.

`yaml.compose` does not fit: it gives an alias the position of its anchor, and its unbounded recursion overflows the C
stack where a file nests deeply. Scalars follow YAML 1.2: `on` and `no` are text, `2e-4` is a number. Left out on
purpose: tags, merge keys, several documents in one file, dates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import yaml

from cai.document.problems import Problem, WrongDocument
from cai.text.errors import BadInput
from cai.text.formatting import Key, describe, shorten

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""The data in a document."""

MAX_VALUES = 100_000
MAX_CHARACTERS = 10_000_000
MAX_DEPTH = 60

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAGS = {yaml.ScalarEvent: "str", yaml.SequenceStartEvent: "seq", yaml.MappingStartEvent: "map"}
"""The only tag that a value of each kind may have, which changes nothing."""
_INT = re.compile(r"[-+]?[0-9]{1,300}\Z")
_BASED = re.compile(r"0o[0-7]{1,300}\Z|0x[0-9a-fA-F]{1,300}\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_SPECIAL: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", "+.inf", ".Inf", "+.Inf"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_HINTS = {
    "mapping values are not allowed": "found ': ' where no key can stand, expected text with ': ' in it to be quoted "
    "or to stand below '>-', and keys of one mapping in one column",
    "did not find expected key": "found a line that does not fit the mapping around it, expected its keys in one "
    "column and every quote closed",
    "could not find expected ':'": "found text that is no key, expected 'key: value'",
    "did not find expected '-' indicator": "found a line that does not fit the list around it, expected its '-' in one "
    "column",
    "found unexpected end of stream": "found the end of the file, expected the quote to be closed",
    "found character that cannot start any token": "found a character that cannot begin a value, expected the text "
    "in quotes",
}
"""The beginnings of libyaml's messages, and the messages for the user in their place."""


class Position(NamedTuple):
    """A place in a file; both numbers count from 1."""

    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Node:
    """A value and its position."""

    value: Plain
    position: Position
    children: dict[Key, Node] = field(default_factory=dict)
    """The nodes in a mapping or a list."""
    keys: dict[str, Position] = field(default_factory=dict)
    """The positions of a mapping's keys."""
    source: str = ""
    """The origin of a value that is not from the file, for messages: `--set stages.policy.beta=2`."""


def resolve_scalar(text: str) -> bool | int | float | str | None:
    """The value of an unquoted YAML scalar, by the rules of YAML 1.2; also how `--set key=value` reads a value."""
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _INT.match(text):
        return int(text)
    if _BASED.match(text):
        return int(text, 0)
    if _FLOAT.match(text):
        return float(text)
    return text


def build_nodes(path: Path, text: str) -> Node:
    """The root node of the document in `text`. Raises BadInput, with `path` and a position, where it is not valid."""
    return _Builder(path, text).build()


class _Builder:
    """Builds nodes by recursive descent over the parser's events; `MAX_DEPTH` bounds the recursion."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.lines = text.splitlines()
        self.events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
        self.anchors: dict[str, Node | None] = {}
        """The node of each anchor; None while its value is still being built."""
        self.n_values = self.n_characters = 0
        """Values and characters so far, with aliases expanded."""

    def build(self) -> Node:
        root = None
        try:
            for event in self.events:
                if isinstance(event, yaml.DocumentStartEvent):
                    if root is not None:
                        raise self._error(event, "found a second document, expected one document in a file")
                    root = self._node(next(self.events), depth=0)
        except yaml.YAMLError as error:
            raise self._syntax_error(error) from None
        if root is None:
            raise self._error(Position(1, 1), "found an empty document, expected a mapping of keys to values")
        return root

    def _node(self, event: Any, depth: int, key_position: Position | None = None) -> Node:
        """The node that `event` begins, inside of `depth` lists and mappings."""
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise self._error(event, "found an alias to an anchor that does not exist, expected the text itself")
            if (node := self.anchors[event.anchor]) is None:
                message = f"found the alias *{event.anchor} inside of what it stands for, expected an end"
                raise self._error(event, message)
            return self._copied(node, event, depth, _position(event))
        self._check_tag(event)
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
            self._count(event, 1, len(event.value))
            # libyaml may place an absent value past the end of the file; its key is a better place.
            is_absent = value is None and not event.value
            node = Node(value, key_position if is_absent and key_position else _position(event))
        else:
            self.anchors[event.anchor] = None
            node = self._collection(event, depth + 1)
        self.anchors[event.anchor] = node
        return node

    def _collection(self, start: Any, depth: int) -> Node:
        self._check_depth(start, depth)
        self._count(start, 1, 0)
        children: dict[Key, Node] = {}
        keys: dict[str, Position] = {}
        is_list = isinstance(start, yaml.SequenceStartEvent)
        for event in self.events:
            if isinstance(event, yaml.CollectionEndEvent):
                break
            if is_list:
                children[len(children)] = self._node(event, depth)
            else:
                key = self._key(event, keys)
                keys[key] = _position(event)
                children[key] = self._node(next(self.events), depth, keys[key])
        return Node(value_of([] if is_list else {}, children), _position(start), children, keys)

    def _key(self, event: Any, keys: dict[str, Position]) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            kinds = {yaml.AliasEvent: "an alias", yaml.MappingStartEvent: "a mapping"}
            raise self._error(event, f"found {kinds.get(type(event), 'a list')} as a key, expected text")
        self._check_tag(event)
        key = self._scalar(event)
        if not isinstance(key, str):
            raise self._error(event, f"found {describe(key)} as a key, expected text; put it in quotes")
        if key == "<<" and not event.style:
            raise self._error(event, "found the merge key '<<', expected the keys themselves")
        if key in keys:
            repeated = f"found the key {shorten(key, 60)!r} a second time, expected it once"
            raise self._error(event, f"{repeated}; it stands at {keys[key]} already")
        self._count(event, 0, len(key))
        return key

    def _scalar(self, event: Any) -> bool | int | float | str | None:
        if event.style or event.tag:
            return str(event.value)
        # Text on several lines must not swallow a line that its author indented with a tab.
        for index in range(_position(event).line, min(event.end_mark.line + 1, len(self.lines))):
            if tab := _tab(self.lines[index]):
                raise self._error(Position(index + 1, tab[1]), "found a tab in the indentation, expected spaces")
        return resolve_scalar(event.value)

    def _copied(self, node: Node, alias: Any, depth: int, position: Position) -> Node:
        """A copy of `node` for `alias`, so that changing the value in one place leaves the other place alone."""
        if isinstance(node.value, list | dict):
            self._check_depth(alias, depth + 1)
        self._count(alias, 1, len(node.value) if isinstance(node.value, str) else sum(map(len, node.keys)))
        children = {key: self._copied(child, alias, depth + 1, child.position) for key, child in node.children.items()}
        return Node(value_of(node.value, children), position, children, node.keys)

    def _count(self, event: Any, n_values: int, n_characters: int) -> None:
        self.n_values += n_values
        self.n_characters += n_characters
        if self.n_values > MAX_VALUES or self.n_characters > MAX_CHARACTERS:
            limits = f"{MAX_VALUES:,} values or {MAX_CHARACTERS:,} characters with aliases expanded"
            raise self._error(event, f"found more than {limits}, expected a document that a person wrote")

    def _check_depth(self, event: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._error(event, f"found more than {MAX_DEPTH} levels, expected a document that a person wrote")

    def _check_tag(self, event: Any) -> None:
        if event.tag and event.tag not in {f"tag:yaml.org,2002:{_TAGS[type(event)]}", "!"}:
            name = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise self._error(event, f"found the tag {shorten(name, 60)!r}, expected plain YAML without tags")

    def _syntax_error(self, error: yaml.YAMLError) -> BadInput:
        mark = getattr(error, "problem_mark", None)
        problem = str(getattr(error, "problem", None) or error)
        if mark is None:
            return self._error(Position(1, 1), f"found {problem}, expected YAML")
        tab = _tab(self.lines[mark.line]) if mark.line < len(self.lines) else None
        if tab and mark.column <= tab[0]:
            return self._error(Position(mark.line + 1, tab[1]), "found a tab in the indentation, expected spaces")
        hints = (hint for beginning, hint in _HINTS.items() if problem.startswith(beginning))
        message = next(hints, f"{problem}: expected YAML")
        context = getattr(error, "context_mark", None)
        if context is not None and context.line != mark.line:
            message += f"; what is wrong may begin at {context.line + 1}:{context.column + 1}"
        return self._error(Position(mark.line + 1, mark.column + 1), message)

    def _error(self, place: Any, message: str) -> BadInput:
        """The error at a position, or at the beginning of an event."""
        position = place if isinstance(place, Position) else _position(place)
        return WrongDocument([Problem(message, str(self.path), position.line, position.column)])


def _position(event: Any) -> Position:
    return Position(event.start_mark.line + 1, event.start_mark.column + 1)


def _tab(line: str) -> tuple[int, int] | None:
    """Width of the indentation and column, from 1, of the first tab in it; None where there is no tab."""
    indent = line[: len(line) - len(line.lstrip(" \t"))]
    return (len(indent), indent.index("\t") + 1) if "\t" in indent and line.strip() else None


def value_of(like: Plain, children: dict[Key, Node]) -> Plain:
    """The data of `children`, as the kind of value that `like` is."""
    if isinstance(like, list):
        return [child.value for child in children.values()]
    if isinstance(like, dict):
        return {str(key): child.value for key, child in children.items()}
    return like
