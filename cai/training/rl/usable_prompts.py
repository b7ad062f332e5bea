"""The prompts that a policy responds to while it is trained: which are usable, and in which order they come.

Each optimizer step has its own prompts, and each prompt several responses. The order depends on the seed and the epoch
alone. Prompts left over at an epoch's end, fewer than a step takes, are skipped in that epoch.
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
from cai.training.tokenised_rows import token_limit


def select_usable_prompts(
    prompts: Sequence[Prompt], config: ReinforcementConfig, chat: Chat, rewards: Rewards
) -> tuple[list[Prompt], Counter[str]]:
    """The prompts that may be responded to, and how many were left out by reason.

    Left out are held-out prompts, prompts that leave no room for a response, and prompts whose responses no source of
    reward can score.
    """
    kept: list[Prompt] = []
    left_out: Counter[str] = Counter()
    limit = token_limit(chat, config.max_length)
    for prompt in prompts:
        if is_held_out(prompt):
            left_out["held_out"] += 1
        elif rewards.reason_unscorable(prompt):
            left_out["without_reward"] += 1
        else:
            try:
                fits = len(chat.prompt_ids(prompt["messages"])) + config.max_new_tokens <= limit
            except BadInput:  # the model's template refuses the conversation
                left_out["refused_by_template"] += 1
                continue
            if fits:
                kept.append(prompt)
            else:
                left_out["too_long"] += 1
    return kept, left_out


class PromptSteps(Sampler[int]):
    """Prompt indices by step: each of `prompts_per_step` prompts `repeats` times, and all of these `passes` times."""

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
