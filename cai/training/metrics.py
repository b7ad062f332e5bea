"""`metrics.jsonl` of a training stage: one object a logging step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cai.storage.files import replacing
from cai.storage.rows import row_lines

METRICS = "metrics.jsonl"
_NOT_METRICS = ("_runtime", "_per_second", "num_tokens")
"""Ends of logged names that differ from run to run, or that a resumed run counts anew."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """One object a logging step."""
    return _whole_rows(folder / METRICS)


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Takes those lines out of a file that a resumed run writes again. Without the file, an empty one is made."""
    rows = [row for row in _whole_rows(path) if keep(row)]
    with replacing(path) as file:
        file.write("".join(row_lines(rows)).encode())


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """The objects in a file, one a line, but for a line that a kill cut short."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
