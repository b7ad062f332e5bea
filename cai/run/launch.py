"""A stage in a process of its own, or in several.

The parent stays without torch, so that every byte of a device's memory is free again when a stage ends. It hands over a
small file, shows the progress that comes back through another, passes signals on (`cai.storage.stopping`), and repeats
the error of the process that failed first; the others are stopped then, also where they wait for it.

Training stages run in as many processes as the profile says, which accelerate starts and connects. On several machines
the profile's `launcher` starts accelerate on each, and what parent and children tell each other goes through the
stage's folder, which all machines must see under the same path. Feedback stages run in as many as one machine has,
started here: they need nothing of each other but the stage's folder (`cai.storage.journal`), and accelerate's launcher
would add seconds to each stage. All others run in one.

Where a profile for a CPU says `fork`, every stage's processes are forked from one that has imported the libraries and
done nothing else, so that no stage after the first waits for imports. Those that train find each other by a file in the
stage's folder and talk over loopback, without accelerate's launcher.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Protocol

from cai.contracts.profile import Profile
from cai.contracts.stage_config import FeedbackConfig, StageConfig
from cai.contracts.training_config import TrainingConfig
from cai.storage import stopping
from cai.storage.files import read_json, write_json
from cai.storage.journal import Journal, ShareDone
from cai.text.errors import BadInput, CaiError, GateFailed, StageFailed, Terminated
from cai.text.progress import FileLine, StageLine, relay

NODE = "--node"
FOLDER = "process"
"""In the stage's folder: what parent and children tell each other, and their log."""
MEETING = "meeting"
"""In that folder: the file by which forked processes that train together find each other."""
GRACE = 30.0
"""Seconds that children have after SIGTERM."""
ALIVE = "alive"
"""File that the parent writes every few seconds, for children on machines from which it cannot be seen."""
SILENCE = 120.0
"""Seconds without a new word in it after which such a child ends."""

LIBRARIES = (
    "cai.run.setsid",  # before all others: it keeps signals off
    "cai.training.loop", "cai.training.trainers", "cai.engines.local.decoding", "cai.engines.local.scoring",
    "cai.run.pipeline", "deepspeed",
)  # fmt: skip
"""What forked processes have imported before they begin, if it is installed: whatever is slow to import."""

_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""What says which of several processes one is: a stage's own are told here, whoever started `cai run`."""

_ROOT_CAUSE = re.compile(
    r"Root Cause \(first observed failure\):.*?rank +: (?P<rank>\d+).*?exitcode +: (?P<code>-?\d+)", re.S
)
"""Where accelerate's launcher says which of its processes ended first, and how."""


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
    host: str = field(default_factory=socket.gethostname)
    port: int = 0
    """Where the first process listens for those on other machines."""


def launch(spec: Spec, profile: Profile, line: StageLine, config: StageConfig) -> dict[str, Any]:
    """Runs the stage and returns what rank 0 returned.

    Raises the failing process's error, and Terminated where the stage stopped at a checkpoint as it was asked to.
    """
    folder = Path(spec.folder) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    if profile.nodes > 1:
        spec = replace(spec, port=_free_port())
    ranks = _ranks(profile, config)
    if profile.fork:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = profile.threads or max(1, cores // ranks)
        spec = replace(spec, profile=spec.profile | {"threads": threads})
    write_json(folder / "spec.json", asdict(spec))
    children: list[Child] = []
    with (folder / "log.txt").open("wb") as log:
        try:
            for command, environment in _commands(profile, config, str(folder / "spec.json"), ranks):
                env = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK} | environment
                if profile.fork:
                    child: Child = Fork(command[-1], env, folder / "log.txt")
                else:
                    child = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=env
                    )
                children.append(child)
            codes = _follow(children, folder, line)
        finally:
            _stop(children)
    if any(codes):
        raise _first_error(folder, spec.stage, codes)
    figures = read_json(folder / "figures.json")
    if not isinstance(figures, dict):
        stopping.check()
        raise StageFailed(f"stage {spec.stage!r} ended without a result; see {folder / 'log.txt'}")
    return figures


class Child(Protocol):
    """What is asked of a process that was started, in the words of `subprocess`."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code, the negative number of the signal that ended it, or None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Returns its exit code when it has ended. Raises TimeoutExpired after so many seconds."""


