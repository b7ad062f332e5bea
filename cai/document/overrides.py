"""`--set a.b.c=value`: one value of a document changed on the command line, and errors that point there."""

from __future__ import annotations

import re
from pathlib import Path

from cai.document import Document, Node, parse_document, resolve_scalar
from cai.text.errors import BadInput, did_you_mean
from cai.text.formatting import Key, printable


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
