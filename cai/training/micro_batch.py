"""How many examples a training process computes at once, recorded in the stage's folder.

A stage that continues keeps its micro-batch, because rounding depends on it. One that has run out of memory goes on
with a smaller one, from its newest resume point. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from cai.contracts.profile import divisors_up_to
from cai.storage.files import read_json, write_json

FILE = "memory.json"
"""File in a training stage's folder: its micro-batch, and what was planned and measured."""


@dataclass(frozen=True)
class MicroBatch:
    """How a process computes its share of a global batch."""

    size: int
    """Examples in one forward pass."""
    checkpointing: bool
    """Whether activations are recomputed instead of kept."""


@dataclass(frozen=True)
class MemoryRecord:
    """The micro-batch that was chosen, and the memory that was planned and measured."""

    profile_micro_batch: MicroBatch
    """What the profile allows, for which this one was chosen."""
    share: int
    """Examples of a global batch that one process computes: a multiple of the micro-batch."""
    micro_batch: MicroBatch
    longest: int
    """Tokens of the longest row."""
    planned: Mapping[str, int] = field(default_factory=dict)
    """Bytes by part, empty where they could not be computed."""
    planned_peak: int | None = None
    """Bytes that one process was expected to take at most."""
    measured_peak: int | None = None
    """Bytes that one process took at most."""

    def write(self, folder: Path) -> None:
        """Writes it into a stage's folder."""
        write_json(folder / FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The record in a stage's folder; None where there is none."""
        if (fields := read_json(folder / FILE)) is None:
            return None
        batches = {name: MicroBatch(**fields[name]) for name in ("profile_micro_batch", "micro_batch")}
        return cls(**{**fields, **batches})


def halve_micro_batch(folder: Path) -> MicroBatch | None:
    """Records a smaller micro-batch for a stage that ran out of memory; None where there is none.

    A micro-batch of one example is tried again with recomputed activations.
    """
    record = MemoryRecord.read(folder)
    if record is None or record.micro_batch == MicroBatch(1, True):
        return None
    size, checkpointing = record.micro_batch.size, record.micro_batch.checkpointing
    smaller = MicroBatch(divisors_up_to(size // 2, record.share)[0], checkpointing) if size > 1 else MicroBatch(1, True)
    replace(record, micro_batch=smaller).write(folder)
    return smaller
