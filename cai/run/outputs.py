"""Whether a finished stage's folder still holds what `DONE` says: size and time first, the digest where they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cai.contracts.model import Model
from cai.models.reference import cached_file_digest, identity
from cai.storage.journal import RECORDS, journal_paths
from cai.storage.rows import stable_id
from cai.storage.run_folder import DONE, MODEL, PROCESS, Finished, Outputs, OutputState


def outputs_of(folder: Path, figures: Mapping[str, Any], offline: bool = True) -> Outputs:
    """What a stage has left: the state of every file, and the digest of what later stages read, which is the records
    and the model, or the figures where there is neither."""
    parts: list[object] = []
    if (folder / RECORDS).is_file():
        parts.append(cached_file_digest(folder / RECORDS))
    if (folder / MODEL).is_dir():
        parts.append(identity(Model(MODEL, str((folder / MODEL).resolve())), offline=offline))
    files = {str(path.relative_to(folder)): _state(path) for path in _files(folder)}
    return Outputs(stable_id(*(parts or [figures])), files)


def changed_outputs(finished: Finished) -> list[str]:
    """The files of a finished stage that are missing, cut or edited, in words."""
    changed = []
    for name, state in finished.outputs.files.items():
        path = finished.folder / name
        if not path.is_file():
            changed.append(f"{name} is missing")
            continue
        stat = path.stat()
        if stat.st_size != state.size or (
            stat.st_mtime_ns != state.mtime_ns and cached_file_digest(path) != state.digest
        ):
            changed.append(f"{name} was changed")
    return changed


def _files(folder: Path) -> Iterator[Path]:
    """What belongs to a stage's outputs: not `DONE`, the journal, or what its processes told each other."""
    passed_over = {folder / DONE, *journal_paths(folder)}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in passed_over and path.relative_to(folder).parts[0] != PROCESS:
            yield path


def _state(path: Path) -> OutputState:
    stat = path.stat()
    return OutputState(stat.st_size, stat.st_mtime_ns, cached_file_digest(path))
