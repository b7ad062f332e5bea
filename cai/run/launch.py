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
import time
from dataclasses import asdict, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Protocol

from cai.contracts.profile import Profile
from cai.contracts.stage_config import FeedbackConfig, StageConfig
from cai.contracts.training_config import TrainingConfig
from cai.run import stage_process
from cai.run.stage_process import ALIVE, MODULE, NODE, SILENCE, Spec, accelerate_command
from cai.storage import stopping
from cai.storage.files import read_json, write_json
from cai.storage.run_folder import PROCESS
from cai.text.errors import BadInput, CaiError, GateFailed, StageFailed
from cai.text.progress import StageLine, relay

GRACE = 30.0
"""Seconds that children have after SIGTERM."""

LIBRARIES = (
    "cai.run.setsid",  # before all others: it keeps signals off
    "cai.training.loop", "cai.training.trainers", "cai.engines.local.decoding", "cai.engines.local.scoring",
    "cai.run.stage_process", "deepspeed",
)  # fmt: skip
"""What forked processes have imported before they begin, if it is installed: whatever is slow to import."""

_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""What says which of several processes one is: a stage's own are told here, whoever started `cai run`."""

_ROOT_CAUSE = re.compile(
    r"Root Cause \(first observed failure\):.*?rank +: (?P<rank>\d+).*?exitcode +: (?P<code>-?\d+)", re.S
)
"""Where accelerate's launcher says which of its processes ended first, and how."""


def launch(spec: Spec, profile: Profile, line: StageLine, config: StageConfig) -> dict[str, Any]:
    """Runs the stage and returns what rank 0 returned.

    Raises the failing process's error, and Terminated where the stage stopped at a checkpoint as it was asked to.
    """
    folder = Path(spec.folder) / PROCESS
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
        stopping.raise_if_deferred()
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
    """A forked child: from here on as if `python -m cai.run.stage_process SPEC` had been started."""
    os.setsid()
    gc.freeze()  # else each collection goes through all that was imported, and copies its pages
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(stage_process.main(spec))


def _ranks(profile: Profile, config: StageConfig) -> int:
    """In how many processes a stage runs here that accelerate does not start."""
    if isinstance(config, FeedbackConfig):  # a server, or vLLM over all GPUs, is asked by one process
        return profile.processes_here if profile.engine == "local" else 1
    return profile.processes if isinstance(config, TrainingConfig) and profile.fork else 1


def _commands(profile: Profile, config: StageConfig, spec: str, ranks: int) -> list[tuple[list[str], dict[str, str]]]:
    """What to start, each with what is added to its environment."""
    if isinstance(config, TrainingConfig) and profile.nodes > 1:
        return [([*profile.launcher, sys.executable, "-m", MODULE, NODE, spec], {})]
    if isinstance(config, TrainingConfig) and profile.accelerate is not None:
        return [(accelerate_command(profile, spec), {})]
    command = [sys.executable, "-m", MODULE, spec]
    if ranks == 1:
        return [(command, {})]  # accelerate takes whoever has a LOCAL_RANK for one of several processes
    together = {"WORLD_SIZE": str(ranks)}
    if isinstance(config, TrainingConfig):
        together |= {"LOCAL_WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
        if sys.platform == "linux":
            together["GLOO_SOCKET_IFNAME"] = "lo"
    return [(command, {"RANK": str(rank), "LOCAL_RANK": str(rank), **together}) for rank in range(ranks)]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _follow(children: list[Child], folder: Path, line: StageLine) -> list[int | None]:
    """Shows progress until all children have ended, or one has failed: their exit codes, None for one that goes on."""
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
            time.sleep(0.1 if None in codes else 0)  # one that was killed may be known later than one that missed it
            return [child.poll() for child in children]
        time.sleep(0.1)


def _failed_long_ago(folder: Path) -> bool:
    """Whether a process has reported its error a while ago and some process still runs: it hangs."""
    times = [path.stat().st_mtime for path in folder.glob("error-*.json")]
    return bool(times) and time.time() - min(times) > GRACE / 2


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
    if cause := _ROOT_CAUSE.search((folder / "log.txt").read_text(encoding="utf-8", errors="replace")):
        rank, code, ranks = int(cause["rank"]), int(cause["code"]), 2
    who = f"stage {stage!r}" + (f", process {rank}," if ranks > 1 else "")
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    return StageFailed(f"{who} ended with {ended}; see {folder / 'log.txt'}")
