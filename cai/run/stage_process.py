"""One process of a stage that `cai.run.launch` started: `python -m cai.run.stage_process SPEC`.

It reads the spec that the parent wrote, runs its share of the stage, reports progress and errors through files in the
stage's folder, and ends when the parent ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cai.contracts.profile import Profile
from cai.contracts.training_config import TrainingConfig
from cai.run.plan import Planner
from cai.run.recipe import Recipe, load_recipe
from cai.run.recipe_names import needs
from cai.run.stage_run import StageRun, prepare
from cai.storage import run_folder
from cai.storage.files import write_json
from cai.storage.journal import Journal, ShareDone
from cai.storage.refusals import refused_output
from cai.text.errors import CaiError, StageFailed, Terminated
from cai.text.progress import FileLine, StageLine, warnings_copied_to

NODE = "--node"
"""First argument of the process that starts a machine's ranks, where a profile has several machines."""
RENDEZVOUS = "rendezvous"
"""File in the process folder through which forked ranks that train find each other."""
ALIVE = "alive"
"""File that the parent rewrites every few seconds, for children on other machines, which cannot see its process."""
SILENCE = 120.0
"""Seconds without a change of that file after which such a child ends."""
MODULE = "cai.run.stage_process"
"""This module, as `python -m` takes it."""


@dataclass(frozen=True)
class Spec:
    """What a child needs to find the same stage again."""

    recipe: str
    overrides: list[str]
    run: str
    stage: str
    folder: str
    profile: dict[str, Any]
    report_to: list[str]
    parent: int
    host: str = field(default_factory=socket.gethostname)
    port: int = 0
    """Port on which the first machine waits for the others."""


def accelerate_command(profile: Profile, spec: str, *address: str) -> list[str]:
    """accelerate's launcher for this machine's processes."""
    shape = ["--config_file", str(profile.accelerate), "--num_processes", str(profile.processes), *address]
    return [sys.executable, "-m", "accelerate.commands.launch", *shape, "--module", MODULE, spec]


def main(path: str) -> int:
    """One process of a stage."""
    spec = Spec(**json.loads(Path(path).read_text(encoding="utf-8")))
    folder = Path(path).parent
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    parent = spec.parent if spec.host == socket.gethostname() else folder / ALIVE
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        figures = _run(spec, folder, rank, ranks)
    except (ShareDone, Terminated):  # with any other code a launcher would end the ranks that still write
        return 0
    except Exception as error:
        traceback.print_exc()
        message, code, name = str(error), StageFailed.exit_code, type(error).__name__
        if isinstance(error, CaiError):
            code = error.exit_code
        elif refused := refused_output(error, Path(spec.folder)):
            message = str(refused)
        else:
            message = f"stage {spec.stage!r}, process {rank}: {name}: {error}; see {folder / 'log.txt'}"
        with contextlib.suppress(OSError):  # on a full disk the parent says why
            write_json(folder / f"error-{rank}.json", {"time": time.time(), "kind": name, "message": message})
        return code
    if rank == 0:
        write_json(folder / "figures.json", figures)
    return 0


def _run(spec: Spec, folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    profile = Profile.model_validate(spec.profile)
    recipe = load_recipe(spec.recipe, spec.overrides, Path(spec.run).parent)
    trains = isinstance(recipe.stages[spec.stage], TrainingConfig)
    if trains and ranks != profile.processes:
        raise StageFailed(
            f"stage {spec.stage!r} runs in {ranks} of the {profile.processes} processes that profile "
            f"{profile.name!r} expects: accelerate started no more with {profile.accelerate}"
        )
    if trains and profile.fork and ranks > 1:
        _join_process_group(folder / RENDEZVOUS, rank, ranks)
    line = FileLine(spec.stage, folder / "progress.jsonl") if rank == 0 else StageLine(spec.stage)
    prepare(profile)
    stage = _stage_run(spec, recipe, profile)
    with warnings_copied_to(line.record_warning):
        return stage.work(line, Journal(stage.folder, line, rank, ranks, profile.items_in_flight))


def _stage_run(spec: Spec, recipe: Recipe, profile: Profile) -> StageRun:
    """The stage on the outputs that stand in latest.json; StageFailed where it is not what the parent meant."""
    planner = Planner(recipe, Path(spec.run), profile.offline)
    config = recipe.stages[spec.stage]
    latest = run_folder.latest(planner.run)
    done = {
        name: finished for name in needs(config, set(recipe.stages)) if (finished := run_folder.finished(latest[name]))
    }
    step = planner.step(config, done)
    if step.folder is None or step.folder.name != Path(spec.folder).name:
        raise StageFailed(
            f"stage {spec.stage!r}: the recipe, or what it reads, changed while it was running; run it again"
        )
    return StageRun(planner, step, done, profile, tuple(spec.report_to))


def _join_process_group(place: Path, rank: int, ranks: int) -> None:
    """Connects forked processes that train together; accelerate uses a process group that exists already."""
    from torch.distributed import FileStore, init_process_group  # type: ignore[attr-defined]

    store = FileStore(str(place), ranks)  # a file, since another program may take a port
    init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def _end_with(parent: int | Path) -> None:
    """Ends this process when `cai run` has ended: `parent` is its process id, or the file that it rewrites."""
    last_change, last_word = time.monotonic(), ""
    while True:
        if isinstance(parent, int):
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                os._exit(StageFailed.exit_code)
            except PermissionError:
                return
        else:
            with contextlib.suppress(OSError):  # a shared file system may be unavailable for a while
                if (word := parent.read_text()) != last_word:
                    last_change, last_word = time.monotonic(), word
            if time.monotonic() - last_change > SILENCE:
                os._exit(StageFailed.exit_code)
        time.sleep(1)


def start_node(path: str) -> None:
    """Becomes accelerate's launcher for this machine's ranks."""
    spec = Spec(**json.loads(Path(path).read_text(encoding="utf-8")))
    profile = Profile.model_validate(spec.profile)
    node = os.environ.get("CAI_NODE") or os.environ.get("SLURM_NODEID")
    if node is None:
        raise StageFailed("found neither CAI_NODE nor SLURM_NODEID, expected the profile's `launcher` to set one")
    address = ["--num_machines", str(profile.nodes), "--machine_rank", node,
             "--main_process_ip", profile.address or spec.host, "--main_process_port", str(spec.port)]  # fmt: skip
    command = accelerate_command(profile, path, *address)
    os.execv(command[0], command)


if __name__ == "__main__":
    if sys.argv[1] == NODE:
        start_node(sys.argv[2])
    sys.exit(main(sys.argv[1]))
