"""Builds a document's nodes from the parser's events: plain data, each value with its line and column.

Without recursion, so that depth, size and what aliases expand to are bounded before anything is built. Scalars follow
YAML 1.2: `on` and `no` are text, `2e-4` is a number. Left out on purpose: tags, merge keys, several documents in one
file, dates.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import yaml

from cai.text.errors import BadInput
from cai.text.formatting import Key, describe, printable, shorten

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""What a document is made of."""

MAX_NODES = 100_000
MAX_CHARACTERS = 10_000_000
MAX_DEPTH = 60

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
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
    "found undefined alias": "found an alias to an anchor that does not exist, expected the text itself",
    "found character that cannot start any token": "found a character that cannot begin a value, expected the text "
    "in quotes",
}


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it stands. `children` and `keys` belong to mappings and, without `keys`, to lists."""

    value: Plain
    line: int
    column: int
    children: dict[Key, Node] = field(default_factory=dict)
    keys: dict[str, tuple[int, int]] = field(default_factory=dict)
    source: str = ""
    """Where the value came from if not from the file, as a message names it: `--set stages.policy.beta=2`."""


def scalar(text: str) -> bool | int | float | str | None:
    """What an unquoted YAML scalar stands for, by the rules of YAML 1.2; also how `--set key=value` reads a value."""
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _INT.match(text):
        return int(text)
    if _BASED.match(text):
        return int(text, 0)
    if _FLOAT.match(text):
        return float(text)
    return text


@dataclass(slots=True)
class _Open:
    """A mapping or list whose end has not come yet. `key` is the mapping's key that waits for its value."""

    node: Node
    anchor: str | None
    size: tuple[int, int]
    key: str | None = None
    height: int = 0
    """Levels below this one."""


@dataclass(frozen=True, slots=True)
class _Anchored:
    """What an alias stands for, and what it adds each time that it is used."""

    node: Node
    nodes: int
    characters: int
    height: int


