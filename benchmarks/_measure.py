"""What benchmarks share: clocks, memory, the fastest of several ways, and the line that ends their output."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Run(NamedTuple, Generic[T]):
    """One run of something: how long it took, and what it returned."""

    seconds: float
    returned: T


class Clock:
    """What seconds are: those that pass, or with `cpu` those that this process's threads and its children compute.

    The latter is for a machine that others use at the same time. It means something with one thread alone
    (`OMP_NUM_THREADS=1`) and without a GPU.
    """

    def __init__(self, cpu: bool = False) -> None:
        self.name = "cpu" if cpu else "wall"

    def now(self) -> float:
        """Seconds since some moment; what was left for a GPU to do is waited for."""
        if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.name == "wall":
            return time.perf_counter()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    def timed(self, way: Callable[[], T]) -> Run[T]:
        """Runs `way` once."""
        began = self.now()
        returned = way()
        return Run(self.now() - began, returned)

    def best(self, ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Run[Any]]:
        """The quickest run of each way. They take turns, so that a busy moment of the machine is nobody's alone."""
        found: dict[str, Run[Any]] = {}
        for _ in range(repeats):
            for name, way in ways.items():
                run = self.timed(way)
                if name not in found or run.seconds < found[name].seconds:
                    found[name] = run
        return found

    def fastest(self, candidates: Iterable[T], way: Callable[[T], object]) -> T:
        """The candidate, such as a batch size, with which `way` is quickest. One too large for the GPU is passed over.

        `way` runs once before, with the first one, for what only a first run pays.
        """
        import torch

        candidates = list(candidates)
        way(candidates[0])
        tried: list[tuple[float, int]] = []
        for n, candidate in enumerate(candidates):
            try:
                tried.append((self.timed(functools.partial(way, candidate)).seconds, n))
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
        return candidates[min(tried)[1]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What all benchmarks of engines take."""
    parser.add_argument("--quick", action="store_true", help="small sizes and each way once: does it work at all")
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="count these, not seconds that pass: for a machine that others use"
    )


def clock_of(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Clock:
    """The clock that was asked for. Ends the program where CPU seconds would not mean anything."""
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    if given.cpu_seconds and threads != "1":
        parser.error(f"--cpu-seconds: found {threads} threads, expected OMP_NUM_THREADS=1 in the environment")
    if given.cpu_seconds and getattr(given, "device", "cpu") != "cpu":
        parser.error("--cpu-seconds: found --device cuda, whose work is not the CPU's")
    return Clock(given.cpu_seconds)


def peak_rss() -> int | None:
    """Bytes of memory that this process held at most; None where the system does not tell."""
    return _of_process("VmHWM")


def rss() -> int | None:
    """Bytes of memory that this process holds now; None where the system does not tell."""
    return _of_process("VmRSS")


def _of_process(name: str) -> int | None:
    """A size that Linux tells of this process, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{name}:"))


def training_figures(ends: Sequence[float], rewards: Sequence[float], kl: Sequence[float], before: int | None) -> Any:
    """What a run of `ppo.py` prints: seconds of each update between `ends`, its figures, and memory above `before`."""
    peak = peak_rss()
    return {
        "seconds": [end - begin for begin, end in itertools.pairwise(ends)],
        "rewards": list(rewards),
        "kl": list(kl),
        "peak": None if peak is None or before is None else peak - before,
        "versions": versions(("torch", "transformers", "trl", "accelerate")),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in ("cai", *packages):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The machine, and how many threads this process may use."""
    found = {
        "cpu": _cpu(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }
    if torch := sys.modules.get("torch"):
        found["bfloat16"] = torch.cpu._is_avx512_bf16_supported()  # processors of one name differ in it
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    """The processor's name, where the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def result(
    bench: str,
    ours: float | None,
    plain: float | None,
    unit: str,
    sizes: Mapping[str, Any],
    packages: Iterable[str],
    **more: Any,
) -> dict[str, Any]:
    """The object that a benchmark prints last. `ratio` is how many times better ours is: less of seconds, more else.

    None is a side that was not measured.
    """
    ratio = None
    if ours is not None and plain is not None:
        ratio = round(plain / ours if unit == "seconds" else ours / plain, 2)
    return {
        "bench": bench, "ours": None if ours is None else round(ours, 3),
        "plain": None if plain is None else round(plain, 3), "unit": unit, "ratio": ratio,
        **more, "sizes": dict(sizes), "versions": versions(packages), "hardware": hardware(),
    }  # fmt: skip
