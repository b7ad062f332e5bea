"""The runs of a folder: what each is, how far it is, what it takes of the disk, when it was last worked on."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypedDict

from cai.run.status import process_in_words, stage_statuses
from cai.storage import run_folder
from cai.storage.files import remove_folder
from cai.storage.stage_folders import disk_bytes, last_change, recipe_in_words
from cai.text.errors import BadInput
from cai.text.tables import table

RunState = Literal["running", "done", "stale", "unfinished", "not begun", "unreadable"]


class ListedRun(TypedDict):
    """One run. Its state is that of its stages: stale where one is, else unfinished where one is not done.

    not begun: it ended before its first stage. unreadable: a file of it is damaged.
    """

    name: str
    folder: str
    recipe: str | None
    """The recipe's file, or the name of a shipped one; `cai compare` for a comparison."""
    state: RunState
    process: int | None
    """Id of the process that works on the run."""
    stages_done: int
    """Stages that are done and not stale."""
    n_stages: int
    bytes: int
    worked_on: str
    """When a file of it was last written, in UTC."""


def list_runs(runs: Path) -> list[ListedRun]:
    """The runs in a folder, that which was last worked on first; also those that ended before their first stage."""
    folders = [path for path in runs.iterdir() if path.is_dir() and run_folder.is_run(path)] if runs.is_dir() else []
    return sorted(map(_listed_run, sorted(folders)), key=lambda listed: listed["worked_on"], reverse=True)


def run_lines(listed_runs: Sequence[ListedRun]) -> list[str]:
    """The runs as a table."""
    rows = []
    for listed in listed_runs:
        state: str = listed["state"]
        if listed["state"] == "running":
            state = f"running, process {listed['process'] or '?'}"
        done = f"{listed['stages_done']} of {listed['n_stages']}" if listed["n_stages"] else "-"
        worked_on = datetime.fromisoformat(listed["worked_on"]).astimezone().strftime("%Y-%m-%d %H:%M")
        size = f"{listed['bytes'] / 1e6:,.1f} MB"
        rows.append([listed["name"], listed["recipe"] or "-", state, done, size, worked_on])
    return table(["run", "recipe", "state", "stages done", "disk", "last worked on"], rows)


def find_run_to_delete(name: str, runs: Path) -> Path:
    """The folder of a run. Raises BadInput where there is none, or a process works on it."""
    folder = run_folder.find_run(name, runs, begun=False)
    if holder := run_folder.lock_holder(folder):
        raise BadInput(f"{folder}: {process_in_words(holder)} is working on this run; wait for it to end or stop it")
    return folder


def delete_run(folder: Path) -> None:
    """Removes a run. Raises BadInput where a process works on it."""
    with run_folder.locked(folder):
        remove_folder(folder.resolve())
        if folder.is_symlink():
            folder.unlink()


def _listed_run(folder: Path) -> ListedRun:
    holder = run_folder.lock_holder(folder)
    state: RunState = "not begun"
    recipe, n_done, n_stages = None, 0, 0
    try:
        recipe = recipe_in_words(folder)
        if (folder / run_folder.RUN).is_file():
            states = [stage["status"] for stage in stage_statuses(folder, holder)]
            n_done, n_stages = states.count("done"), len(states)
            state = "stale" if "stale" in states else "done" if n_done == n_stages else "unfinished"
    except (ValueError, KeyError, TypeError, OSError):  # not of cai, damaged, or removed a moment ago
        state = "unreadable"
    return {
        "name": folder.name,
        "folder": str(folder),
        "recipe": recipe,
        "state": "running" if holder else state,
        "process": holder and holder.process,
        "stages_done": n_done,
        "n_stages": n_stages,
        "bytes": disk_bytes(folder),
        "worked_on": datetime.fromtimestamp(last_change(folder), UTC).isoformat(timespec="seconds"),
    }
