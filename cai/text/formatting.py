"""Values and texts of users in messages: described in a few plain words, on one line, safe to print."""

from __future__ import annotations

import re
import textwrap

WIDTH = 100
"""Columns that reports on a terminal fit."""

Key = str | int
"""One step into a document: a mapping's key or a list's index, from 0."""

# Control characters, line separators and marks of text direction can steer a terminal or hide text.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def dotted(keys: tuple[Key, ...]) -> str:
    """`principles[3].weight` for `("principles", 3, "weight")`."""
    steps = [f"[{key}]" if isinstance(key, int) else f".{shorten(key, 60)}" for key in keys]
    return "".join(steps).removeprefix(".")


def describe(value: object) -> str:
    """A value in a few plain words: `the number 3`, `a list of 4`, `nothing`."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {shorten(repr(value), 30)}"
    if isinstance(value, str):
        return f"the text {shorten(repr(value), 50)}" if value else "an empty text"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        names = shorten(", ".join(map(str, value)), 50)
        return f"a mapping with {names}" if value else "an empty mapping"
    return f"a {type(value).__name__}"


def shorten(text: str, limit: int) -> str:
    """`text` in at most `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    """`text` on one line, without characters that could steer a terminal or hide text."""
    return _UNPRINTABLE.sub(lambda match: " " if match.group() in "\n\t" else "\N{REPLACEMENT CHARACTER}", text)


def wrapped(text: str, indent: str = "") -> list[str]:
    """`text`, safe to print, in lines of at most `WIDTH` characters; those after the first begin with `indent`."""
    return textwrap.wrap(printable(text), WIDTH, subsequent_indent=indent, break_on_hyphens=False)
