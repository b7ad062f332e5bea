"""The oracle as a reward function, to be watched and not to be learned from: `weight: 0`."""

from __future__ import annotations

from cai.micro.oracle import gold_score
from cai.records import Message


def gold(prompts: list[list[Message]], responses: list[str]) -> list[float | None]:
    """What each response is worth by the embedded world's own account."""
    return [gold_score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
