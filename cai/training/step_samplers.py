"""The order in which trainers take rows: shuffled by seed and epoch, optimizer step by optimizer step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback


class LengthSortedSteps(Sampler[int]):
    """A shuffle that depends on seed and epoch alone, with each optimizer step's examples sorted by length.

    Yields every row once. Where several processes do not share the last step evenly, accelerate fills it with rows from
    the epoch's start, which are then learned from twice in that epoch.

    A step consists of global micro-batches, one micro-batch of each process at the same time, and the processes wait
    for each other after each of them. A global micro-batch is therefore dealt out in serpentine order (first process to
    last, then back), which keeps the processes' token counts within its longest less its shortest example.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, processes: int = 1, accumulation: int = 1
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0
        self.processes, self.global_micro_batch = processes, batch_size // accumulation

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.global_micro_batch
        for start in range(0, len(order), self.batch_size):
            step = sorted(order[start : start + self.batch_size], key=lambda index: -self.lengths[index])
            for first in range(0, len(step), size):
                indices = step[first : first + size]
                yield from indices if len(indices) < size else self._deal_out(indices, first)

    def _deal_out(self, indices: Sequence[int], first: int) -> Iterator[int]:
        """A global micro-batch, one process's share after the other's; `first` is its position in the step."""
        shares: list[list[int]] = [[] for _ in range(self.processes)]
        for position, index in enumerate(indices, first):
            place = position % (2 * self.processes)
            shares[min(place, 2 * self.processes - 1 - place)].append(index)
        return itertools.chain.from_iterable(shares)


class PromptSteps(Sampler[int]):
    """Prompt indices by step: each of `prompts_per_step` prompts `repeats` times, and all of these `passes` times.

    The order depends on seed and epoch alone. Prompts left over at an epoch's end, fewer than a step takes, are skipped
    in that epoch.
    """

    def __init__(self, n_prompts: int, prompts_per_step: int, repeats: int, passes: int, seed: int) -> None:
        self.n_prompts, self.prompts_per_step, self.repeats, self.passes = n_prompts, prompts_per_step, repeats, passes
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_prompts // self.prompts_per_step * self.prompts_per_step * self.repeats * self.passes

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.n_prompts, generator=generator).tolist()
        for start in range(0, self.n_prompts - self.prompts_per_step + 1, self.prompts_per_step):
            prompts = order[start : start + self.prompts_per_step]
            for _ in range(self.passes):
                yield from (index for index in prompts for _ in range(self.repeats))


class SamplerEpochCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler its epoch: accelerate 1.15 does not where several processes resume in the middle of one."""

    def __init__(self, sampler: LengthSortedSteps | PromptSteps) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))
