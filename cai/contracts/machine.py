"""What this machine has: memory, GPUs, disk. Asked without torch, so that the process that plans stays small."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import psutil

_GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Files of a control group, version 2 and 1: its limit, what it uses, and which line of memory.stat is file cache."""


class MemoryGroup(NamedTuple):
    """A control group that limits the memory of this process, in bytes."""

    limit: int
    used: int


def total_memory() -> int:
    """Bytes of memory that processes here may use: the machine's, or a control group's limit where that is lower."""
    return min([int(psutil.virtual_memory().total), *(group.limit for group in memory_groups())])


def free_memory() -> int:
    """Bytes of memory that nothing uses, within the control groups' limits."""
    free_in_groups = (max(0, group.limit - group.used) for group in memory_groups())
    return min([int(psutil.virtual_memory().available), *free_in_groups])


def memory_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[MemoryGroup]:
    """The control groups with a limit on memory that this process is in, version 1 and 2, as a batch system sets them.

    Memory that holds files which can be read again does not count as used.
    """
    groups: list[MemoryGroup] = []
    for line in _lines(own):
        _, controllers, path = line.split(":", 2)
        if controllers in {"", "memory"}:
            base = root / controllers
            folders = [base / parent for parent in (Path(path.strip("/")), *Path(path.strip("/")).parents)]
            groups += [group for folder in folders if (group := _memory_group(folder)) is not None]
    return groups


def _memory_group(folder: Path) -> MemoryGroup | None:
    for limit_name, used_name, cache_name in _GROUP_FILES:
        limit, used = (next(iter(_lines(folder / name)), "") for name in (limit_name, used_name))
        if limit.isdigit() and used.isdigit():
            statistics = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat"))
            return MemoryGroup(int(limit), max(0, int(used) - int(statistics.get(cache_name, 0))))
    return None


def killed_for_memory() -> int:
    """How many processes the kernel has killed for lack of memory since it started; 0 where it does not count them."""
    for line in _lines(Path("/proc/vmstat")):
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    return 0


def usable_cores() -> int:
    """Cores of the CPU that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_disk(folder: Path) -> int:
    """Bytes that are free where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@functools.cache
def gpu_memory() -> tuple[int, ...]:
    """Bytes of each GPU that processes here may use, as its driver's `nvidia-smi` tells; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = [[field.strip() for field in line.split(",")] for line in output.splitlines()]
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in visible.split(",")]
        gpus = [gpu for gpu in gpus if gpu[0] in names or gpu[1] in names]
    return tuple(int(megabytes) * 2**20 for _, _, megabytes in gpus if megabytes.isdigit())


def reset_peak_memory() -> None:
    """Begins a new measurement of `peak_memory`, on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory() -> int | None:
    """Most bytes of memory that this process had since `reset_peak_memory`; None where the system does not tell."""
    for line in _lines(Path("/proc/self/status")):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
