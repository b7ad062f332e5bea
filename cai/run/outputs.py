"""Whether a finished stage's outputs are what later stages read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cai.contracts.model import Model
from cai.models.reference import identity
from cai.storage.files import file_digest
from cai.storage.journal import RECORDS
from cai.storage.rows import stable_id
from cai.storage.run_folder import MODEL


def output_digest(folder: Path, figures: Mapping[str, Any], offline: bool = True) -> str:
    """Digest of what later stages read: the records and the model, or the figures where there is neither."""
    parts: list[object] = []
    if (folder / RECORDS).is_file():
        parts.append(file_digest(folder / RECORDS))
    if (folder / MODEL).is_dir():
        parts.append(identity(Model(MODEL, str((folder / MODEL).resolve())), offline=offline))
    return stable_id(*(parts or [figures]))
