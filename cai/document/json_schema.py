"""JSON Schemas for editors, which complete keys and check values while a document is written.

A schema says which keys and values there are. What a document means as a whole (names of stages, files that exist, ids
that occur twice) is checked when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCHEMA = "schema.json"
"""Name of the schema's file, which lies beside the documents that it is for."""


def editor_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema that pydantic has made, without what is noise in an editor."""
    return {"$schema": DIALECT, **_tidy(schema)}


def _tidy(part: Any) -> Any:
    """`part` without generated titles, empty defaults and the null of absent keys, which are noise in an editor."""
    if isinstance(part, list):
        return [_tidy(item) for item in part]
    if not isinstance(part, Mapping):
        return part
    tidy = {key: _tidy(value) for key, value in part.items() if key != "title" or isinstance(value, dict)}
    if tidy.get("default", 0) in ("", None, []):
        del tidy["default"]
    if "anyOf" in tidy:
        types = [type_ for type_ in tidy["anyOf"] if type_ != {"type": "null"}]
        tidy = {**tidy, "anyOf": types} if len(types) > 1 else {**tidy, **types[0]}
        if len(types) == 1:
            del tidy["anyOf"]
    return tidy
