"""The prompts that a policy responds to while it is trained: which may be, and in which order.

Each optimizer step has its own prompts, and each of these several responses. The order depends on the seed and the
epoch alone. What is left over at an epoch's end, fewer prompts than a step takes, waits for the next one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from cai.contracts.training_config import ReinforcementConfig
from cai.models.chat import Chat
from cai.storage.rows import Prompt, is_held_out
from cai.text.errors import BadInput
from cai.training.rl.rewards import Rewards
from cai.training.tokenised_rows import longest


def usable_prompts(
    prompts: Sequence[Prompt], config: ReinforcementConfig, chat: Chat, rewards: Rewards
) -> tuple[list[Prompt], Counter[str]]:
    """The prompts that may be responded to, and how many were left out for which reason.

    Never one that is held out, nor one that does not leave room for a response, nor one whose responses nobody can
    score.
    """
    kept: list[Prompt] = []
    left_out: Counter[str] = Counter()
    limit = longest(chat, config.max_length)
    for prompt in prompts:
        if is_held_out(prompt):
            left_out["held_out"] += 1
        elif rewards.reason_against(prompt):
            left_out["without_reward"] += 1
        else:
            try:
                fits = len(chat.prompt_ids(prompt["messages"])) + config.max_new_tokens <= limit
            except BadInput:  # a conversation that the model's template does not take
                left_out["refused_by_template"] += 1
                continue
            if fits:
                kept.append(prompt)
            else:
                left_out["too_long"] += 1
    return kept, left_out


class PromptSteps(Sampler[int]):
    """Indices of prompts: `each` times every one of `at_once` prompts, all of it `passes` times, then the next ones."""

    def __init__(self, prompts: int, at_once: int, each: int, passes: int, seed: int) -> None:
        self.prompts, self.at_once, self.each, self.passes = prompts, at_once, each, passes
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.prompts // self.at_once * self.at_once * self.each * self.passes

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.prompts, generator=generator).tolist()
        for start in range(0, self.prompts - self.at_once + 1, self.at_once):
            step = [index for index in order[start : start + self.at_once] for _ in range(self.each)]
            for _ in range(self.passes):
                yield from step
