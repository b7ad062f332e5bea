"""A stage in a process of its own, or in several that accelerate starts.

The parent stays without torch, so that every byte of a device's memory is free again when a stage ends. It hands over a
small file, shows the progress that comes back through another, passes signals on, and repeats the error of the process
that failed first. Training stages run in as many processes as the profile says, all others in one. Left out: starting
other machines; there each runs the same command under its own launcher.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cai.errors import BadInput, CaiError, GateFailed, StageFailed
from cai.files import read_json, write_json
from cai.profile import Profile
from cai.progress import FileLine, StageLine, relay

FOLDER = "process"
"""In the stage's folder: what parent and children tell each other, and their log."""
GRACE = 30.0
"""Seconds that children have after SIGTERM."""


@dataclass(frozen=True)
class Spec:
    """All that a child needs to find the same stage again."""

    recipe: str
    overrides: list[str]
    run: str
    stage: str
    folder: str
    profile: dict[str, Any]
    report_to: list[str]
    parent: int


def launch(spec: Spec, profile: Profile, line: StageLine, training: bool) -> dict[str, Any]:
    """Runs the stage and returns what rank 0 returned. Raises the failing process's error."""
    folder = Path(spec.folder) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    write_json(folder / "spec.json", asdict(spec))
    command = [sys.executable, "-m", "cai.launch", str(folder / "spec.json")]
    if training and profile.accelerate is not None:
        command[1:3] = [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(profile.accelerate),
            "--num_processes",
            str(profile.processes),
            "--module",
            "cai.launch",
        ]
    with (folder / "log.txt").open("wb") as log:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            _follow(child, folder / "progress.jsonl", line)
        except BaseException:
            _stop(child)
            raise
    if child.returncode:
        raise _first_error(folder, spec.stage, child.returncode)
    figures = read_json(folder / "figures.json")
    if not isinstance(figures, dict):
        raise StageFailed(f"stage {spec.stage!r} ended without a result; see {folder / 'log.txt'}")
    return figures


def _follow(child: subprocess.Popen[bytes], path: Path, line: StageLine) -> None:
    """Shows progress until the child has ended."""
    offset = 0
    while True:
        ended = child.poll() is not None
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                for event in file:
                    if not event.endswith(b"\n"):
                        break
                    offset += len(event)
                    relay(json.loads(event), line)
        if ended:
            return
        time.sleep(0.1)


def _stop(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _first_error(folder: Path, stage: str, code: int) -> CaiError:
    """The error of the process that failed first; others often fail only because it did."""
    errors = [read_json(path) for path in folder.glob("error-*.json")]
    if errors:
        first = min(errors, key=lambda error: error["time"])
        kinds = {kind.exit_code: kind for kind in (BadInput, GateFailed)}
        return kinds.get(first["exit_code"], StageFailed)(first["message"])
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    return StageFailed(f"stage {stage!r} ended with {ended}; see {folder / 'log.txt'}")


def main(path: str) -> int:
    """One process of a stage."""
    spec = Spec(**json.loads(Path(path).read_text(encoding="utf-8")))
    folder = Path(path).parent
    rank = int(os.environ.get("RANK", "0"))
    threading.Thread(target=_end_with, args=(spec.parent,), daemon=True).start()
    try:
        figures = _run(spec, folder, rank)
    except Exception as error:
        traceback.print_exc()
        known = isinstance(error, CaiError)
        message = (
            str(error)
            if known
            else (f"stage {spec.stage!r}, process {rank}: {type(error).__name__}: {error}; see {folder / 'log.txt'}")
        )
        code = error.exit_code if isinstance(error, CaiError) else StageFailed.exit_code
        write_json(folder / f"error-{rank}.json", {"time": time.time(), "message": message, "exit_code": code})
        return code
    if rank == 0:
        write_json(folder / "figures.json", figures)
    return 0


def _run(spec: Spec, folder: Path, rank: int) -> dict[str, Any]:
    from cai import pipeline
    from cai.recipe import load_recipe

    profile = Profile.model_validate(spec.profile)
    recipe = load_recipe(spec.recipe, spec.overrides)
    line = FileLine(spec.stage, folder / "progress.jsonl") if rank == 0 else StageLine(spec.stage)
    return pipeline.run_stage_in_child(
        recipe, profile, Path(spec.run), spec.stage, Path(spec.folder), line, tuple(spec.report_to)
    )


def _end_with(parent: int) -> None:
    """Ends this process when `cai run` is gone: nobody would take its result."""
    while True:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(StageFailed.exit_code)
        except PermissionError:
            return
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
