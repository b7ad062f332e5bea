"""Clocks, memory, the fastest of several candidates, versions, hardware, and the JSON object that ends the output.

Imports nothing but the standard library, because peers run it in environments without `cai`.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
"""The checkout."""


class Run(NamedTuple, Generic[T]):
    """One call of a function: how long it took and what it returned."""

    seconds: float
    returned: T


class Clock:
    """Counts wall-clock seconds, or with `cpu` seconds of CPU time of this process and its children.

    CPU seconds are for a machine that others use at the same time. They mean something only with one thread
    (`OMP_NUM_THREADS=1`) and without a GPU.
    """

    def __init__(self, cpu: bool = False) -> None:
        self.name = "cpu" if cpu else "wall"

    def now(self) -> float:
        """Seconds since an arbitrary moment. Waits for the GPU to finish its work."""
        if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.name == "wall":
            return time.perf_counter()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    def timed(self, function: Callable[[], T]) -> Run[T]:
        start = self.now()
        returned = function()
        return Run(self.now() - start, returned)

    def best(self, functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Run[Any]]:
        """The fastest call of each function. They take turns, so that a busy moment of the machine affects them all."""
        best_runs: dict[str, Run[Any]] = {}
        for _ in range(repeats):
            for name, function in functions.items():
                run = self.timed(function)
                if name not in best_runs or run.seconds < best_runs[name].seconds:
                    best_runs[name] = run
        return best_runs

    def fastest(self, candidates: Iterable[T], function: Callable[[T], object]) -> T:
        """The candidate, such as a batch size, with which `function` is fastest. Skips those too large for the GPU.

        A first call with the first candidate, not timed, pays for what only a first call needs.
        """
        import torch

        candidates = list(candidates)
        function(candidates[0])
        timings: list[tuple[float, int]] = []
        for index, candidate in enumerate(candidates):
            try:
                timings.append((self.timed(functools.partial(function, candidate)).seconds, index))
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
        return candidates[min(timings)[1]]


def argument_parser(
    description: str | None, *, quick: str = "small sizes and each way once: does it work at all", clock: bool = True
) -> argparse.ArgumentParser:
    """A parser with `--quick`, whose help is `quick`, and with `--cpu-seconds` if there is a `clock` to choose."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    if clock:
        parser.add_argument(
            "--cpu-seconds", action="store_true", help="count CPU seconds: for a machine that others use meanwhile"
        )
    return parser


def clock_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Clock:
    """The clock that was asked for. Ends the program if CPU seconds would not mean anything."""
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    if arguments.cpu_seconds and threads != "1":
        parser.error(f"--cpu-seconds: found {threads} threads, expected OMP_NUM_THREADS=1 in the environment")
    if arguments.cpu_seconds and getattr(arguments, "device", "cpu") != "cpu":
        parser.error("--cpu-seconds: found --device cuda, whose work is not the CPU's")
    return Clock(arguments.cpu_seconds)


def run_for_json(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs a command and returns the JSON object in its last line. Raises CalledProcessError if it fails."""
    completed = subprocess.run(command, stdout=subprocess.PIPE, env=env, text=True, check=True)
    last_line: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return last_line


def peak_rss() -> int | None:
    """Most bytes of memory that this process has held so far; None if the system does not say."""
    return _bytes_in_status("VmHWM")


def rss() -> int | None:
    """Bytes of memory that this process holds now; None if the system does not say."""
    return _bytes_in_status("VmRSS")


def _bytes_in_status(name: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{name}:")), None)


def training_figures(
    times: Sequence[float], rewards: Sequence[float], kl: Sequence[float], rss_before: int | None
) -> dict[str, Any]:
    """What a side of ppo.py prints: seconds of each update, its rewards and KL, and bytes of memory above `rss_before`.

    `times` has the start and the end of every update.
    """
    peak = peak_rss()
    return {
        "seconds": [end - start for start, end in itertools.pairwise(times)], "rewards": list(rewards), "kl": list(kl),
        "peak": None if peak is None or rss_before is None else peak - rss_before,
        "versions": versions(("torch", "transformers", "trl", "accelerate")),
    }  # fmt: skip


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python, of `cai` and of the packages that are installed."""
    version_by_name = {"python": platform.python_version()}
    for name in ("cai", *packages):
        try:
            version_by_name[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return version_by_name


def hardware() -> dict[str, Any]:
    """The machine, and how many threads this process may use."""
    facts = {
        "cpu": _cpu_name(), "machine": platform.machine(), "system": platform.platform(), "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }  # fmt: skip
    if torch := sys.modules.get("torch"):
        facts["bfloat16"] = torch.cpu._is_avx512_bf16_supported()  # differs among processors of one name
        if torch.cuda.is_available():
            facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def result(
    bench: str, ours: float | None, plain: float | None, unit: str, sizes: Mapping[str, Any], packages: Iterable[str],
    **figures: Any,
) -> dict[str, Any]:  # fmt: skip
    """The object that a benchmark prints last. `ratio` says how many times better ours is than plain.

    Fewer seconds are better, and more of any other unit. A side that was not measured is None.
    """
    ratio = None
    if ours is not None and plain is not None:
        ratio = round(plain / ours if unit == "seconds" else ours / plain, 2)
    return {
        "bench": bench, "ours": None if ours is None else round(ours, 3),
        "plain": None if plain is None else round(plain, 3), "unit": unit, "ratio": ratio,
        **figures, "sizes": dict(sizes), "versions": versions(packages), "hardware": hardware(),
    }  # fmt: skip
