"""Which prompts a policy can respond to while it is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

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
