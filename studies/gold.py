"""The oracle as a reward function of a recipe, to be measured with `weight: 0` and not to be learned from."""

from __future__ import annotations

from cai.micro.oracle import gold_score
from cai.micro.world_principles import gold as gold_of
from cai.storage.rows import Message

UNREADABLE = gold_of("harmful", "comply", [])
"""Score of a response that the oracle cannot read: that of the worst act. Leaving it out would flatter the mean."""


def gold(prompts: list[list[Message]], responses: list[str]) -> list[float]:
    """Gold score of each response."""
    scores = [gold_score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    return [UNREADABLE if score is None else score for score in scores]
