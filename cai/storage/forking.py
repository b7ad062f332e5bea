"""Copies a run under another name without computing or copying what is done: both share the files of finished stages.

Files of a finished stage are only ever replaced or removed as a whole, never changed, so that a hard link is as good as
a copy. Where the file system has no hard links, files are copied.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cai.storage import run_folder
from cai.storage.files import read_json, write_json
from cai.text.errors import BadInput


def fork(run: Path, new: Path) -> list[str]:
    """The stages that `new` shares with `run`: those that are done and stand there now. Raises BadInput where `new`
    is there already."""
    if new.exists():
        raise BadInput(f"{new}: found a folder, expected a name that no run has")
    with run_folder.locked(run):
        shared = {stage: folder for stage, folder in run_folder.latest(run).items() if run_folder.finished(folder)}
        for folder in shared.values():
            shutil.copytree(folder, new / folder.name, copy_function=_link, symlinks=True)
        facts = read_json(run / run_folder.RUN)
        overrides = [text for text in facts["overrides"] if not text.startswith("name=")]
        write_json(new / run_folder.LATEST, {stage: folder.name for stage, folder in shared.items()})
        write_json(new / run_folder.RUN, {**facts, "name": new.name, "overrides": [*overrides, f"name={new.name}"]})
    return list(shared)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
