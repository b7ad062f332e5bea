"""What a machine has, read from files that stand for the system's."""

from __future__ import annotations

from pathlib import Path

from cai.contracts import machine
from cai.contracts.machine import MemoryGroup, memory_groups


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="ascii")


def test_every_control_group_above_a_process_limits_it(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/slurm/job_7/step_0\n", encoding="ascii")
    group(tmp_path / "fs" / "slurm" / "job_7", memory__max="8000\n", memory__current="5000\n",
          memory__stat="anon 4000\ninactive_file 1000\n")  # fmt: skip
    group(tmp_path / "fs" / "slurm" / "job_7" / "step_0", memory__max="max\n", memory__current="5000\n")
    assert memory_groups(tmp_path / "fs", own) == [MemoryGroup(8000, 4000)]


def test_control_groups_of_version_1_are_read_too(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("9:cpu:/other\n4:memory:/job\n", encoding="ascii")
    group(tmp_path / "fs" / "memory" / "job", memory__limit_in_bytes="9000\n", memory__usage_in_bytes="3000\n",
          memory__stat="total_inactive_file 500\n")  # fmt: skip
    assert memory_groups(tmp_path / "fs", own) == [MemoryGroup(9000, 2500)]


def test_the_tightest_limit_counts(monkeypatch):
    monkeypatch.setattr(machine, "memory_groups", lambda: [MemoryGroup(10**6, 4 * 10**5), MemoryGroup(10**15, 0)])
    assert machine.total_memory() == 10**6
    assert machine.free_memory() == 6 * 10**5


def test_a_system_without_control_groups_has_the_machines_memory(tmp_path):
    assert memory_groups(tmp_path, tmp_path / "none") == []
    assert 0 < machine.free_memory() <= machine.total_memory()


def test_the_peak_is_that_since_it_was_reset():
    block = bytearray(64 * 2**20)
    with_block = machine.peak_memory()
    del block
    machine.reset_peak_memory()
    assert with_block is None or machine.peak_memory() < with_block


def test_disk_is_that_of_the_nearest_folder_that_exists(tmp_path):
    assert machine.free_disk(tmp_path / "runs" / "not" / "yet") > 0