class Builder:
    """Turns the parser's events into nodes, counting nodes and characters with aliases expanded."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.text = text
        self.nodes = 0
        self.characters = 0
        self.open: list[_Open] = []
        self.anchors: dict[str, _Anchored | None] = {}
        """None while the anchored value is still open."""
        self.root: Node | None = None

    def build(self) -> Node:
        events = yaml.parse(self.text, Loader=_LOADER)
        try:
            for event in events:
                self._take(event)
        except yaml.YAMLError as error:
            raise self._syntax(error) from None
        if self.root is None:
            raise self._error(None, "found an empty document, expected a mapping of keys to values")
        return self.root

    def _take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            if self.root is not None:
                raise self._error(event, "found a second document, expected one document in a file")
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)
        elif isinstance(event, yaml.ScalarEvent):
            self._scalar(event)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._start(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = self.open.pop()
            if self.open:
                self.open[-1].height = max(self.open[-1].height, closed.height + 1)
            if closed.anchor:
                nodes, characters = closed.size
                self.anchors[closed.anchor] = _Anchored(
                    closed.node, self.nodes - nodes, self.characters - characters, closed.height + 1
                )

    def _start(self, event: yaml.CollectionStartEvent) -> None:
        mapping = isinstance(event, yaml.MappingStartEvent)
        self._check_tag(event, {"tag:yaml.org,2002:map" if mapping else "tag:yaml.org,2002:seq", "!"})
        self._check_depth(event, 1)
        if self.open and isinstance(self.open[-1].node.value, dict) and self.open[-1].key is None:
            raise self._error(event, f"found a {'mapping' if mapping else 'list'} as a key, expected text")
        line, column = _mark(event)
        node = Node({} if mapping else [], line, column)
        before = (self.nodes, self.characters)
        self._place(event, node, 1, 0)
        if event.anchor:
            self.anchors[event.anchor] = None
        self.open.append(_Open(node, event.anchor, before))

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        self._check_tag(event, {"tag:yaml.org,2002:str", "!"})
        plain = event.style in (None, "") and not event.tag
        line, column = _mark(event)
        if plain and event.end_mark is not None and event.end_mark.line >= line:
            self._check_continuation(line, event.end_mark.line)
        if self.open and isinstance(self.open[-1].node.value, dict) and self.open[-1].key is None:
            self._key(event, scalar(event.value) if plain else event.value)
            return
        if plain and not event.value and self.open and self.open[-1].key is not None:
            line, column = self.open[-1].node.keys[self.open[-1].key]  # the parser may place nothing past the end
        node = Node(scalar(event.value) if plain else event.value, line, column)
        if event.anchor:
            self.anchors[event.anchor] = _Anchored(node, 1, len(event.value), 0)
        self._place(event, node, 1, len(event.value))

    def _key(self, event: yaml.ScalarEvent, key: Plain) -> None:
        parent = self.open[-1]
        if not isinstance(key, str):
            raise self._error(event, f"found {describe(key)} as a key, expected text; put it in quotes")
        if key == "<<" and not event.style:
            raise self._error(event, "found the merge key '<<', expected the keys themselves")
        if key in parent.node.keys:
            line, column = parent.node.keys[key]
            raise self._error(
                event,
                f"found the key {shorten(key, 60)!r} a second time, expected it once; it stands "
                f"at {line}:{column} already",
            )
        parent.node.keys[key] = _mark(event)
        parent.key = key
        self._count(event, 0, len(key))

    def _alias(self, event: yaml.AliasEvent) -> None:
        if event.anchor not in self.anchors:
            raise self._error(event, _HINTS["found undefined alias"])
        anchored = self.anchors[event.anchor]
        if anchored is None:
            raise self._error(event, f"found the alias *{event.anchor} inside of what it stands for, expected an end")
        if self.open and isinstance(self.open[-1].node.value, dict) and self.open[-1].key is None:
            raise self._error(event, "found an alias as a key, expected text")
        self._check_depth(event, anchored.height)
        self._count(event, anchored.nodes, anchored.characters)
        if self.open:
            self.open[-1].height = max(self.open[-1].height, anchored.height)
        # A copy: whoever changes one of the two places does not change the other.
        line, column = _mark(event)
        self._place(event, replace(_copied(anchored.node), line=line, column=column), 0, 0)

    def _place(self, event: yaml.Event, node: Node, nodes: int, characters: int) -> None:
        """Put a finished or a just opened node where it belongs."""
        self._count(event, nodes, characters)
        if not self.open:
            self.root = node
            return
        parent = self.open[-1]
        if isinstance(parent.node.value, dict):
            assert parent.key is not None
            parent.node.value[parent.key] = node.value
            parent.node.children[parent.key] = node
            parent.key = None
        elif isinstance(parent.node.value, list):
            parent.node.children[len(parent.node.value)] = node
            parent.node.value.append(node.value)

    def _count(self, event: yaml.Event, nodes: int, characters: int) -> None:
        self.nodes += nodes
        self.characters += characters
        if self.nodes > MAX_NODES or self.characters > MAX_CHARACTERS:
            raise self._error(
                event,
                f"found more than {MAX_NODES:,} values or {MAX_CHARACTERS:,} characters with "
                "aliases expanded, expected a document that a person wrote",
            )

    def _check_depth(self, event: yaml.Event, height: int) -> None:
        if len(self.open) + height > MAX_DEPTH:
            raise self._error(event, f"found more than {MAX_DEPTH} levels, expected a document that a person wrote")

    def _check_tag(self, event: yaml.Event, allowed: set[str]) -> None:
        tag = getattr(event, "tag", None)
        if tag and tag not in allowed:
            name = tag.replace("tag:yaml.org,2002:", "!!")
            raise self._error(event, f"found the tag {shorten(name, 60)!r}, expected plain YAML without tags")

    def _check_continuation(self, first: int, last: int) -> None:
        """Text on several lines must not swallow a line that its author indented with a tab. Lines count from 0."""
        lines = self.text.splitlines()
        for number in range(first, min(last + 1, len(lines))):
            if tab := _tab(lines[number]):
                raise BadInput(
                    printable(f"{self.path}:{number + 1}:{tab[1]}: found a tab in the indentation, expected spaces")
                )

    def _syntax(self, error: yaml.YAMLError) -> BadInput:
        """The sentence for what the parser could not read."""
        mark = getattr(error, "problem_mark", None)
        problem = str(getattr(error, "problem", None) or error)
        if mark is None:
            return self._error(None, f"found {problem}, expected YAML")
        lines = self.text.splitlines()
        near = lines[mark.line] if mark.line < len(lines) else ""
        if (tab := _tab(near)) and mark.column <= tab[0]:
            return BadInput(
                printable(f"{self.path}:{mark.line + 1}:{tab[1]}: found a tab in the indentation, expected spaces")
            )
        hint = next((text for start, text in _HINTS.items() if problem.startswith(start)), "")
        begun = getattr(error, "context_mark", None)
        since = (
            f"; what is wrong may begin at {begun.line + 1}:{begun.column + 1}"
            if (begun is not None and begun.line != mark.line)
            else ""
        )
        message = (hint or f"{problem}: expected YAML") + since
        return BadInput(printable(f"{self.path}:{mark.line + 1}:{mark.column + 1}: {message}"))

    def _error(self, event: yaml.Event | None, message: str) -> BadInput:
        line, column = _mark(event) if event is not None else (1, 1)
        return BadInput(printable(f"{self.path}:{line}:{column}: {message}"))


def _mark(event: yaml.Event) -> tuple[int, int]:
    mark = event.start_mark
    assert mark is not None
    return mark.line + 1, mark.column + 1


def _tab(line: str) -> tuple[int, int] | None:
    """Width of the indentation and column, from 1, of the first tab in it; None where there is no tab."""
    indent = line[: len(line) - len(line.lstrip(" \t"))]
    return (len(indent), indent.index("\t") + 1) if "\t" in indent and line.strip() else None


def _copied(node: Node) -> Node:
    children = {key: _copied(child) for key, child in node.children.items()}
    return replace(node, value=value_of(node.value, children), children=children)


def value_of(like: Plain, children: dict[Key, Node]) -> Plain:
    """The data of `children`, as the kind of value that `like` is."""
    if isinstance(like, list):
        return [child.value for child in children.values()]
    if isinstance(like, dict):
        return {str(key): child.value for key, child in children.items()}
    return like
