"""Runs a stage in child processes: one, or several ranks.

The parent never imports torch, so that all memory of a device is free again when a stage ends. It writes a spec for the
children (`cai.run.stage_process`), shows the progress that they write to a file, forwards SIGTERM
(`cai.storage.stopping`), and reports the error of the rank that failed first; it stops the other ranks then.

Training stages run in as many processes as the profile says, which accelerate starts and connects. On several machines
the profile's `launcher` starts accelerate on each of them; parent and children exchange files in the stage's folder,
which all machines must see under the same path. Feedback stages run in as many processes as one machine has. These need
no process group, only the stage's folder (`cai.storage.journal`), so they are started here: accelerate's launcher would
add seconds to each stage. All other stages run in one process.

With `fork` in a CPU profile, every child is forked from one process that has imported the libraries, so that only the
first stage waits for imports. Ranks that train meet through a file in the stage's folder and communicate over loopback.
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
import time
from dataclasses import asdict, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Protocol

from cai.contracts.machine import killed_for_memory, usable_cores
from cai.contracts.profile import Profile
from cai.contracts.stage_config import FeedbackConfig, StageConfig
from cai.contracts.training_config import TrainingConfig
from cai.run import stage_process
from cai.run.stage_process import ALIVE, MODULE, NODE, SILENCE, Spec, accelerate_command
from cai.storage import stopping
from cai.storage.files import read_json, write_json
from cai.storage.refusals import is_full
from cai.storage.run_folder import PROCESS
from cai.text.errors import BadInput, CaiError, GateFailed, OutOfMemory, StageFailed
from cai.text.progress import StageLine, relay

GRACE = 30.0
"""Seconds that children have after SIGTERM."""

LIBRARIES = (
    "cai.run.setsid",  # first, so that signals to the terminal's group do not reach the fork server
    "cai.training.loop", "cai.training.trainers", "cai.engines.local.decoding", "cai.engines.local.scoring",
    "cai.run.stage_process", "deepspeed",
)  # fmt: skip
"""Slow imports that a forked process inherits; those that are not installed are skipped."""

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Variables that tell a process its rank. Those of `cai run` itself are not passed on to a stage's processes."""

_ROOT_CAUSE = re.compile(
    r"Root Cause \(first observed failure\):.*?rank +: (?P<rank>\d+).*?exitcode +: (?P<code>-?\d+)", re.S
)
"""Where the log of accelerate's launcher names the rank that ended first, and its exit code."""


def launch(spec: Spec, profile: Profile, line: StageLine, config: StageConfig) -> dict[str, Any]:
    """Runs the stage in child processes; the figures that rank 0 returned.

    Raises the error of the rank that failed first, and Terminated where the stage stopped at a resume point on request.
    """
    folder = Path(spec.folder) / PROCESS
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    if profile.nodes > 1:
        spec = replace(spec, port=_free_port())
    ranks = _ranks(profile, config)
    if profile.fork:
        threads = profile.threads or max(1, usable_cores() // ranks)
        spec = replace(spec, profile=spec.profile | {"threads": threads})
    write_json(folder / "spec.json", asdict(spec))
    children: list[Child] = []
    n_killed_before = killed_for_memory()
    with (folder / "log.txt").open("wb") as log:
        try:
            for command, environment in _commands(profile, config, str(folder / "spec.json"), ranks):
                env = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES} | environment
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
        raise _first_error(folder, spec.stage, codes, killed_for_memory() > n_killed_before)
    figures = read_json(folder / "figures.json")
    if not isinstance(figures, dict):
        stopping.raise_if_deferred()
        raise StageFailed(f"stage {spec.stage!r} ended without a result; see {folder / 'log.txt'}")
    return figures


class Child(Protocol):
    """A child process, with the methods of `subprocess.Popen` that are used here."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, or minus the signal's number; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the exit code. Raises TimeoutExpired after `timeout` seconds."""


class Fork:
    """A child forked from the fork server, which has imported `LIBRARIES` and ends with this process."""

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
    """Starts the fork server unless it runs; does not wait for its imports."""
    forkserver.set_forkserver_preload([*LIBRARIES])
    forkserver.ensure_running()


def _forked(spec: str, environment: dict[str, str], log: Path) -> None:
    """The body of a forked child: does what `python -m cai.run.stage_process SPEC` does."""
    os.setsid()
    gc.freeze()  # or each collection would visit, and so copy, the pages of all imported modules
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(stage_process.main(spec))