class Fork:
    """A child that begins with `LIBRARIES` imported. Their process is started for the first one and ends with us."""

    def __init__(self, spec: str, environment: dict[str, str], log: Path) -> None:
        begin_importing()
        self._process = multiprocessing.get_context("forkserver").Process(target=_forked, args=(spec, environment, log))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return code


def begin_importing() -> None:
    """Starts the process that children are forked from, if it is not there yet; does not wait for its imports."""
    forkserver.set_forkserver_preload([*LIBRARIES])
    forkserver.ensure_running()


def _forked(spec: str, environment: dict[str, str], log: Path) -> None:
    """A forked child: from here on as if `python -m cai.run.launch SPEC` had been started."""
    os.setsid()
    gc.freeze()  # else each collection goes through all that was imported, and copies its pages
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(main(spec))


def _ranks(profile: Profile, config: StageConfig) -> int:
    """In how many processes a stage runs here that accelerate does not start."""
    if isinstance(config, FeedbackConfig):  # a server, or vLLM over all GPUs, is asked by one process
        return profile.processes_here if profile.engine == "local" else 1
    return profile.processes if isinstance(config, TrainingConfig) and profile.fork else 1


def _commands(profile: Profile, config: StageConfig, spec: str, ranks: int) -> list[tuple[list[str], dict[str, str]]]:
    """What to start, each with what is added to its environment."""
    if isinstance(config, TrainingConfig) and profile.nodes > 1:
        return [([*profile.launcher, sys.executable, "-m", "cai.run.launch", NODE, spec], {})]
    if isinstance(config, TrainingConfig) and profile.accelerate is not None:
        return [(_accelerate(profile, spec), {})]
    command = [sys.executable, "-m", "cai.run.launch", spec]
    if ranks == 1:
        return [(command, {})]  # accelerate takes whoever has a LOCAL_RANK for one of several processes
    together = {"WORLD_SIZE": str(ranks)}
    if isinstance(config, TrainingConfig):
        together |= {"LOCAL_WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
        if sys.platform == "linux":
            together["GLOO_SOCKET_IFNAME"] = "lo"
    return [(command, {"RANK": str(rank), "LOCAL_RANK": str(rank), **together}) for rank in range(ranks)]


def _accelerate(profile: Profile, spec: str, *where: str) -> list[str]:
    """accelerate's launcher for this machine's processes."""
    shape = ["--config_file", str(profile.accelerate), "--num_processes", str(profile.processes), *where]
    return [sys.executable, "-m", "accelerate.commands.launch", *shape, "--module", "cai.run.launch", spec]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def _follow(children: list[Child], folder: Path, line: StageLine) -> list[int | None]:
    """Shows progress until all children have ended, or one has failed: their exit codes, None for one that goes on."""
    path = folder / "progress.jsonl"
    offset = 0
    told = -math.inf
    while True:
        if time.monotonic() - told > SILENCE / 12:
            told = time.monotonic()
            (folder / ALIVE).write_text(str(told))
        codes = [child.poll() for child in children]
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                for event in file:
                    if not event.endswith(b"\n"):
                        break
                    offset += len(event)
                    relay(json.loads(event), line)
        if any(codes) or None not in codes or _failed_long_ago(folder):
            time.sleep(0.1 if None in codes else 0)  # one that was killed may be known later than one that missed it
            return [child.poll() for child in children]
        time.sleep(0.1)


def _failed_long_ago(folder: Path) -> bool:
    """Whether a process has told its error and whoever started it still has not ended: it, or another, hangs."""
    told = [path.stat().st_mtime for path in folder.glob("error-*.json")]
    return bool(told) and time.time() - min(told) > GRACE / 2


def _stop(children: list[Child]) -> None:
    """Ends those that still run, all at once."""
    running = [child for child in children if child.poll() is None]
    for child in running:
        _signal(child, signal.SIGTERM)
    end = time.monotonic() + GRACE
    for child in running:
        try:
            child.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(child, signal.SIGKILL)
            child.wait()


def _signal(child: Child, number: int) -> None:
    """Sends a signal to a child and to all that it has started."""
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        with contextlib.suppress(ProcessLookupError):  # a fork that has only begun leads no group yet
            os.kill(child.pid, number)


def _first_error(folder: Path, stage: str, codes: list[int | None]) -> CaiError:
    """The error of the process that failed first; others often fail only because it did.

    One that was killed, for want of memory as a rule, leaves no error: those of others came of it.
    """
    errors = [read_json(path) for path in folder.glob("error-*.json")]
    killed = [rank for rank, code in enumerate(codes) if code == -signal.SIGKILL]
    if errors and not killed:
        first = min(errors, key=lambda error: error["time"])
        kinds = {kind.exit_code: kind for kind in (BadInput, GateFailed)}
        return kinds.get(first["exit_code"], StageFailed)(first["message"])
    rank = (killed or [rank for rank, code in enumerate(codes) if code])[0]
    code, ranks = codes[rank] or 0, len(codes)
    if found := _ROOT_CAUSE.search((folder / "log.txt").read_text(encoding="utf-8", errors="replace")):
        rank, code, ranks = int(found["rank"]), int(found["code"]), 2
    who = f"stage {stage!r}" + (f", process {rank}," if ranks > 1 else "")
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    return StageFailed(f"{who} ended with {ended}; see {folder / 'log.txt'}")


def main(path: str) -> int:
    """One process of a stage."""
    spec = Spec(**json.loads(Path(path).read_text(encoding="utf-8")))
    folder = Path(path).parent
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    watch = (spec.parent,) if spec.host == socket.gethostname() else (folder / ALIVE,)
    threading.Thread(target=_end_with, args=watch, daemon=True).start()
    try:
        figures = _run(spec, folder, rank, ranks)
    except (ShareDone, Terminated):  # 0: of any other code a launcher would end the processes that still write
        return 0
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


def _run(spec: Spec, folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    from cai.run import pipeline
    from cai.run.recipe import load_recipe

    profile = Profile.model_validate(spec.profile)
    recipe = load_recipe(spec.recipe, spec.overrides)
    trains = isinstance(recipe.stages[spec.stage], TrainingConfig)
    if trains and ranks != profile.processes:
        raise StageFailed(
            f"stage {spec.stage!r} found itself in {ranks} of the {profile.processes} processes that profile "
            f"{profile.name!r} wants: {profile.accelerate} made accelerate start no more"
        )
    if trains and profile.fork and ranks > 1:
        _meet(folder / MEETING, rank, ranks)
    line = FileLine(spec.stage, folder / "progress.jsonl") if rank == 0 else StageLine(spec.stage)
    journal = Journal(Path(spec.folder), line, rank, ranks)
    return pipeline.run_stage_in_child(
        recipe, profile, Path(spec.run), spec.stage, journal, line, tuple(spec.report_to)
    )


def _meet(place: Path, rank: int, ranks: int) -> None:
    """Connects forked processes that train together; accelerate takes a group that is there for its own."""
    from torch.distributed import FileStore, init_process_group  # type: ignore[attr-defined]

    store = FileStore(str(place), ranks)  # no port that somebody else may take
    init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def _end_with(parent: int | Path) -> None:
    """Ends this process when `cai run` is gone, a process here or one that writes a file: nobody takes its result."""
    heard, last = time.monotonic(), ""
    while True:
        if isinstance(parent, int):
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                os._exit(StageFailed.exit_code)
            except PermissionError:
                return
        else:
            with contextlib.suppress(OSError):  # a shared file system may be away for a while
                if (word := parent.read_text()) != last:
                    heard, last = time.monotonic(), word
            if time.monotonic() - heard > SILENCE:
                os._exit(StageFailed.exit_code)
        time.sleep(1)


def start_node(path: str) -> None:
    """Becomes accelerate's launcher of the processes on this one of several machines."""
    spec = Spec(**json.loads(Path(path).read_text(encoding="utf-8")))
    profile = Profile.model_validate(spec.profile)
    node = os.environ.get("CAI_NODE") or os.environ.get("SLURM_NODEID")
    if node is None:
        raise StageFailed("found neither CAI_NODE nor SLURM_NODEID, expected the profile's `launcher` to set one")
    where = ["--num_machines", str(profile.nodes), "--machine_rank", node,
             "--main_process_ip", profile.address or spec.host, "--main_process_port", str(spec.port)]  # fmt: skip
    command = _accelerate(profile, path, *where)
    os.execv(command[0], command)


if __name__ == "__main__":
    if sys.argv[1] == NODE:
        start_node(sys.argv[2])
    sys.exit(main(sys.argv[1]))
