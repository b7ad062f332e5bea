"""Files and folders that are, after a kill at any time, complete on the disk or absent."""

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
    """A file that replaces `path` when the block ends; an error in the block leaves the old file."""
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
    """Writes `value` to `path` as JSON that a person can read."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """The value in a file that `write_json` wrote; None where the file does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_cache(name: str) -> Path:
    """The folder of that name for what can be computed or downloaded again, of the user who runs this process."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cai" / name


def sync_tree(path: Path) -> None:
    """Flushes all files and folders below `path` to the disk, whichever process wrote them."""
    for folder, _, names in os.walk(path):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))


def remove_folder(path: Path) -> None:
    """Removes a folder, if it exists; a kill at any time leaves it complete or gone.

    The folder is first renamed to `*.removed`. The next call removes such a folder that a kill has left.
    """
    renamed = path.with_name(path.name + REMOVED)
    shutil.rmtree(renamed, ignore_errors=True)
    if path.exists():
        path.rename(renamed)
        sync_folder(path.parent)
        shutil.rmtree(renamed)


def sync_folder(path: Path) -> None:
    """Flushes the names of the files in a folder to the disk, where the system supports it."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
