"""`--set a.b.c=value`: one value of a document changed on the command line, and errors that point there."""

from __future__ import annotations

import re
from pathlib import Path

from cai.document import Document, Node, parse_document, scalar
from cai.text.errors import BadInput, nearest
from cai.text.formatting import Key, printable


def override_value(document: Document, override: str) -> Document:
    """The document with `a.b.c=value` set. Stages are named by their id; the value is read as YAML."""
    source = f"--set {override}"
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise BadInput(printable(f"{source}: expected key=value, as in --set stages.policy.train.beta=0.2"))
    keys: tuple[Key, ...] = ()
    for step in path.split("."):
        node = document.node(keys) if keys else document.root
        keys = (*keys, _step(node, step, keys, source))
    value = text and text[0] in "[{\"'" and parse_document(f"value: {text}", Path(source)).value["value"]
    return document.with_value(keys, value or scalar(text), source)


def _step(node: Node, step: str, keys: tuple[Key, ...], source: str) -> Key:
    """One step of an override's path into `node`: a mapping's key, a list's index, or a stage's id."""
    if not isinstance(node.value, list):
        return step
    if keys == ("stages",):
        ids = [each.get("id") if isinstance(each, dict) else None for each in node.value]
        if step in ids:
            return ids.index(step)
        known = [each for each in ids if isinstance(each, str)]
        raise BadInput(
            printable(f"{source}: no stage {step!r}, expected one of {', '.join(known)}" + nearest(step, known))
        )
    if not re.fullmatch(r"[0-9]{1,6}", step) or int(step) >= len(node.value):
        raise BadInput(printable(f"{source}: found {step!r}, expected an index below {len(node.value)}"))
    return int(step)