def _ranks(profile: Profile, config: StageConfig) -> int:
    """How many processes to start for a stage that accelerate does not start."""
    if isinstance(config, FeedbackConfig):  # one process sends all requests to a server or to vLLM, which uses all GPUs
        return profile.processes_here if profile.engine == "local" else 1
    return profile.processes if isinstance(config, TrainingConfig) and profile.fork else 1


def _commands(profile: Profile, config: StageConfig, spec: str, ranks: int) -> list[tuple[list[str], dict[str, str]]]:
    """The commands to start, each with variables that are added to its environment."""
    if isinstance(config, TrainingConfig) and profile.nodes > 1:
        return [([*profile.launcher, sys.executable, "-m", MODULE, NODE, spec], {})]
    if isinstance(config, TrainingConfig) and profile.accelerate is not None:
        return [(accelerate_command(profile, spec), {})]
    command = [sys.executable, "-m", MODULE, spec]
    if ranks == 1:
        return [(command, {})]  # with a LOCAL_RANK, accelerate would expect several processes
    shared = {"WORLD_SIZE": str(ranks)}
    if isinstance(config, TrainingConfig):
        shared |= {"LOCAL_WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
        if sys.platform == "linux":
            shared["GLOO_SOCKET_IFNAME"] = "lo"
    return [(command, {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared}) for rank in range(ranks)]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _follow(children: list[Child], folder: Path, line: StageLine) -> list[int | None]:
    """Shows progress until all children have ended or one has failed. Returns exit codes, None for one that runs."""
    path = folder / "progress.jsonl"
    offset = 0
    last_sign_of_life = -math.inf
    while True:
        if time.monotonic() - last_sign_of_life > SILENCE / 12:
            last_sign_of_life = time.monotonic()
            (folder / ALIVE).write_text(str(last_sign_of_life))
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
            time.sleep(0.1 if None in codes else 0)  # a killed rank may be reaped after one that failed because of it
            return [child.poll() for child in children]
        time.sleep(0.1)


def _failed_long_ago(folder: Path) -> bool:
    """Whether a process has reported its error a while ago and some process still runs: it hangs."""
    times = [path.stat().st_mtime for path in folder.glob("error-*.json")]
    return bool(times) and time.time() - min(times) > GRACE / 2


def _stop(children: list[Child]) -> None:
    """Terminates the children that still run, at the same time; kills them after `GRACE` seconds."""
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
    """Sends a signal to a child's process group."""
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        with contextlib.suppress(ProcessLookupError):  # a new fork may not lead its group yet
            os.kill(child.pid, number)


def _first_error(folder: Path, stage: str, codes: list[int | None], kernel_killed: bool) -> CaiError:
    """The error of the rank that failed first; other ranks often fail only because it did.

    A rank that was killed, mostly for lack of memory, writes no error, and the errors of other ranks follow from it.
    `kernel_killed` tells whether the kernel has killed a process for lack of memory meanwhile.
    """
    errors = [read_json(path) for path in folder.glob("error-*.json")]
    killed = [rank for rank, code in enumerate(codes) if code == -signal.SIGKILL]
    if errors and not killed:
        first = min(errors, key=lambda error: error["time"])
        kinds = {kind.__name__: kind for kind in (BadInput, GateFailed, OutOfMemory)}
        return kinds.get(first["kind"], StageFailed)(first["message"])
    rank = (killed or [rank for rank, code in enumerate(codes) if code])[0]
    code, ranks = codes[rank] or 0, len(codes)
    if cause := _ROOT_CAUSE.search((folder / "log.txt").read_text(encoding="utf-8", errors="replace")):
        rank, code, ranks = int(cause["rank"]), int(cause["code"]), 2
    who = f"stage {stage!r}" + (f", process {rank}," if ranks > 1 else "")
    if kernel_killed and code in {-signal.SIGKILL, 128 + signal.SIGKILL}:
        remedy = "`cai plan` tells what it takes, and fewer `processes` in the profile take less"
        return OutOfMemory(f"{who} was killed by the system, which had no memory left ({remedy})")
    if is_full(folder):
        return StageFailed(f"{who} ended, because the disk of {folder} is full; free some of it and run this again")
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    return StageFailed(f"{who} ended with {ended}; see {folder / 'log.txt'}")
