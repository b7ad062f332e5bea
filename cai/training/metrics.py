"""`metrics.jsonl` of a training stage: one object a logging step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cai.storage.files import replacing
from cai.storage.rows import row_lines

METRICS = "metrics.jsonl"
NON_METRIC_SUFFIXES = ("_runtime", "_per_second", "num_tokens")
"""Ends of logged names that differ from run to run, or that a resumed run counts from zero."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """One object a logging step."""
    return _complete_rows(folder / METRICS)


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites the file, or makes it, with the rows that `keep` accepts; a resumed run writes the others again."""
    rows = [row for row in _complete_rows(path) if keep(row)]
    with replacing(path) as file:
        file.write("".join(row_lines(rows)).encode())


def _complete_rows(path: Path) -> list[dict[str, Any]]:
    """The objects in a file, one a line, without a last line that a kill cut short."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
