"""Reads the words and sentences that the world is made of: JSON files beside the modules that use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_word_lists(path: Path) -> dict[str, Any]:
    """The object in a JSON file, every list in it as a tuple."""
    word_lists: dict[str, Any] = _with_tuples(json.loads(path.read_text(encoding="utf-8")))
    return word_lists


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
