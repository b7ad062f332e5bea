"""Files that are either whole and on the disk or not there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

REMOVED = ".removed"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when it is complete; an error leaves the old one."""
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    os.replace(new, path)


def write_json(path: Path, value: object) -> None:
    """`value` as JSON that a person can read, in place of what was at `path`."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote; None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_tree(path: Path) -> None:
    """Returns when everything in a folder and below it is on the disk, whoever wrote it."""
    for folder, _, names in os.walk(path):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))


def remove(path: Path) -> None:
    """Removes a folder, if it is there, so that a kill leaves it whole or gone, never in part under its name.

    What a kill leaves is called `*.removed` and goes with the next call.
    """
    rest = path.with_name(path.name + REMOVED)
    shutil.rmtree(rest, ignore_errors=True)
    if path.exists():
        path.rename(rest)
        sync_folder(path.parent)
        shutil.rmtree(rest)


def sync_folder(path: Path) -> None:
    """Returns when the names of the files in a folder are on the disk, where the system can tell."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
