"""What a run leaves on disk, and how to read it back.

    runs/<recipe>/
        run.json         the recipe's file, overrides, profile, stages in order, and later stages with other settings
        latest.json      stage id to the folder that stands for it now
        summary.json     every stage's figures, seconds and failures
        run.log          lines of progress, warnings and errors of all its runs, with times
        <stage id>-<fingerprint>/
            stage.json   resolved config, inputs, versions, times, figures
            records.jsonl, failures.jsonl | model/ | metrics.jsonl
            DONE         written last: the digest of the outputs

A stage's folder counts only with its DONE. One process works on a run at a time; the lock belongs to the process and
goes with it, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cai.storage.files import read_json, sync_folder, sync_tree, write_json
from cai.storage.journal import FAILURES
from cai.text.errors import BadInput, did_you_mean

DONE = "DONE"
STAGE = "stage.json"
LATEST = "latest.json"
SUMMARY = "summary.json"
RUN = "run.json"
MODEL = "model"
PROCESS = "process"
"""In a stage's folder: what parent and child processes tell each other, and their log."""
TRIED = "tried"
"""In a run's folder: stages that `cai votes try` has made, which no recipe stands on yet."""
LOCK = ".lock"
RECIPE = "recipe.yaml"
"""The recipe that `cai compare` writes into the folder of its run."""
LOCK_WAIT = 0.2
"""Seconds after which a lock that is held is tried once more: `lock_holder` holds it for a moment."""
LOG = "run.log"


class OutputState(NamedTuple):
    """One file that a stage left: bytes, time of its last change, SHA-256."""

    size: int
    mtime_ns: int
    digest: str


class Outputs(NamedTuple):
    """What a stage left: the digest of what later stages read, and every file by its path in the stage's folder."""

    digest: str
    files: Mapping[str, OutputState]


@dataclass(frozen=True)
class Finished:
    """A stage that is done: where, and what it left."""

    folder: Path
    outputs: Outputs

    @property
    def digest(self) -> str:
        """The digest of what later stages read."""
        return self.outputs.digest

    @property
    def facts(self) -> dict[str, Any]:
        """Its stage.json."""
        return read_json(self.folder / STAGE) or {}

    @property
    def model(self) -> Path:
        """Where the model of a training stage lies."""
        return self.folder / MODEL


def finished(folder: Path) -> Finished | None:
    """The finished stage in `folder`, or None where it is not done."""
    try:
        done = read_json(folder / DONE)
    except ValueError:  # an earlier version's
        return None
    if not isinstance(done, dict):
        return None
    files = {name: OutputState(*state) for name, state in done["files"].items()}
    return Finished(folder, Outputs(done["digest"], files))


def mark_done(folder: Path, outputs: Outputs) -> Finished:
    """Writes DONE, after everything else in the folder is on the disk."""
    sync_tree(folder)
    write_json(folder / DONE, outputs._asdict())
    sync_folder(folder)
    return Finished(folder, outputs)


def latest(run: Path) -> dict[str, Path]:
    """Stage id to the folder that stands for it now."""
    return {stage: run / name for stage, name in (read_json(run / LATEST) or {}).items()}


def set_latest(run: Path, stage: str, folder: Path) -> None:
    """Makes `folder` the one that stands for a stage."""
    names = read_json(run / LATEST) or {}
    if names.get(stage) != folder.name:
        write_json(run / LATEST, {**names, stage: folder.name})


def n_failures(folder: Path) -> int:
    """Items of a stage that have no result."""
    path = folder / FAILURES
    if not path.exists():
        return 0
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keeps other processes off a run. Raises BadInput, naming the other process, where one works on it."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK).open("a+", encoding="utf-8") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(LOCK_WAIT)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            process = f"process {file.read().strip() or '?'}"
            raise BadInput(f"{run}: {process} is working on this run; wait for it to end or stop it") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class LockHolder(NamedTuple):
    """A live process that works on a run."""

    process: int | None
    """Its id; None where it has not written it yet."""
    since: float
    """When it began, in seconds since the epoch."""


def lock_holder(run: Path) -> LockHolder | None:
    """The process that works on a run now, by the lock, which ends with its process; None without one."""
    try:
        with (run / LOCK).open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                number = file.read().strip()
                return LockHolder(int(number) if number.isdecimal() else None, os.fstat(file.fileno()).st_mtime)
    except OSError:  # no lock: nobody has begun with this run, or it was removed a moment ago
        pass
    return None


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run, also of one that ended before it wrote run.json."""
    if any((path / name).is_file() for name in (RUN, LATEST, LOCK)):
        return True
    return is_comparison(path)


def is_comparison(path: Path) -> bool:
    """Whether a folder is that of a run of `cai compare`, whose recipe lies in it and begins with the run's name."""
    with contextlib.suppress(OSError), (path / RECIPE).open("rb") as recipe:
        return recipe.readline().strip() == f"name: {path.name}".encode()
    return False


def find_run(name: str | None, runs: Path, *, begun: bool = True) -> Path:
    """The run of that name or path; the newest in `runs` where none is named.

    Raises BadInput where there is none and, with `begun`, for a run that ended before its first stage.
    """
    by_age = sorted((path.parent for path in runs.glob(f"*/{RUN}")), key=lambda path: (path / RUN).stat().st_mtime)
    if name is None:
        if not by_age:
            raise BadInput(f"{runs}: no runs here; start one with `cai run quickstart`")
        return by_age[-1]
    for path in (Path(name), runs / name):
        if (path / RUN).is_file():
            return path
    for path in (Path(name), runs / name):
        if path.resolve().parent == runs.resolve() and is_run(path):  # elsewhere its files may be of another program
            if begun:
                raise BadInput(f"{path}: it ended before its first stage; `cai runs delete {path.name}` removes it")
            return path
    names = [path.name for path in by_age]
    expected = ", ".join(names) or "one that `cai run` made"
    raise BadInput(f"no run {name!r} in {runs}, expected {expected}{did_you_mean(name, names)}")
